"""adapter_config.json: what it means for the weights, or why the adapter is refused.

Every key that PEFT writes (0.3 to 0.21) is on one of three lists: used, harmless (it steers training or
names things that the tensors tell anyway), or refused unless it has its neutral value (it would change the
mathematics). A key on no list is refused by name: it may come from a method that this version does not
know.

    scaling = alpha / r        with use_rslora: alpha / sqrt(r)
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from motet.adapters.patterns import Patterns, compile_patterns
from motet.errors import AdapterRefused

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1 << 20  # keeps sizes within 64 bits; whether a rank fits the pool is decided elsewhere

HARMLESS = {
    "auto_mapping": "names the training class",
    "base_model_name_or_path": "reported; names and paths differ between machines, the shapes are checked",
    "inference_mode": "training only",
    "revision": "names the base",
    "peft_version": "reported; layouts are told apart by shapes",
    "runtime_config": "PEFT ignores it in files",
    "target_modules": "the tensors tell",
    "exclude_modules": "the tensors tell",
    "layers_to_transform": "the tensors tell",
    "layers_pattern": "the tensors tell",
    "lora_dropout": "training only",
    "merge_weights": "where the factors lived during training",
    "megatron_core": "a module name, used with megatron_config only",
    "loftq_config": "used with init_lora_weights='loftq' only, which is refused",
    "corda_config": "used with init_lora_weights='corda' only, which is refused",
    "lora_ga_config": "used with init_lora_weights='lora_ga' only, which is refused",
    "eva_config": "initial values of A; the base is untouched",
    "qalora_group_size": "used with use_qalora only, which is refused",
}
"""Keys without a say in the result, and why."""

USED = frozenset(
    {
        "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters",
        "ensure_weight_tying",
    }
)  # fmt: skip

REFUSED = {
    "use_dora": "DoRA rescales the base weights by a learned magnitude",
    "lora_bias": "LoRA with a bias on B",
    "bias": "trained biases of the base",
    "modules_to_save": "fully trained modules of the base",
    "trainable_token_indices": "trained embedding rows",
    "layer_replication": "a base with repeated layers",
    "fan_in_fan_out": "transposed base weights",
    "megatron_config": "Megatron parallel layers",
    "alora_invocation_tokens": "activated LoRA, which starts at invocation tokens",
    "use_qalora": "QALoRA pools the input of A",
    "velora_config": "VeLoRA keeps extra tensors",
    "monteclora_config": "Monte Carlo LoRA samples the weights",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA truncates the base weights",
    "enable_lora": "merged projections of old PEFT versions",
}
"""Keys that change the mathematics, refused unless neutral, and what they stand for."""

_NEUTRAL: tuple[object, ...] = (None, False, [], {})

PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Initial values that leave the base weights alone; so do true and false."""
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Prefixes of initial values that PEFT subtracts from the base weights (LoftQ also quantises them).

PEFT's conversion (`save_pretrained(path_initial_model_for_weight_conversion=…)`) writes true in their
place, so one of these names in a file means that it was not converted and is wrong on the base that the
other adapters share.
"""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The facts of a LoRA config. `rank_values` and `alpha_values` are keyed by their patterns.

    `tied` says that the output head has the embedding's update, transposed; `parameters` are names of parameters,
    or ends of such names, that were adapted themselves instead of their modules.
    """

    r: int
    alpha: float
    rslora: bool
    ranks: Patterns
    alphas: Patterns
    rank_values: dict[str, int]
    alpha_values: dict[str, float]
    base_model: str | None
    peft_version: str | None
    targets: tuple[str, ...]
    tied: bool
    parameters: frozenset[str]

    def targeted(self, module: str) -> str:
        """The name of the module that PEFT matches patterns against: with `.weight` if that parameter was targeted.

        A router is such a module since transformers 5. PEFT compares the ends of names at dots.
        """
        if not self.parameters:
            return module
        parts = [*module.split("."), "weight"]
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        return f"{module}.weight" if any(end in self.parameters for end in ends) else module

    def rank(self, module: str) -> int:
        """The rank that PEFT gives to the module or parameter of this dotted name."""
        key = self.ranks.find(module)
        return self.r if key is None else self.rank_values[key]

    def scaling(self, module: str, rank: int) -> float:
        """The factor on B·A for a module or parameter. AdapterRefused if it is beyond float32."""
        key = self.alphas.find(module)
        alpha = self.alpha if key is None else self.alpha_values[key]
        scaling = alpha / math.sqrt(rank) if self.rslora else alpha / rank
        if abs(scaling) > np.finfo(np.float32).max:
            raise refused(f"{module}: scaling {scaling:g} does not fit a float32")
        return scaling


def parse_config(data: bytes) -> LoraConfig:
    """Read the bytes of adapter_config.json. AdapterRefused names the key at fault and the reason."""
    config = _parse_json(data)
    if config.get("peft_type") != "LORA":
        raise refused(f"peft_type is {show(config.get('peft_type'))}; only LORA is supported")
    for key, value in config.items():
        _check_key(key, value)
    ranks, alphas = _table(config, "rank_pattern"), _table(config, "alpha_pattern")
    return LoraConfig(
        r=_rank(config.get("r"), "r"),
        alpha=_number(config.get("lora_alpha"), "lora_alpha"),
        rslora=_flag(config.get("use_rslora"), "use_rslora"),
        ranks=compile_patterns(ranks, "rank_pattern"),
        alphas=compile_patterns(alphas, "alpha_pattern"),
        rank_values={key: _rank(value, f"rank_pattern[{show(key)}]") for key, value in ranks.items()},
        alpha_values={key: _number(value, f"alpha_pattern[{show(key)}]") for key, value in alphas.items()},
        base_model=_text(config.get("base_model_name_or_path")),
        peft_version=_text(config.get("peft_version")),
        targets=_targets(config.get("target_modules")) + _targets(config.get("target_parameters")),
        tied=_flag(config.get("ensure_weight_tying"), "ensure_weight_tying"),
        parameters=frozenset(_targets(config.get("target_parameters"))),
    )


def show(value: object, limit: int = 160) -> str:
    """A value from a file as it may stand in a message: quoted, escaped, cut to `limit` characters."""
    text = repr(value[:limit] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; ValueError if two keys are equal, since readers disagree on which of them counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {show(twice)} occurs twice")
    return found


def no_constant(name: str) -> NoReturn:
    """JSON has no NaN or Infinity, Python's reader does. Always ValueError."""
    raise ValueError(f"{name} is not JSON")


def refused(reason: str) -> AdapterRefused:
    """The error for a fault in adapter_config.json."""
    return AdapterRefused(f"{CONFIG_NAME}: {reason}")


def _parse_json(data: bytes) -> dict[str, object]:
    if len(data) > MAX_CONFIG_BYTES:
        raise refused(f"larger than {MAX_CONFIG_BYTES} bytes")
    try:
        config = json.loads(data.decode(), object_pairs_hook=unique_keys, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise refused(f"not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise refused("not a JSON object")
    return config


def _check_key(key: str, value: object) -> None:
    if key in REFUSED:
        if value not in _NEUTRAL and (key, value) != ("bias", "none"):
            raise refused(f"{key}={show(value)} is not supported ({REFUSED[key]})")
    elif key == "task_type":
        if value not in (None, "CAUSAL_LM"):
            raise refused(f"task_type={show(value)} is not supported; only CAUSAL_LM is")
    elif key == "init_lora_weights":
        _check_init(value)
    elif key not in USED | HARMLESS.keys():
        raise refused(f"unknown key {show(key)}; it may change what the weights mean")


def _check_init(value: object) -> None:
    if value is None or isinstance(value, bool):
        return
    name = value.lower() if isinstance(value, str) else ""
    if name.startswith(BASE_CHANGING_INITS):
        raise refused(
            f"init_lora_weights={show(value)} changes the base weights; convert the adapter with "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=…), where PEFT offers it"
        )
    if name not in PLAIN_INITS:
        raise refused(f"init_lora_weights={show(value)} is unknown; it may change the base")


def _table(config: dict[str, object], table: str) -> dict[str, object]:
    value = config.get(table)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refused(f"{table} is {show(value)}, not an object")
    return value


def _rank(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise refused(f"{key} is {show(value)}, not a rank (an integer from 1 to {MAX_RANK})")
    return value


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e30:
        raise refused(f"{key} is {show(value)}, not a finite number")
    return float(value)


def _flag(value: object, key: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise refused(f"{key} is {show(value)}, not true or false")
    return bool(value)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _targets(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(sorted(str(item) for item in value)) if isinstance(value, list) else ()
