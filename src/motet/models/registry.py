"""From a model's name to its architecture: the one list to extend when a family is added."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import msgspec

from motet.errors import ModelRefused
from motet.layers.batch import Device
from motet.layers.cpu import CpuDevice
from motet.layers.decoder import Decoder
from motet.models import deepseek, gpt_oss, llama, llama4, mixtral, qwen3
from motet.models.common import fp8_block
from motet.models.config import ModelConfig, read_config
from motet.models.weights import fingerprint, open_weights
from motet.types import ModelSpec

ARCHITECTURES: dict[str, ModuleType] = {
    "DeepseekV2ForCausalLM": deepseek,
    "DeepseekV3ForCausalLM": deepseek,
    "GptOssForCausalLM": gpt_oss,
    "Llama4ForCausalLM": llama4,
    "Llama4ForConditionalGeneration": llama4,
    "LlamaForCausalLM": llama,
    "MinistralForCausalLM": llama,
    "MistralForCausalLM": llama,
    "MixtralForCausalLM": mixtral,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run and the bytes of memory that its weights take."""

    decoder: Decoder
    nbytes: int


def locate(model: str) -> Path:
    """A local directory as it is, anything else as a hub id that is downloaded (or found in the hub's cache)."""
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.exists() or model.startswith((".", "/", "~")):
        raise ModelRefused(f"{model} is not a model directory: it has no config.json")
    from huggingface_hub import snapshot_download  # not needed for a directory: 30 MB

    try:
        return Path(
            snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*"])
        )
    except Exception as error:
        raise ModelRefused(
            f"{model} is neither a model directory nor a model that the hub gives us: {error}"
        ) from error


def load_spec(directory: Path, name: str | None = None) -> ModelSpec:
    """What can be known without weights. `name` defaults to the directory's."""
    config, architecture = _read(directory)
    spec: ModelSpec = architecture.spec(config, name or directory.name, fingerprint(directory))
    stops = dict.fromkeys((*spec.eos_token_ids, *_generation_stops(directory)))
    return msgspec.structs.replace(spec, eos_token_ids=tuple(stops))


def _generation_stops(directory: Path) -> tuple[int, ...]:
    """End tokens of generation_config.json; chat models often list more of them there than in their config."""
    file = directory / "generation_config.json"
    try:
        eos = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        found = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        return msgspec.convert(found, tuple[int, ...])
    except (ValueError, AttributeError, msgspec.ValidationError) as error:
        raise ModelRefused(f"{file} cannot be read: {error}") from error


def load_model(
    directory: Path,
    spec: ModelSpec,
    max_positions: int,
    on_progress: Callable[[float], None] = lambda _fraction: None,
    device: Device | None = None,
) -> LoadedModel:
    """The model of `spec`, on the CPU if no `device` is given, every weight of its checkpoint accounted for.

    `on_progress` gets the fraction read.
    """
    config, architecture = _read(directory)
    with open_weights(directory, device or CpuDevice(), on_progress, fp8_block(config)) as weights:
        decoder: Decoder = architecture.build(config, spec, weights, max_positions)
    return_freed_memory()
    return LoadedModel(decoder, weights.nbytes)


def return_freed_memory() -> None:
    """Ask glibc to give back what converting and packing freed: 316 MB after the embedded MoE model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _read(directory: Path) -> tuple[ModelConfig, ModuleType]:
    config = read_config(directory)
    names = config.architectures or []
    for name in names:
        if name in ARCHITECTURES:
            return config, ARCHITECTURES[name]
    raise ModelRefused(f"architecture {names} is not supported; supported are {sorted(ARCHITECTURES)}")
