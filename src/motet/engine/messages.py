"""What crosses the socket between server and engine process: length-prefixed msgpack, never pickle."""

from __future__ import annotations

import asyncio
import queue
import socket
import struct

import msgspec

from motet import errors
from motet.errors import MotetError
from motet.types import EngineStats, ModelSpec, Request, SeqOutput

HEADER = struct.Struct("<I")
MAX_MESSAGE = 1 << 28


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the class name is the tag on the wire."""


class Submit(Message, frozen=True):
    """Server → engine: new requests."""

    requests: tuple[Request, ...]


class Abort(Message, frozen=True):
    """Server → engine: end these requests."""

    ids: tuple[str, ...]


class Register(Message, frozen=True):
    """Server → engine: an adapter's packed image is at `image`; the directory `source` is what it was made from."""

    call: int
    digest: str
    image: str
    num_pages: int
    source: str = ""


class Remade(Message, frozen=True):
    """Server → engine: the answer to Missing; `error` is why the image cannot be made again."""

    digest: str
    error: str | None = None


class Forget(Message, frozen=True):
    """Server → engine: no name points at this adapter any more."""

    call: int
    digest: str


class Prefetch(Message, frozen=True):
    """Server → engine: load this adapter soon, if there is room that nobody wants."""

    call: int
    digest: str


class Pin(Message, frozen=True):
    """Server → engine: never evict this adapter, or do so again."""

    call: int
    digest: str
    pinned: bool


class GetStats(Message, frozen=True):
    """Server → engine: answer with a Reply that carries stats."""

    call: int


class Shutdown(Message, frozen=True):
    """Server → engine: leave."""


class Progress(Message, frozen=True):
    """Engine → server: a stage of starting, `fraction` of the whole start done."""

    stage: str
    fraction: float


class Ready(Message, frozen=True):
    """Engine → server: warm and serving."""

    spec: ModelSpec
    page_bytes: int
    max_model_len: int


class Missing(Message, frozen=True):
    """Engine → server: a request waits for an adapter whose image is not on disk; make it again from `source`."""

    digest: str
    source: str


class Outputs(Message, frozen=True):
    """Engine → server: what a step gave."""

    outputs: tuple[SeqOutput, ...]


class Reply(Message, frozen=True):
    """Engine → server: the answer to call `call`; a failed one has the message and the code of its error."""

    call: int
    error: str | None = None
    code: str | None = None
    stats: EngineStats | None = None


class Fatal(Message, frozen=True):
    """Engine → server: the engine cannot go on."""

    error: str
    code: str


Inbound = Submit | Abort | Register | Remade | Forget | Prefetch | Pin | GetStats | Shutdown


class Wake:
    """Never on the wire: the pager tells the loop that a load has ended."""


Inbox = queue.SimpleQueue[Inbound | Missing | Wake | None]
"""What the engine's loop reads; None is the end. Missing comes from a step, to be sent on."""

Outbound = Progress | Ready | Outputs | Missing | Reply | Fatal

_ERRORS: dict[str, type[MotetError]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, MotetError)
}


def typed_error(message: str, code: str | None) -> MotetError:
    """An error that came over the wire, of its own class again."""
    return _ERRORS.get(code or "", MotetError)(message)


_encoder = msgspec.msgpack.Encoder()
_inbound = msgspec.msgpack.Decoder(Inbound)
_outbound = msgspec.msgpack.Decoder(Outbound)


def frame(message: Message) -> bytes:
    """A message as it travels: 4 bytes of length, then msgpack."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


def read_inbound(stream: socket.socket) -> Inbound | None:
    """Block for the next message to the engine; None when the server has gone."""
    header = _read_exactly(stream, HEADER.size)
    if header is None:
        return None
    body = _read_exactly(stream, _length(header))
    return None if body is None else _inbound.decode(body)


async def read_outbound(stream: asyncio.StreamReader) -> Outbound:
    """The next message from the engine; raises asyncio.IncompleteReadError when it has gone."""
    header = await stream.readexactly(HEADER.size)
    message: Outbound = _outbound.decode(await stream.readexactly(_length(header)))
    return message


def _length(header: bytes) -> int:
    (length,) = HEADER.unpack(header)
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes exceeds {MAX_MESSAGE}")
    return int(length)


def _read_exactly(stream: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = stream.recv(min(count - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)
