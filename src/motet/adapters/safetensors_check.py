"""Reads a safetensors file that somebody else made; everything is checked before a byte of weights is read.

    8 bytes   N, little-endian
    N bytes   JSON, space-padded: {name: {"dtype", "shape", "data_offsets": [start, end]},
              "__metadata__": {str: str}}
    the rest  data, which the tensors tile without overlap, hole or remainder

The header is bounded by what the base can use (1 MiB per 1,000 tensors), and so are its brackets and commas
before it is parsed: 1 MiB of `[],[],…` would become 25 MB of Python lists. One open file serves header and
data, read once into our own memory, so the bytes that were checked are the bytes that are used, whatever
happens to the file.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from motet.adapters.peft_config import no_constant, show, unique_keys
from motet.errors import AdapterRefused

WEIGHTS_NAME = "adapter_model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MIN_HEADER_BYTES = 1 << 20
MAX_DIMENSION = 1 << 40
MAX_DIMENSIONS = 8
MAX_NAME = 1024  # names are matched against patterns in polynomial time; real ones stay below 150
SPARE = 64  # brackets and commas beyond the tensors' own: metadata

_ENTRY = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the header declares it; [start, end) are its bytes in the data part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def __str__(self) -> str:
        return show(self.name)

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def refused(reason: str) -> AdapterRefused:
    """The error for a fault in the weights file."""
    return AdapterRefused(f"{WEIGHTS_NAME}: {reason}")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. AdapterRefused names it when it is missing, special or unreadable.

    Symbolic links are followed: in the Hugging Face cache every file of a snapshot is a link to a blob
    outside the snapshot's directory. Which roots may be read at all is decided where the path comes in.
    """
    try:
        # a FIFO opened without O_NONBLOCK would wait for a writer for ever
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        raise AdapterRefused(f"{path.name}: missing") from None
    except (OSError, ValueError) as error:
        raise AdapterRefused(f"{path.name}: cannot be read: {error}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise AdapterRefused(f"{path.name}: not a regular file")
    return file


def max_header_bytes(max_tensors: int) -> int:
    """The longest header that `max_tensors` tensors may need."""
    return max(MIN_HEADER_BYTES, max_tensors * (1 << 20) // 1000)


def check_size(file: BufferedReader, max_data: int, max_tensors: int) -> None:
    """AdapterRefused if the file is larger than `max_data` bytes of weights in `max_tensors` tensors can need."""
    total = os.fstat(file.fileno()).st_size
    most = 8 + max_header_bytes(max_tensors) + max_data
    if total > most:
        raise refused(f"{total} bytes long; no adapter of this base needs more than {most}")


def read_header(file: BufferedReader, max_tensors: int) -> list[TensorInfo]:
    """Read and check the header from the start of `file`, which is left at the first byte of data.

    Returns the tensors in the order of their data, without holes or overlaps. AdapterRefused names what is
    wrong.
    """
    total = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise refused(f"{total} bytes long, too short for a header")
    length = int.from_bytes(prefix, "little")
    if length > max_header_bytes(max_tensors):
        raise refused(
            f"a header of {length} bytes; {max_tensors} tensors need at most {max_header_bytes(max_tensors)}"
        )
    if length > total - 8:
        raise refused(f"{total} bytes long, shorter than its header of {length}")
    tensors = _parse(file.read(length), max_tensors)
    _check_tiling(tensors, total - 8 - length)
    return tensors


def read_data(file: BufferedReader, tensors: list[TensorInfo]) -> dict[str, Tensor]:
    """Read the data of all tensors, once. `file` is where `read_header` left it. Raw dtypes, contiguous."""
    size = tensors[-1].end if tensors else 0
    try:
        buffer = np.empty(size, np.uint8)
    except MemoryError:
        raise refused(f"{size} bytes of weights do not fit this machine's memory") from None
    view = buffer.data
    done = 0
    while done < size:
        count = file.readinto(view[done:])
        if not count:
            raise refused("became shorter while it was read")
        done += count
    data = torch.from_numpy(buffer)
    return {info.name: _view(data, info) for info in tensors}


def _view(data: Tensor, info: TensorInfo) -> Tensor:
    dtype = DTYPES[info.dtype]
    piece = data[info.start : info.end]
    if info.start % dtype.itemsize:
        piece = piece.clone()  # the format asks for no alignment, a view does
    return piece.view(dtype).view(info.shape)


def _parse(header: bytes, max_tensors: int) -> list[TensorInfo]:
    if not header.startswith(b"{"):
        raise refused("the header is not a JSON object")
    limits = {b"{": max_tensors + SPARE, b"[": 2 * max_tensors + SPARE, b",": 8 * max_tensors + SPARE}
    for token, limit in limits.items():
        if header.count(token) > limit:
            raise refused(f"the header lists more than the {max_tensors} tensors possible")
    try:
        entries = json.loads(header.decode(), object_pairs_hook=unique_keys, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise refused(f"the header is not valid JSON: {error}") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refused("__metadata__ is not an object of strings")
    tensors = [_entry(name, entry) for name, entry in entries.items()]
    if len(tensors) > max_tensors:
        raise refused(f"{len(tensors)} tensors; at most {max_tensors} are possible")
    return sorted(tensors, key=lambda info: (info.start, info.end, info.name))


def _entry(name: str, entry: object) -> TensorInfo:
    if len(name) > MAX_NAME:
        raise refused(f"tensor {show(name)} has a name of {len(name)} characters, more than {MAX_NAME}")
    if not isinstance(entry, dict) or set(entry) != _ENTRY:
        raise refused(f"tensor {show(name)} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], _numbers(entry["shape"]), _numbers(entry["data_offsets"])
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refused(f"tensor {show(name)} has dtype {show(dtype)}; supported: {', '.join(DTYPES)}")
    if shape is None or len(shape) > MAX_DIMENSIONS:
        raise refused(f"tensor {show(name)} has no valid shape: {show(entry['shape'])}")
    if offsets is None or len(offsets) != 2:
        raise refused(f"tensor {show(name)} has no valid data_offsets: {show(entry['data_offsets'])}")
    info = TensorInfo(name, dtype, shape, *offsets)
    if info.end - info.start != info.size * DTYPES[dtype].itemsize:
        raise refused(
            f"tensor {info} of {dtype} {list(shape)} cannot lie in bytes [{info.start}, {info.end})"
        )
    return info


def _numbers(value: object) -> tuple[int, ...] | None:
    """A list of sizes as a tuple; None if it is anything else."""
    if not isinstance(value, list):
        return None
    if not all(type(item) is int and 0 <= item <= MAX_DIMENSION for item in value):
        return None
    return tuple(value)


def _check_tiling(tensors: list[TensorInfo], size: int) -> None:
    """The tensors, ordered by start, cover the data exactly."""
    at = 0
    for info in tensors:
        if info.start != at:
            fault = "overlaps the tensor before it" if info.start < at else "leaves a hole before it"
            raise refused(f"tensor {info} at byte {info.start} {fault}, which ends at {at}")
        at = info.end
    if at > size:
        raise refused(f"{size} bytes of data, the header promises {at}")
    if at < size:
        raise refused(f"{size - at} trailing bytes that belong to no tensor")
