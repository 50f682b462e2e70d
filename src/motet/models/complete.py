"""What transformers makes of a config; see `motet.models.config`, which this module is kept apart from for its imports.

`python -m motet.models.complete DIRECTORY` prints {"config": …} or {"refused": why} on its last line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from motet.errors import ModelRefused
from motet.models.config import ModelConfig

ROPE_TYPES = ("linear", "llama3", "yarn")
"""Rotations whose frequencies are transformers' to say; the default has none of its own, others are not supported."""


def complete(directory: Path) -> str:
    """The values of a ModelConfig, as JSON; ModelRefused if transformers does not take the config.json."""
    try:
        return json.dumps(_values(AutoConfig.from_pretrained(directory)))
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelRefused(f"{directory}/config.json cannot be read: {error}") from error


def completed(config: PretrainedConfig) -> ModelConfig:
    """The same of a config that was made otherwise."""
    return ModelConfig(json.loads(json.dumps(_values(config))))


def _values(config: PretrainedConfig) -> dict[str, Any]:
    plain = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    known = {
        *getattr(type(config), "__dataclass_fields__", ()),
        *config.attribute_map,
        *config.attribute_map.values(),
    }
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    return {
        **plain,
        **{alias: getattr(config, name, None) for alias, name in config.attribute_map.items()},
        "is_heterogeneous": getattr(config, "is_heterogeneous", False),
        "unknown_options": {name: value for name, value in plain.items() if name not in known},
        "rope_frequencies": _rope_frequencies(config),
        "parts": {name: _values(part) for name, part in parts.items() if isinstance(part, PretrainedConfig)},
    }


def _rope_frequencies(config: PretrainedConfig) -> tuple[list[float], float] | None:
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if kind not in ROPE_TYPES:
        return None
    inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return inverse.tolist(), scale


def main() -> None:
    """Entry point of the child process."""
    try:
        answer = f'{{"config": {complete(Path(sys.argv[1]))}}}'
    except ModelRefused as error:
        answer = json.dumps({"refused": str(error)})
    sys.stdout.write(f"\n{answer}\n")


if __name__ == "__main__":
    main()
