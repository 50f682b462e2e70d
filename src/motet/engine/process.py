"""The engine in its own process, so that JSON, SSE and tokenising never share a GIL with the step loop.

`python -m motet.engine.process CONFIG_JSON SOCKET_FD` is started by `engine.client`; it serves one connection and
leaves when the other side does.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from motet.config import EngineConfig
from motet.engine.loop import Engine
from motet.engine.messages import (
    Abort,
    Fatal,
    Forget,
    GetStats,
    Inbound,
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
    read_inbound,
)
from motet.errors import EngineDead, MotetError
from motet.types import SeqOutput

Send = Callable[[Message], None]


def serve(engine: Engine, inbox: Inbox, send: Send) -> None:
    """Run steps while there is work, sleep while there is none, until the inbox gives None or Shutdown."""
    while True:
        block = engine.must_wait
        while block or not inbox.empty():
            message = inbox.get()
            block = False
            if message is None or isinstance(message, Shutdown):
                return
            if not isinstance(message, Wake):
                handle(engine, message, send)
        if engine.has_work:
            _send_outputs(engine.step(), send)


def handle(engine: Engine, message: Inbound | Missing, send: Send) -> None:
    """Apply one message between two steps."""
    match message:
        case Submit(requests):
            for request in requests:
                _send_outputs(engine.add(request), send)
        case Abort(ids):
            for request_id in ids:
                _send_outputs(engine.abort(request_id), send)
        case Register() | Forget() | Prefetch() | Pin():
            _reply(message.call, send, lambda: _change(engine, message))
        case Missing():
            send(message)
        case Remade(digest, error):
            _send_outputs(engine.image_remade(digest, error), send)
        case GetStats(call):
            send(Reply(call, stats=engine.stats()))


def _change(engine: Engine, message: Register | Forget | Prefetch | Pin) -> None:
    """Apply what is said of one adapter."""
    match message:
        case Register(_, digest, image, num_pages, source):
            engine.register_adapter(digest, Path(image), num_pages, source)
        case Forget(_, digest):
            engine.forget_adapter(digest)
        case Prefetch(_, digest):
            engine.prefetch(digest)
        case Pin(_, digest, pinned):
            engine.pin_adapter(digest, pinned)


def fatal(error: BaseException) -> Fatal:
    """What the other side is told of an error that ends the engine, in one line."""
    if isinstance(error, MotetError):
        return Fatal(str(error), error.code)
    return Fatal(f"the engine failed: {type(error).__name__}: {error}", EngineDead.code)


def _reply(call: int, send: Send, action: Callable[[], None]) -> None:
    try:
        action()
    except MotetError as error:
        send(Reply(call, error=str(error), code=error.code))
    except OSError as error:  # of an image that has left the disk since it was prepared
        send(Reply(call, error=str(error), code=MotetError.code))
    else:
        send(Reply(call))


def _send_outputs(outputs: list[SeqOutput], send: Send) -> None:
    if outputs:
        send(Outputs(tuple(outputs)))


def main() -> int:
    """Entry point of the child process."""
    config = msgspec.json.decode(sys.argv[1], type=EngineConfig)
    stream = socket.socket(fileno=int(sys.argv[2]))
    # Supervisors signal every process of a service at once. The server decides when the engine leaves, after the
    # work in flight; should the server be gone, the socket ends and so does the engine.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def send(message: Message) -> None:
        stream.sendall(frame(message))

    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(stream, inbox), name="motet-inbox", daemon=True).start()
    try:
        engine = Engine(
            config,
            lambda stage, fraction: send(Progress(stage, fraction)),
            lambda: inbox.put(Wake()),
            lambda digest, source: inbox.put(Missing(digest, source)),
        )
        send(Ready(engine.spec, engine.runner.pool.page_bytes, engine.max_model_len))
        serve(engine, inbox, send)
    except (BrokenPipeError, ConnectionResetError):
        return 0
    except MotetError as error:
        send(fatal(error))
        return 1
    except BaseException as error:
        send(fatal(error))
        raise
    return 0


def _read(stream: socket.socket, inbox: Inbox) -> None:
    """Move messages from the socket to the inbox; the server's end closing is the last message."""
    try:
        while (message := read_inbound(stream)) is not None:
            inbox.put(message)
    finally:
        inbox.put(None)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Skip interpreter teardown: native thread pools can take a second to join, and nothing is left to save.
    os._exit(code)
