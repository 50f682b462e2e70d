"""The real server as a subprocess, its engine another process behind it: what an operator starts, for tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

START_SECONDS = 120.0
STOP_SECONDS = 60.0
_SERVING = re.compile(r"serving on (http://\S+)/v1")
_SAMPLE = re.compile(r"^(\S+) (\S+)$", re.MULTILINE)


@dataclass
class LiveServer:
    """A server that is up. `log` grows with the lines of its standard error; `key` is what it is asked with."""

    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    url: str = ""
    key: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def engine_pid(self) -> int:
        """The server's one child."""
        lists = Path(f"/proc/{self.pid}/task").glob("*/children")
        (child,) = {int(pid) for children in lists for pid in children.read_text().split()}
        return child

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers, timeout=30)

    def post(self, path: str, body: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=self.headers, timeout=60)

    def samples(self) -> dict[str, float]:
        """What /metrics says, by series."""
        return {name: float(value) for name, value in _SAMPLE.findall(self.get("/metrics").text)}

    def is_idle(self) -> bool:
        """Nothing runs or waits, and every page is free, holds an adapter or may be taken at any time."""
        now = self.samples()
        pages = {
            use: now[f'motet_pool_pages{{use="{use}"}}'] for use in ("total", "free", "cached", "adapter")
        }
        unused = pages["free"] + pages["cached"] + pages["adapter"]
        return (
            now["motet_requests_running"] == now["motet_requests_waiting"] == 0 and unused == pages["total"]
        )

    def wait(self) -> int:
        """The exit status, once the server has left."""
        status = self.process.wait(STOP_SECONDS)
        assert not (still := [line for line in self.log if "Traceback" in line]), still
        return status


@contextmanager
def live_server(
    model: Path, adapters: Mapping[str, Path], cache: Path, *options: str, stop: bool = True
) -> Iterator[LiveServer]:
    """Start `motet serve`, wait until it is ready, and end it with SIGTERM, to which it must answer with 0.

    With `stop` false the test ends the server itself; it is made sure only that nothing is left of it.
    """
    named = [f"--adapter={name}={path}" for name, path in adapters.items()]
    # One thread: the matrices are tiny, and the test's own process needs a core too.
    command = [sys.executable, "-m", "motet.cli.main", "serve", str(model), "--port=0", "--threads=1", *named]
    environment = {**os.environ, "MOTET_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        server = LiveServer(process)
        reader = threading.Thread(target=_read, args=(server,))
        reader.start()
        try:
            until(lambda: bool(server.url) or process.poll() is not None, START_SECONDS)
            assert server.url, f"the server did not start: {server.log}"
            assert server.get("/ready").status_code == 200
            yield server
            if stop:
                process.send_signal(signal.SIGTERM)
                assert server.wait() == 0
        finally:
            process.kill()
            process.wait(STOP_SECONDS)
            reader.join()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for `condition`, and fail if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing came in {seconds:.0f} s"
        time.sleep(0.02)


def _read(server: LiveServer) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.log.append(line.rstrip())
        if found := _SERVING.search(line):
            server.url = found[1]
