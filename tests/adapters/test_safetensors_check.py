from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from motet.adapters import checkpoint
from motet.adapters.checkpoint import load_checkpoint
from motet.adapters.safetensors_check import (
    WEIGHTS_NAME,
    max_header_bytes,
    open_regular,
    read_data,
    read_header,
)
from motet.errors import AdapterRefused
from tests.adapters.peft_files import WEIGHTS, q_tensors, spec_of, split_file, write_adapter
from tests.adapters.peft_files import raw_safetensors as raw

LLAMA = spec_of("llama")


def tensor(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


def check(tmp_path: Path, content: bytes, max_tensors: int = 42) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with open_regular(tmp_path / WEIGHTS) as file:
        read_data(file, read_header(file, max_tensors))


def test_reads_what_the_library_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(7, 5, generator=generator),
        "b": torch.randn(3, 1, 2, generator=generator).bfloat16(),
        "c": torch.randn(11, generator=generator).half(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt", "note": "[]{},"})
    with open_regular(tmp_path / WEIGHTS) as file:
        header = read_header(file, 5)
        data = read_data(file, header)
    expected = load_file(tmp_path / WEIGHTS)
    assert data.keys() == expected.keys()
    for name, one in expected.items():
        assert data[name].dtype == one.dtype
        assert torch.equal(data[name], one)


def test_odd_alignment(tmp_path: Path) -> None:
    """The format allows a float32 to begin at any byte."""
    half, full = torch.tensor([1.5], dtype=torch.float16), torch.tensor([2.0, -3.0])
    header = {"h": tensor(0, 2, [1], "F16"), "f": tensor(2, 10)}
    (tmp_path / WEIGHTS).write_bytes(raw(header, half.numpy().tobytes() + full.numpy().tobytes()))
    with open_regular(tmp_path / WEIGHTS) as file:
        data = read_data(file, read_header(file, 2))
    assert torch.equal(data["f"], full)
    assert torch.equal(data["h"], half)


BAD = {
    "empty file": (b"", "0 bytes long, too short"),
    "no header": (b"\x01\0\0\0", "4 bytes long, too short"),
    "short of its header": (raw(b"{}", length=100), "10 bytes long, shorter than its header of 100"),
    "huge header": (raw(b"{}", length=1 << 62), "a header of 4611686018427387904 bytes"),
    "no object": (raw(b"[]"), "the header is not a JSON object"),
    "not JSON": (raw(b"{]"), "the header is not valid JSON"),
    "not UTF-8": (raw(b'{"\xff":1}'), "the header is not valid JSON"),
    "deep": (raw(b'{"a":' + b"[" * 100), "tensor 'a'|lists more than|not valid JSON"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__ is not an object of strings"),
    "entry": (raw({"a": 1}), "tensor 'a' must have exactly dtype, shape and data_offsets"),
    "extra key": (raw({"a": {**tensor(0, 4), "x": 1}}, bytes(4)), "tensor 'a' must have exactly"),
    "dtype": (raw({"a": tensor(0, 4, [1], "I32")}, bytes(4)), "tensor 'a' has dtype 'I32'; supported: BF16"),
    "float64": (raw({"a": tensor(0, 8, [1], "F64")}, bytes(8)), "tensor 'a' has dtype 'F64'"),
    "dtype type": (raw({"a": {**tensor(0, 4), "dtype": ["F32"]}}, bytes(4)), "tensor 'a' has dtype"),
    "wrong dtype": (raw({"a": tensor(0, 4, [1], "BF16")}, bytes(4)), "BF16 .* cannot lie in bytes"),
    "negative": (raw({"a": tensor(-4, 0)}), "tensor 'a' has no valid data_offsets"),
    "backwards": (raw({"a": tensor(4, 0, [0])}, bytes(4)), "tensor 'a' .* cannot lie in"),
    "three offsets": (raw({"a": {**tensor(0, 4), "data_offsets": [0, 4, 4]}}, bytes(4)), "data_offsets"),
    "true": (raw({"a": {**tensor(0, 4), "shape": [True]}}, bytes(4)), "'a' has no valid shape"),
    "float shape": (raw({"a": {**tensor(0, 4), "shape": [1.0]}}, bytes(4)), "'a' has no valid shape"),
    "large shape": (raw({"a": tensor(0, 4, [1 << 41, 0])}, bytes(4)), "'a' has no valid shape"),
    "overflow": (raw({"a": tensor(0, 4, [1 << 33, 1 << 33])}, bytes(4)), "'a' .* cannot lie"),
    "many dimensions": (raw({"a": tensor(0, 4, [1] * 9)}, bytes(4)), "'a' has no valid shape"),
    "overlap": (raw({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), "tensor 'b' .* overlaps"),
    "same place": (raw({"a": tensor(0, 8), "b": tensor(0, 8)}, bytes(8)), "tensor 'b' .* overlaps"),
    "hole": (raw({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)), "'b' .* leaves a hole"),
    "first hole": (raw({"a": tensor(4, 8)}, bytes(8)), "tensor 'a' .* leaves a hole"),
    "trailing": (raw({"a": tensor(0, 4)}, bytes(5)), "1 trailing bytes"),
    "short": (raw({"a": tensor(0, 40)}, bytes(39)), "39 bytes of data, the header promises 40"),
    "duplicate": (
        raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":'
                        b'{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
        "the key 'a' occurs twice",
    ),
    "duplicate inside": (
        raw(b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "the key 'shape' occurs twice",
    ),
    "too many": (raw({f"t{i}": tensor(4 * i, 4 * i + 4) for i in range(43)}, bytes(172)), "43 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_are_refused(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    with fast_and_small(), pytest.raises(AdapterRefused, match=rf"^{WEIGHTS_NAME}: .*({message})"):
        check(tmp_path, content)


@contextmanager
def fast_and_small() -> Iterator[None]:
    """At most a second and 50 MB more memory."""
    tracemalloc.start()
    try:
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < 1
    assert peak < 50 << 20


def rows(count: int, name: bytes = b"base_model.model.model.layers.%d.lora_A.weight") -> bytes:
    """A header of `count` empty tensors; all have one name if there is no number in it."""
    row = b'"%s":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' % name
    return raw(b"{" + b"".join(row % i if b"%" in row else row for i in range(count))[:-1] + b"}")


def padded(token: bytes) -> bytes:
    """A header of nearly 1 MiB, the least that is allowed, of one token over and over."""
    count = ((1 << 20) - 16) // len(token)
    return raw(b'{"a":[' + token * count + b"0]}")


@pytest.mark.parametrize(
    "content",
    [
        rows(1_000_000),
        rows(1_000_000, b"x"),
        rows(43),
        rows(2, b"x"),
        padded(b"[],"),
        padded(b"{},"),
        padded(b"1,"),
        padded(b'"",'),
        padded(b"["),
        raw(b"{", b"", 9),
        raw({"a": tensor(0, 1 << 40)}, bytes(1 << 20)),
        raw({"a": tensor(0, 1 << 20), "b": tensor(1, 1 + (1 << 20))}, bytes((1 << 20) + 1)),
        raw({"a": tensor(0, 4), "b": tensor(1 << 20, (1 << 20) + 4)}, bytes((1 << 20) + 4)),
        raw({"a": tensor(0, 4)}, bytes(1 << 20)),
    ],
    ids=[
        "a million tensors", "a million times one", "a tensor more", "one twice", "lists", "objects", "numbers",
        "strings", "depth", "cut", "short", "overlap", "hole", "trailing",
    ],
)  # fmt: skip
def test_refused_fast_and_small(tmp_path: Path, content: bytes) -> None:
    write_adapter(tmp_path, q_tensors())
    (tmp_path / WEIGHTS).write_bytes(content)
    with fast_and_small(), pytest.raises(AdapterRefused):
        load_checkpoint(tmp_path, LLAMA)


def test_the_header_s_cap_follows_from_the_tensors_expected() -> None:
    assert [max_header_bytes(count) for count in (0, 1000, 1001, 5000)] == [
        1 << 20,
        1 << 20,
        1049624,
        5 << 20,
    ]


def test_a_file_larger_than_any_adapter_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest has rank 512 in every map, in fp32."""
    path = write_adapter(tmp_path, q_tensors()) / WEIGHTS
    most = 8 + (1 << 20) + 4 * 512 * sum(site.in_features + site.out_features for site in LLAMA.sites)
    os.truncate(path, most)
    with pytest.raises(AdapterRefused, match="trailing bytes"):
        load_checkpoint(tmp_path, LLAMA)
    monkeypatch.setattr(checkpoint, "read_header", lambda *_: pytest.fail("the header was read"))
    for size in (most + 1, 64 << 30):
        os.truncate(path, size)
        message = f"{WEIGHTS_NAME}: {size} bytes long; no adapter of this base needs more than {most}"
        with fast_and_small(), pytest.raises(AdapterRefused, match=message):
            load_checkpoint(tmp_path, LLAMA)


def test_wrong_names_are_refused_before_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path, q_tensors())
    (tmp_path / WEIGHTS).write_bytes(raw({"x": tensor(0, 4)}, bytes(4)))
    monkeypatch.setattr(checkpoint, "read_data", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(AdapterRefused, match="unknown tensor 'x'"):
        load_checkpoint(tmp_path, LLAMA)


def test_long_names_are_refused(tmp_path: Path) -> None:
    """They are matched with the config's patterns."""
    check(tmp_path, raw({"x" * 1024: tensor(0, 4)}, bytes(4)))
    wrapped = "base_model.model.x" + ".base_layer" * 90_000 + ".lora_A.weight"
    with fast_and_small(), pytest.raises(AdapterRefused, match="a name of 990032 characters, more than 1024"):
        check(tmp_path, raw({wrapped: tensor(0, 4)}, bytes(4)))


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    write_adapter(tmp_path, q_tensors())
    (tmp_path / WEIGHTS).unlink()
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(AdapterRefused, match="not a regular file"):
        load_checkpoint(tmp_path, LLAMA)


def test_a_file_that_shrinks_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, q_tensors(rank=100))  # larger than the buffer of a file
    with open_regular(tmp_path / WEIGHTS) as file:
        header = read_header(file, 2)
        os.truncate(tmp_path / WEIGHTS, 1000)
        with pytest.raises(AdapterRefused, match="became shorter"):
            read_data(file, header)


def test_long_names_are_cut_and_escaped(tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused) as caught:
        check(tmp_path, raw({"\n\x1b[31m" + "x" * 10_000: 1}))
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_spaces_after_the_header_are_padding(tmp_path: Path) -> None:
    write_adapter(tmp_path, q_tensors())
    first = load_checkpoint(tmp_path, LLAMA)
    header, data = split_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).write_bytes(raw(header + b" " * 64, data))
    assert load_checkpoint(tmp_path, LLAMA).digest == first.digest
