"""The server's end of the engine: requests in, a stream of outputs per request out.

`EngineProcess` talks to a child process; `EngineThread` runs the same loop on a thread of this process, for tests and
embedding. If the engine dies, every open stream ends with an error output and `alive` turns false.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from motet.config import EngineConfig
from motet.engine.messages import (
    Abort,
    Fatal,
    Forget,
    GetStats,
    Inbox,
    Message,
    Missing,
    Outputs,
    Pin,
    Prefetch,
    Progress,
    Ready,
    Register,
    Remade,
    Reply,
    Shutdown,
    Submit,
    Wake,
    frame,
    read_outbound,
    typed_error,
)
from motet.errors import EngineDead, MotetError
from motet.types import EngineStats, PreparedAdapter, Request, SeqOutput, TierStats

logger = logging.getLogger(__name__)
OnProgress = Callable[[str, float], None]
SHUTDOWN_SECONDS = 10.0
REMAKE_SECONDS = 300.0  # a large adapter may take minutes; a share that hangs never ends
POLITE_THREADS = {"GOMP_SPINCOUNT": "20000"}
"""OpenMP threads that soon fall asleep when they wait. A decode step of 8 rows on 2 cores, with the default, this and
threads that never spin: 50, 54 and 60 ms alone; 100-1,000, 140 and 75 ms beside a process that keeps one core busy."""


class Disk(Protocol):
    """Prepares adapters from their directories, and counts what it keeps of them on disk. Runs in any thread."""

    def __call__(self, source: Path, /) -> PreparedAdapter: ...

    def stats(self) -> TierStats: ...


class EngineClient(ABC):
    """Multiplexes requests over one engine. All methods belong to one asyncio loop."""

    def __init__(self, on_progress: OnProgress | None = None) -> None:
        self._on_progress = on_progress or (lambda _stage, _fraction: None)
        self._streams: dict[str, asyncio.Queue[SeqOutput]] = {}
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._numbers = itertools.count()
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._death: MotetError | None = None
        self._disk: Disk | None = None
        self._remaking = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def alive(self) -> bool:
        """Whether the engine still answers."""
        return self._death is None

    @property
    def ready(self) -> bool:
        """Whether the engine is warm and serving."""
        return self.alive and self._ready.done()

    async def started(self) -> Ready:
        """Wait until the engine serves; raises what kept it from starting."""
        return await asyncio.shield(self._ready)

    async def stream(self, requests: Sequence[Request]) -> AsyncIterator[SeqOutput]:
        """Submit requests and yield their outputs until all have ended; leaving early aborts the rest."""
        self._check_alive()
        outputs: asyncio.Queue[SeqOutput] = asyncio.Queue()
        open_ids = {request.id for request in requests}
        self._streams.update(dict.fromkeys(open_ids, outputs))
        self._send(Submit(tuple(requests)))
        try:
            while open_ids:
                output = await outputs.get()
                if output.finish is not None:
                    open_ids.discard(output.request_id)
                yield output
        finally:
            for request_id in open_ids:
                self._streams.pop(request_id, None)
            self.abort(open_ids)

    def abort(self, ids: set[str]) -> None:
        """End requests in the engine; their streams, if still open, see the abort."""
        if ids and self.alive:
            self._send(Abort(tuple(ids)))

    def use_disk(self, disk: Disk) -> None:
        """Where images are made again that the engine misses, and who knows how many there are."""
        self._disk = disk

    async def register_adapter(self, digest: str, image: str, num_pages: int, source: str = "") -> None:
        """Make an adapter known to the engine; its image can be made again from the directory `source`."""
        await self._call(lambda call: Register(call, digest, image, num_pages, source))

    async def forget_adapter(self, digest: str) -> None:
        """Drop an adapter after its last request."""
        await self._call(lambda call: Forget(call, digest))

    async def prefetch(self, digest: str) -> None:
        """Load an adapter soon, if there is room that nobody wants. InvalidRequest if it is not registered."""
        await self._call(lambda call: Prefetch(call, digest))

    async def pin_adapter(self, digest: str, pinned: bool) -> None:
        """Never evict an adapter, or do so again. CapacityExceeded if all that is pinned would take too much."""
        await self._call(lambda call: Pin(call, digest, pinned))

    async def stats(self) -> EngineStats:
        """A snapshot of the engine."""
        reply = await self._call(GetStats)
        stats = reply.stats
        assert stats is not None
        if self._disk is None:
            return stats
        disk = await asyncio.to_thread(self._disk.stats)
        disk = msgspec.structs.replace(disk, hits=stats.tiers["disk"].hits)
        return msgspec.structs.replace(stats, tiers={**stats.tiers, "disk": disk})

    @abstractmethod
    def _send(self, message: Message) -> None:
        """Hand a message to the engine without blocking."""

    @abstractmethod
    async def close(self) -> None:
        """Shut the engine down and wait until it has gone."""

    async def _call(self, make: Callable[[int], Message]) -> Reply:
        self._check_alive()
        number = next(self._numbers)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        self._send(make(number))
        reply = await future
        if reply.error is not None:
            raise typed_error(reply.error, reply.code)
        return reply

    async def _remake(self, digest: str, source: str) -> None:
        """Tell the engine how it went to make an image again, or that it takes too long."""
        making = asyncio.create_task(self._make(digest, source))
        self._keep(making)
        await asyncio.wait({making}, timeout=REMAKE_SECONDS)
        if making.done():
            error = making.result()
        else:
            error = f"its image has left the disk, and was not made again in {REMAKE_SECONDS:g} seconds"
        if self.alive:
            self._send(Remade(digest, error))

    async def _make(self, digest: str, source: str) -> str | None:
        """Make an image again, one at a time: a source that hangs holds one thread. Why it could not be made."""
        error = None
        async with self._remaking:
            if self._disk is None:
                error = "its image has left the disk"
            else:
                try:
                    found = await asyncio.to_thread(self._disk, Path(source))
                    if found.digest != digest:
                        error = f"its image has left the disk, and {source!r} now holds digest {found.digest}"
                except (MotetError, OSError) as failure:
                    error = f"its image has left the disk, and cannot be made again: {failure}"
                except Exception as failure:  # whatever it is, the requests that wait must end with it
                    logger.exception("an image could not be made again")
                    error = f"its image has left the disk; making it again failed: {type(failure).__name__}"
        return error

    def _keep(self, task: asyncio.Task[Any]) -> None:
        """Until it has ended: the loop itself keeps only a weak reference."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDead("the engine stopped") from self._death

    def _dispatch(self, message: Message) -> None:
        match message:
            case Outputs(outputs):
                for output in outputs:
                    self._deliver(output)
            case Missing(digest, source):
                self._keep(asyncio.create_task(self._remake(digest, source)))
            case Reply(call):
                future = self._calls.pop(call, None)
                if future is not None and not future.done():
                    future.set_result(message)
            case Progress(stage, fraction):
                self._on_progress(stage, fraction)
            case Ready():
                self._ready.set_result(message)
            case Fatal(error, code):
                self._die(typed_error(error, code))

    def _deliver(self, output: SeqOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return
        stream.put_nowait(output)
        if output.finish is not None:
            del self._streams[output.request_id]

    def _die(self, reason: MotetError) -> None:
        """End everything; `reason` is what `started` raises, if it is still awaited."""
        if self._death is not None:
            return
        self._death = reason
        if not self._ready.done():
            self._ready.set_exception(reason)
            self._ready.exception()  # it may be that nobody waits for it
        for request_id in list(self._streams):
            self._deliver(
                SeqOutput(request_id, finish="error", error="the engine stopped", code=EngineDead.code)
            )
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDead("the engine stopped"))
        self._calls.clear()


class EngineProcess(EngineClient):
    """An engine in a child process, over a Unix socket pair."""

    def __init__(self, config: EngineConfig, on_progress: OnProgress | None = None) -> None:
        super().__init__(on_progress)
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "motet.engine.process"]
            arguments = [msgspec.json.encode(config).decode(), str(theirs.fileno())]
            # In a session of its own, where a terminal's Ctrl-C does not reach it, not even during its imports.
            self._process = subprocess.Popen(
                [*command, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=POLITE_THREADS | os.environ,
            )
        self._socket = ours
        self._writer: asyncio.StreamWriter | None = None
        self._early: list[Message] = []
        self._reading = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    def _send(self, message: Message) -> None:
        if self._writer is None:
            self._early.append(message)
        else:
            self._writer.write(frame(message))

    async def _read(self) -> None:
        reader, self._writer = await asyncio.open_connection(sock=self._socket)
        for message in self._early:
            self._writer.write(frame(message))
        try:
            while True:
                self._dispatch(await read_outbound(reader))
        except (asyncio.IncompleteReadError, ConnectionError, ValueError, msgspec.DecodeError) as error:
            self._die(EngineDead(f"the engine process ended: {error}"))
        finally:
            self._writer.close()

    async def close(self) -> None:
        if self.alive:
            self._send(Shutdown())
        try:
            await asyncio.to_thread(self._process.wait, SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        await self._reading


class EngineThread(EngineClient):
    """An engine on a thread of this process."""

    def __init__(self, config: EngineConfig, on_progress: OnProgress | None = None) -> None:
        super().__init__(on_progress)
        self._inbox: Inbox = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(config,), name="motet-engine", daemon=True)
        self._thread.start()

    def _send(self, message: Message) -> None:
        self._inbox.put(message)  # type: ignore[arg-type]  # only inbound messages are sent

    def _run(self, config: EngineConfig) -> None:
        # Imported here so that a server with its engine in another process never loads torch.
        from motet.engine.loop import Engine
        from motet.engine.process import fatal, serve

        def send(message: Message) -> None:
            self._loop.call_soon_threadsafe(self._dispatch, message)

        try:
            engine = Engine(
                config,
                lambda stage, fraction: send(Progress(stage, fraction)),
                lambda: self._inbox.put(Wake()),
                lambda digest, source: self._inbox.put(Missing(digest, source)),
            )
            try:
                send(Ready(engine.spec, engine.runner.pool.page_bytes, engine.max_model_len))
                serve(engine, self._inbox, send)
            finally:
                engine.close()
        except Exception as error:  # whatever it is, the streams must end with it
            if not isinstance(error, MotetError):
                logger.exception("the engine failed")
            send(fatal(error))

    async def close(self) -> None:
        self._inbox.put(Shutdown())
        await asyncio.to_thread(self._thread.join)
        self._die(EngineDead("the engine was closed"))
