"""Every adapter format for every family: what `tests/test_formats.py` proves and docs/models.md says.

`python -m tests.formats` prints docs/models.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from motet.models.registry import ARCHITECTURES, load_spec
from motet.types import FusedExperts, ModelSpec
from tests.tiny import KINDS, load_reference, write_adapter

MLP = ("gate_proj", "up_proj", "down_proj")
GROUPED = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@dataclass(frozen=True)
class Family:
    """What PEFT can target in a family: linear maps of attention and MLP, parameters of experts and router."""

    title: str
    attention: tuple[str, ...] = GROUPED
    mlp: tuple[str, ...] = MLP
    experts: str = ""
    router: str = ""


FAMILIES = {
    "llama": Family("Llama 2, 3; SmolLM2"),
    "mistral": Family("Mistral"),
    "ministral": Family("Ministral"),
    "qwen3": Family("Qwen3"),
    "qwen3-moe": Family("Qwen3-MoE", experts="mlp.experts", router="mlp.gate.weight"),
    "mixtral": Family("Mixtral", mlp=(), experts="mlp.experts", router="mlp.gate.weight"),
    "gpt-oss": Family("GPT-OSS", mlp=(), experts="mlp.experts", router="mlp.router.weight"),
    "deepseek-v2-lite": Family(
        "DeepSeek V2-Lite", ("q_proj", *LATENT), experts="mlp.experts", router="mlp.gate.weight"
    ),
    "deepseek-v2": Family(
        "DeepSeek V2", ("q_a_proj", "q_b_proj", *LATENT), experts="mlp.experts", router="mlp.gate.weight"
    ),
    "deepseek-v3": Family(
        "DeepSeek V3", ("q_a_proj", "q_b_proj", *LATENT), experts="mlp.experts", router="mlp.gate.weight"
    ),
    "llama4": Family("Llama 4 (text)", experts="feed_forward.experts", router="feed_forward.router.weight"),
}
"""By the key of tests.tiny.KINDS."""

Writer = Callable[[Path, Path, str], Path | None]


@dataclass(frozen=True)
class Format:
    """A way to write adapters. `write(folder, model, kind)` writes one, or gives None where a family has no such thing.

    `refused` is part of the message with which it is refused; None: it is served.
    """

    title: str
    write: Writer
    refused: str | None = None


def _peft(title: str, refused: str | None = None, **config: Any) -> Format:
    """Written by PEFT on the attention's query map, with this config."""

    def write(folder: Path, model: Path, kind: str) -> Path:
        targets = {"target_modules": [FAMILIES[kind].attention[0]], "r": 4, "lora_alpha": 6}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT on a bias of B beside a map without one
            return write_adapter(folder, model, kind, len(title), **{**targets, **config})

    return Format(title, write, refused)


def _attention(folder: Path, model: Path, kind: str) -> Path:
    return write_adapter(
        folder, model, kind, 1, r=5, lora_alpha=9, target_modules=list(FAMILIES[kind].attention)
    )


def _mlp(folder: Path, model: Path, kind: str) -> Path | None:
    targets = list(FAMILIES[kind].mlp)
    return (
        write_adapter(folder, model, kind, 2, r=33, lora_alpha=8, target_modules=targets) if targets else None
    )


def _patterns(folder: Path, model: Path, kind: str) -> Path:
    first, *_, last = FAMILIES[kind].attention
    return write_adapter(
        folder, model, kind, 3, r=4, lora_alpha=4, target_modules=[first, last], use_rslora=True,
        rank_pattern={last: 9, f"layers.2.self_attn.{first}": 1}, alpha_pattern={first: 12},
    )  # fmt: skip


def _one_layer(folder: Path, model: Path, kind: str) -> Path:
    targets = list(FAMILIES[kind].attention)
    return write_adapter(
        folder, model, kind, 4, r=24, lora_alpha=8, target_modules=targets, layers_to_transform=[1]
    )


def _fused_experts(folder: Path, model: Path, kind: str) -> Path | None:
    experts = FAMILIES[kind].experts
    if not experts:
        return None
    parameters = [f"{experts}.gate_up_proj", f"{experts}.down_proj"]
    return write_adapter(
        folder, model, kind, 5, r=3, lora_alpha=5, target_modules=[], target_parameters=parameters
    )


def _router(folder: Path, model: Path, kind: str) -> Path | None:
    router = FAMILIES[kind].router
    if not router:
        return None
    return write_adapter(
        folder, model, kind, 6, r=2, lora_alpha=20, target_modules=[], target_parameters=[router]
    )


def _embeddings(folder: Path, model: Path, kind: str) -> Path:
    return write_adapter(
        folder, model, kind, 7, r=6, lora_alpha=4, target_modules=["embed_tokens", "lm_head"]
    )


def _single_experts(folder: Path, model: Path, kind: str) -> Path | None:
    return _expert_by_expert(folder, model, kind, shared=False)


def _shared_outer(folder: Path, model: Path, kind: str) -> Path | None:
    return _expert_by_expert(folder, model, kind, shared=True)


def _expert_by_expert(folder: Path, model: Path, kind: str, shared: bool) -> Path | None:
    """Random factors for each expert by itself, and `merged`: the base with them added, which PEFT cannot do.

    With `shared`, experts are stacked in 3-D tensors, A of gate and up and B of down being one for all.
    """
    spec = load_spec(model)
    if not spec.fused:
        return None
    generator, rank, scaling = torch.Generator().manual_seed(8), 3, 2.0
    reference = load_reference(model, kind)
    parameters = dict(reference.named_parameters())
    tensors: dict[str, Tensor] = {}
    for fused in (one for one in spec.fused if f"{one.path}.down_proj" in parameters):
        for module in ("gate", "up", "down"):
            sites = [s for s in spec.sites if (s.layer, s.module) == (fused.layer, module) and s.expert >= 0]
            a = torch.randn(len(sites), rank, sites[0].in_features, generator=generator) * 0.15
            b = torch.randn(len(sites), sites[0].out_features, rank, generator=generator) * 0.15
            if shared:
                a, b = (a, b[:1]) if module == "down" else (a[:1], b)
                path = f"base_model.model.{fused.path}.{module}_proj"
                tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = a, b
            else:
                for site in sites:
                    own = next(path for path in site.paths if path.startswith("model."))
                    path = f"base_model.model.{own}"
                    tensors[f"{path}.lora_A.weight"] = a[site.expert].contiguous()
                    tensors[f"{path}.lora_B.weight"] = b[site.expert].contiguous()
            _merge(parameters, fused, module, scaling * (b @ a))
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    names = sorted({name.split(".")[-3] for name in tensors})
    config = LoraConfig(r=rank, lora_alpha=int(rank * scaling), target_modules=names, task_type="CAUSAL_LM")
    config.save_pretrained(str(folder))
    reference.save_pretrained(folder / "merged")
    return folder


def _merge(parameters: dict[str, Any], fused: FusedExperts, module: str, delta: Tensor) -> None:
    """Add delta [E, out, in] to the parameter that holds `module` of all experts."""
    name = "down_proj" if module == "down" else "gate_up_proj"
    parameter = parameters[f"{fused.path}.{name}"].data
    outputs = parameter.transpose(1, 2) if fused.transposed else parameter
    if module != "down":
        second = int(module == "up")
        half = outputs.shape[1] // 2
        outputs = (
            outputs[:, second::2] if fused.interleaved else outputs[:, second * half : (second + 1) * half]
        )
    outputs += delta


def _with_base_weights(folder: Path, model: Path, kind: str) -> Path:
    """PEFT's own choice for adapters of embeddings: the base's weights beside them."""
    wrapped = get_peft_model(load_reference(model, kind), LoraConfig(r=2, target_modules=["lm_head"]))
    wrapped.save_pretrained(str(folder), save_embedding_layers=True)
    return folder


FORMATS = (
    Format("attention", _attention),
    Format("dense MLP, shared experts", _mlp),
    Format("rsLoRA, rank_pattern, alpha_pattern", _patterns),
    Format("some layers only", _one_layer),
    Format("all experts: PEFT's target_parameters", _fused_experts),
    Format("experts one by one", _single_experts),
    Format("experts stacked, outer factors shared", _shared_outer),
    Format("router", _router),
    Format("embed_tokens, lm_head", _embeddings),
    _peft("DoRA", "use_dora", use_dora=True),
    _peft("bias of B", "lora_bias", lora_bias=True),
    _peft("trained biases", "bias", bias="lora_only"),
    _peft("modules_to_save", "modules_to_save", modules_to_save=["norm"]),
    _peft("trained tokens", "trainable_token_indices", trainable_token_indices={"embed_tokens": [3, 5]}),
    Format("lm_head with the base's weights", _with_base_weights, "save_embedding_layers=False"),
)


def write_all(folder: Path, model: Path, kind: str, refused: bool) -> dict[Format, Path]:
    """An adapter of every format that the family has and that is served, or refused."""
    found = {}
    for number, format in enumerate(FORMATS):
        if (format.refused is not None) == refused:
            path = format.write(folder / f"format-{number}", model, kind)
            if path is not None:
                found[format] = path
    return found


def applies(format: Format, kind: str, spec: ModelSpec) -> bool:
    """Whether a family has what the format adapts."""
    family = FAMILIES[kind]
    needs: dict[Writer, object] = {_mlp: family.mlp, _router: family.router, _fused_experts: family.experts}
    if format.write in (_single_experts, _shared_outer):
        return bool(spec.fused)
    return bool(needs.get(format.write, True))


def document(specs: dict[str, ModelSpec]) -> str:
    """docs/models.md."""
    served = [format for format in FORMATS if format.refused is None]
    lines = [
        "# Models and adapter formats",
        "",
        "Generated by `python -m tests.formats`; every cell is a test (`tests/test_formats.py`): the adapter is",
        "written by PEFT where PEFT can write it, served in one batch with all others of its row, and its logits equal",
        "those of transformers + PEFT to 1e-4, over chunked prefill and decode. An empty cell: the family has no such",
        "part.",
        "",
        "| | " + " | ".join(format.title for format in served) + " |",
        "|---|" + ":-:|" * len(served),
    ]
    for kind, spec in specs.items():
        cells = ["✓" if applies(format, kind, spec) else "" for format in served]
        lines.append(f"| {FAMILIES[kind].title} | " + " | ".join(cells) + " |")
    lines += ["", "Refused for every family, by name:", "", "| | the message names |", "|---|---|"]
    lines += [f"| {format.title} | `{format.refused}` |" for format in FORMATS if format.refused]
    lines += [
        "",
        "Architectures, as `config.json` names them: "
        + ", ".join(f"`{a}`" for a in sorted(ARCHITECTURES))
        + ".",
    ]
    return "\n".join(lines) + "\n"


def tiny_specs(folder: Path, kinds: Sequence[str] = tuple(KINDS)) -> dict[str, ModelSpec]:
    """The specs of tiny models of each family, in the order of FAMILIES."""
    from tests.tiny import write_model

    return {kind: load_spec(write_model(folder / kind, kind)) for kind in FAMILIES if kind in kinds}


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        sys.stdout.write(document(tiny_specs(Path(name))))
