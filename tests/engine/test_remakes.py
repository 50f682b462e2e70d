"""The server's side of images that are made again: one at a time, and not for ever."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from motet.engine import client as module
from motet.engine.client import EngineClient
from motet.engine.messages import Message, Missing, Remade
from motet.types import PreparedAdapter, TierStats


class Client(EngineClient):
    """One whose engine is this test."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: asyncio.Queue[Message] = asyncio.Queue()

    def _send(self, message: Message) -> None:
        self.answers.put_nowait(message)

    async def close(self) -> None:
        pass

    async def remake(self, digest: str, source: str) -> Remade:
        self._dispatch(Missing(digest, source))
        answer = await asyncio.wait_for(self.answers.get(), 10)
        assert isinstance(answer, Remade)
        return answer


class Share:
    """A disk on which one source hangs."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.comes_back = threading.Event()

    def __call__(self, source: Path) -> PreparedAdapter:
        self.asked.append(source.name)
        if source.name == "hangs":
            assert self.comes_back.wait(10)
        return PreparedAdapter(
            digest=source.name, image="", rank=1, num_parameters=1, num_pages=1, size_bytes=1
        )

    def stats(self) -> TierStats:
        return TierStats()


def test_a_source_that_hangs_is_given_up_and_holds_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        client, share = Client(), Share()
        client.use_disk(share)
        assert await client.remake("fine", "/fine") == Remade("fine", None)
        monkeypatch.setattr(module, "REMAKE_SECONDS", 0.05)
        late = await client.remake("hangs", "/hangs")
        assert (late.digest, late.error) == (
            "hangs",
            "its image has left the disk, and was not made again in 0.05 seconds",
        )
        assert (await client.remake("next", "/next")).error == late.error
        assert share.asked == ["fine", "hangs"]
        monkeypatch.setattr(module, "REMAKE_SECONDS", 10.0)
        share.comes_back.set()
        assert await client.remake("hangs", "/hangs") == Remade("hangs", None)
        assert client.answers.empty(), "late answers are nobody's"

    asyncio.run(main())
