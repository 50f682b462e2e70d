"""Capacity curves: what was measured of a base model on a GPU, in one JSON file.

A file holds figures that somebody measured, and says where; coefficients are fitted when it is read, by `calibrate`,
so that nothing derived can go stale in it. Motet ships the curves of the pairs that it was measured on.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from motet.errors import ConfigError
from motet.plan.calibrate import CasePoint, StepPoint, fit
from motet.plan.cost import StepCost
from motet.plan.gpus import GPUS

MEASURE = "measure one with `motet bench sweep` and give it with --curve"
LOAD_RATE = 3.4e9
"""Bytes per second of a cold adapter on an H200."""
RANK = 16
STEP_TOKENS = 2048
"""Of an engine on a GPU that is told nothing else."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_SHAPE = (
    "architectures", "num_hidden_layers", "hidden_size", "intermediate_size", "moe_intermediate_size",
    "num_attention_heads", "num_key_value_heads", "num_local_experts", "num_experts", "num_experts_per_tok",
    "vocab_size", "kv_lora_rank", "n_routed_experts",
)  # fmt: skip


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One base model on one GPU.

    `about` says where the figures come from and what is no measurement. `rank` is that of the adapters, `ahead` whether
    steps are planned one ahead (on a GPU they are), `load_bytes_per_s` the rate at which a cold adapter comes in,
    `given` coefficients in seconds that the points do not tell. `config` is the model's config.json: that of another
    model is measured again.
    """

    gpu: str
    model: str
    about: str
    rank: int
    max_step_tokens: int
    load_bytes_per_s: float
    config: dict[str, Any]
    ahead: bool = True
    steps: tuple[StepPoint, ...] = ()
    cases: tuple[CasePoint, ...] = ()
    given: dict[str, float] = {}

    @property
    def cost(self) -> StepCost:
        """The coefficients that fit its points best."""
        return fit(self.steps, self.cases, self.given, self.max_step_tokens, self.ahead, self._sparsity)

    @property
    def _sparsity(self) -> float:
        """The share of a layer's experts that a token does without."""
        of = next((self.config[name] for name in _EXPERTS if self.config.get(name)), 0)
        return 1 - self.config["num_experts_per_tok"] / of if of else 0.0

    @property
    def most_rows(self) -> int:
        """The largest step that was measured; beyond it costs are extrapolated."""
        return max((*(step.rows for step in self.steps), *(case.in_flight for case in self.cases)), default=0)


class _Point(msgspec.Struct, frozen=True):
    """Of a sweep, what is needed of it."""

    concurrency: int
    prompt: float
    output: float
    adapters: int
    rank: int | None
    requests: int
    failed: int
    ttft_mean: float | None
    otps: float | None

    @property
    def case(self) -> CasePoint | None:
        """None if too little of it went well."""
        if self.failed or not self.ttft_mean or not self.otps:
            return None
        prompt, output = round(self.prompt), round(self.output)
        return CasePoint(
            self.concurrency,
            self.requests,
            prompt,
            output,
            self.adapters,
            1e3 / self.otps,
            1e3 * self.ttft_mean,
        )


class _Sweep(msgspec.Struct, frozen=True, tag="curve", tag_field="kind"):
    """What `motet bench sweep` writes."""

    device: str
    model: str
    began: str
    points: tuple[_Point, ...]


def read_curve(path: Path, config: Mapping[str, Any] | None, gpu: str) -> Curve:
    """The curve in a file, ours or one that `motet bench sweep` wrote.

    A sweep holds no config.json, so that `config` must be given; without a device it is one of `gpu`. ConfigError names
    the file and what is wrong with it.
    """
    try:
        content = path.read_bytes()
        found = msgspec.json.decode(content, type=dict[str, Any])
        if found.get("kind") != "curve":
            return msgspec.convert(found, Curve)
        sweep = msgspec.convert(found, _Sweep)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is not a capacity curve: {error}") from error
    if config is None:
        raise ConfigError(
            f"{path} is a sweep, which does not hold the model's config.json: give it with --model"
        )
    return _of_sweep(sweep, path, dict(config), gpu)


def _of_sweep(sweep: _Sweep, path: Path, config: dict[str, Any], gpu: str) -> Curve:
    """Its base points and those of the highest rank; loading is taken to be as fast as it was on an H200."""
    rank = max((point.rank or 0 for point in sweep.points), default=0)
    chosen = [point for point in sweep.points if not point.adapters or (point.rank or 0) == rank]
    cases = tuple(case for point in chosen if (case := point.case) is not None)
    if any(case.adapters for case in cases) and not rank:
        raise ConfigError(f"{path} does not say the rank of its adapters: name them NAME:RANK when you sweep")
    measured = next((name for name in GPUS if name.lower() in sweep.device.lower().split()), gpu)
    return Curve(
        gpu=measured,
        model=sweep.model,
        about=f"motet bench sweep of {sweep.began}",
        rank=rank or RANK,
        max_step_tokens=STEP_TOKENS,
        load_bytes_per_s=LOAD_RATE,
        config=config,
        cases=cases,
    )


def shipped_curves() -> dict[str, Curve]:
    """The curves that come with Motet, by name: GPU and model."""
    folder = resources.files("motet.plan") / "curves"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda f: f.name)
    return {
        file.name.removesuffix(".json"): msgspec.json.decode(file.read_bytes(), type=Curve) for file in files
    }


def find_curve(name: str, config: Mapping[str, Any] | None, gpu: str) -> Curve:
    """A shipped curve by its name, or the one in a file, see `read_curve`."""
    shipped = shipped_curves()
    if name in shipped:
        return shipped[name]
    if not Path(name).exists():
        raise ConfigError(
            f"there is no capacity curve {name!r}: neither a file nor one of those that Motet ships, "
            f"{', '.join(shipped)}; {MEASURE}"
        )
    return read_curve(Path(name), config, gpu)


def curve_for(config: Mapping[str, Any], gpu: str) -> Curve:
    """The shipped curve of a model of this shape, that of this GPU if there is one."""
    shipped = shipped_curves()
    found = [curve for curve in shipped.values() if same_shape(curve.config, config)]
    if not found:
        raise ConfigError(
            f"no capacity curve of a model of this shape comes with Motet, only {', '.join(shipped)}; {MEASURE}"
        )
    return next((curve for curve in found if curve.gpu.lower() == gpu.lower()), found[0])


def same_shape(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two config.json describe steps that take equally long."""
    return all(one.get(name) == other.get(name) for name in _SHAPE)


def read_config_values(path: Path) -> dict[str, Any]:
    """The values of a config.json, given by its path or by its directory's."""
    file = path / "config.json" if path.is_dir() else path
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file} is not a config.json: {error}") from error
