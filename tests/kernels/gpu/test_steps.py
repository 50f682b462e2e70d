"""Whole steps as a GPU runs them, against transformers + PEFT: prefill with single tokens among it, then decode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

from motet.adapters.checkpoint import load_checkpoint
from motet.adapters.gpu_table import GpuTable
from motet.adapters.image import pack
from motet.engine.gpu_inputs import StepBuilder
from motet.engine.gpu_shapes import cut
from motet.kernels.gpu.kv_write import rotary_kv_write
from motet.layers import gpu
from motet.layers.gpu import GpuDevice, copies_bytes, with_copies
from motet.layers.mlp import SparseMLP
from motet.memory.pool import Pool
from motet.models.registry import load_model, load_spec
from motet.types import BASE, Chunk, Plan
from tests.close import assert_close
from tests.formats import FAMILIES, write_all
from tests.models.test_deepseek import change_config, change_weights, in_eight_bits, in_full
from tests.parity import reference_logits
from tests.tiny import VOCAB, write_model

LENGTHS = (1, 9, 19, 5, 7, 8, 5, 7, 6, 9, 4)
PAGE_TOKENS = 8
INTERPRETED = ["qwen3-moe", "gpt-oss", "deepseek-v2-lite", "deepseek-v3"]


@pytest.mark.parametrize("kind", FAMILIES if torch.cuda.is_available() else INTERPRETED)
def test_steps_match_peft(kind: str, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, which the interpreter gets right; every format of adapters in one batch."""
    layers = {} if device == "cuda" else {"num_hidden_layers": 2}  # the interpreter takes a minute for each
    model = write_model(tmp_path / "model", kind, **layers)
    spec = load_spec(model)
    pool = Pool(spec, 32 << 20, PAGE_TOKENS, kv_dtype=torch.float32, device=device)
    decoder = load_model(model, spec, 256, device=GpuDevice(torch.device(device), torch.float32)).decoder
    table = GpuTable(len(spec.sites), pool.flat, pool.page_bytes, torch.float32)
    builder = StepBuilder(pool, table, 256, spec.num_heads, 16)
    adapters: list[Path | None] = [None, *write_all(tmp_path, model, kind, refused=False).values()]
    digests, page = [BASE], 100
    for adapter in filter(None, adapters):
        image = pack(load_checkpoint(adapter, spec), pool.page_bytes)
        pages = tuple(range(page, page + image.num_pages))
        page += image.num_pages
        for there in pool.fill(pages, [image.pages]):
            there.synchronize()
        table.add(image.digest, image.chunks, pages)
        digests.append(image.digest)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(2, VOCAB, (n + 1,), generator=generator).tolist() for n in LENGTHS[: len(adapters)]
    ]
    free = iter(range(100))
    tables = [tuple(tuple(next(free) for _ in range(3)) for _ in spec.kv_groups) for _ in prompts]

    def check(chunks: list[Chunk], logits: torch.Tensor) -> None:
        for row, chunk in zip(logits, chunks, strict=True):
            known = prompts[chunk.seq][: chunk.start + len(chunk.tokens)]
            assert_close(
                row.cpu(), reference_logits(model, kind, adapters[chunk.seq], known)[-1], relative=1e-4
            )

    with torch.inference_mode():
        many = [Chunk(i, tuple(p[:-1]), 0, tables[i], digests[i], True) for i, p in enumerate(prompts)]
        chunks = builder.ordered(Plan(chunks=tuple(many)))
        if kind == "gpt-oss":  # the one with four-bit experts: prompts also, here only, through their copies
            copied = with_copies(decoder)
            assert copies_bytes(decoder) == sum(t.nbytes for t in tensors(copied)) - sum(
                t.nbytes for t in tensors(decoder)
            )
            with monkeypatch.context() as patch:
                patch.setattr(gpu, "COPIES_FROM", 8)
                check(chunks, copied(builder.batch(chunks, pdl=False)))
        if device == "cuda" or kind not in ("qwen3-moe", "gpt-oss"):
            check(chunks, decoder(builder.batch(chunks, pdl=False)))
        if device == "cuda" or kind == "qwen3-moe":  # the tensors of a captured step, with padding everywhere
            staging, groups = builder.prompts(192), len(spec.kv_groups)
            for array in staging.host.values():
                array[:] = 77
            builder.fill(cut(staging.host, builder.room(128), groups), builder.arrange(chunks))
            staging.upload()
            batch = builder.prompt_batch(staging, 128, True, builder.idle(chunks), pdl=False)
            check(chunks, decoder(batch)[: len(chunks)])
        single = [Chunk(i, (p[-1],), len(p) - 1, tables[i], digests[i], True) for i, p in enumerate(prompts)]
        chunks = builder.ordered(Plan(chunks=tuple(single)))
        staging = builder.captured(16)
        # gpt-oss's few rows are rotated and written by the product that gives them.
        monkeypatch.setattr(gpu, "rotary_kv_write", None if kind == "gpt-oss" else rotary_kv_write)
        plain = [one for one in chunks if builder.idle([one])]  # no router is adapted
        for some in (chunks, plain) if device == "cuda" or kind == "qwen3-moe" else (chunks,):
            builder.fill_decode(staging, some)
            staging.upload()
            batch = builder.decode_batch(staging, True, builder.idle(some), pdl=False)
            check(some, decoder(batch)[: len(some)])


def tensors(part: object) -> Iterator[torch.Tensor]:
    """All tensors of a tree of dataclasses, in their order."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, list | tuple):
        for one in part:
            yield from tensors(one)
    elif is_dataclass(part):
        for field in fields(part):
            yield from tensors(getattr(part, field.name))


def test_eight_bit_weights_become_bfloat16_and_vectors_are_not_rounded(tmp_path: Path, device: str) -> None:
    small, full = (write_model(tmp_path / name, "deepseek-v3") for name in ("small", "full"))
    block, bias = (16, 9), 5 + torch.arange(12) * 2**-12

    def changed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: bias.clone() if name.endswith("correction_bias") else one for name, one in weights.items()
        }

    change_weights(small, lambda weights: in_eight_bits(changed(weights), block))
    change_weights(full, lambda weights: in_full(in_eight_bits(changed(weights), block), block))
    change_config(small, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    decoders = [
        load_model(model, load_spec(model), 64, device=GpuDevice(torch.device(device))).decoder
        for model in (small, full)
    ]
    found = list(zip(*(tensors(decoder) for decoder in decoders), strict=True))
    assert len(found) > 40
    for one, other in found:
        assert one.dtype in (torch.bfloat16, torch.float32)
        assert one.device.type == device
        assert torch.equal(one, other)
    mlp = decoders[0].layers[2].mlp
    assert isinstance(mlp, SparseMLP)
    assert mlp.rule.bias is not None
    assert torch.equal(mlp.rule.bias.cpu(), bias)
