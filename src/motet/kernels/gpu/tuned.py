"""Configurations measured to be best, from files: for a device, an operation and a shape.

A file is JSON and holds one operation of one device:
    {"device": "NVIDIA H200", "operation": "dense_product",
     "configs": [{"features": 5120, "depth": 2880, "config": {"splits": 2, "stages": 8}}, ...]}
OPERATIONS says which operations there are, the numbers that make up a shape of each, and the dataclass whose fields
`config` has; fields that it leaves out have the dataclass's defaults. Files of Motet's own are in `configs/` beside
this, a user's in the folder that `motet serve --tuned-configs` or `$MOTET_TUNED_CONFIGS` names; these come first.

For a shape that no file has, the nearest is taken: the smallest sum of the ratios' logarithms, no ratio above REACH.
Where none is near, the default is. Everything is read and checked once, by `load`; asking again costs a look-up.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from motet.errors import ConfigError
from motet.kernels.gpu.dense import MOST_BLOCKS, DenseConfig
from motet.kernels.gpu.lora import LoraConfig
from motet.kernels.gpu.moe import ProductConfig
from motet.kernels.gpu.moe_lora import ShrinkConfig

logger = logging.getLogger(__name__)
SHIPPED = Path(__file__).with_name("configs")
REACH = 2.0
"""How much larger or smaller than a shape's numbers those of the nearest may be; of ranks, which are not known when
graphs are captured, any is near."""
TYPICAL_RANK = 32
"""The rank that configurations are asked for while no adapter is known."""

C = TypeVar("C")
Shape = Mapping[str, int]


def _any(_config: Any, _shape: Shape) -> bool:
    return True


def _countable(config: Any, shape: Shape) -> bool:
    """Whether there are counters for the blocks of a split sum, one more for each of three members."""
    return bool(config.splits == 1 or shape["features"] // config.features + 3 <= MOST_BLOCKS)


def _divides(config: Any, shape: Shape) -> bool:
    """Packed weights have no masks in K; others are read in powers of two."""
    step = config.depth
    return bool(shape["depth"] % step == 0 if shape["packed"] else step & (step - 1) == 0)


@dataclass(frozen=True)
class Operation:
    """What is configured by dataclass `config` for shapes of the numbers `exact`, which must be equal, and `near`.

    The dataclass checks its fields itself; `fits` says whether a configuration can be used for a shape at all.
    """

    config: type
    near: tuple[str, ...]
    exact: tuple[str, ...] = ()
    fits: Callable[[Any, Shape], bool] = _any


_SHRINK = Operation(ShrinkConfig, ("hidden", "rank"))
OPERATIONS = {
    "dense_product": Operation(DenseConfig, ("features", "depth"), fits=_countable),
    "lora_decode": Operation(LoraConfig, ("hidden", "rank")),
    "lora_prefill": Operation(LoraConfig, ("hidden", "rank")),
    "moe_product": Operation(
        ProductConfig,
        ("features", "depth"),
        ("sides", "rows", "few", "packed"),
        fits=_divides,
    ),
    "moe_shrink_decode": _SHRINK,
    "moe_shrink_prefill": _SHRINK,
}


@dataclass(frozen=True)
class _Entry:
    """A configuration, the shape that it was measured at, and where it is written."""

    operation: str
    shape: Shape
    config: Any
    file: Path


_entries: list[list[_Entry]] = []
"""This device's, those that come first in front."""
_answers: dict[tuple[Any, ...], Any] = {}


def load(folder: Path | None, device: str) -> None:
    """From here on `tuned` knows what `folder` and Motet itself have for `device`, and nothing else.

    ConfigError names the file and the field at fault, whichever device the file is for.
    """
    _answers.clear()
    _entries.clear()
    if folder is not None:
        files = sorted(folder.glob("*.json"))
        if not files:
            raise ConfigError(f"tuned_configs: {folder} is no folder with *.json files in it")
        _entries.append(_read(files, device))
        if not _entries[0]:
            logger.warning("%s has no configuration for %s", folder, device)
    _entries.append(_read(sorted(SHIPPED.glob("*.json")), device))


def shipped(device: str) -> list[tuple[str, Shape, Any]]:
    """What Motet's own files have for a device: (operation, shape, configuration)."""
    return [(one.operation, one.shape, one.config) for one in _read(sorted(SHIPPED.glob("*.json")), device)]


def use(configs: Iterable[tuple[str, Shape, Any]]) -> None:
    """From here on `tuned` knows these (operation, shape, configuration), and nothing else."""
    _answers.clear()
    _entries[:] = [[_Entry(operation, shape, config, Path()) for operation, shape, config in configs]]


def tuned(operation: str, default: C, **shape: int) -> C:
    """The configuration of an operation at a shape: from a file, or `default`."""
    key = operation, *shape.items()
    if key not in _answers:
        _answers[key] = _choose(operation, default, shape)
    return cast(C, _answers[key])


def asked(operation: str) -> list[tuple[Shape, Any]]:
    """The shapes at which a configuration of an operation was asked for since `load`, and the answers."""
    return [(dict(key[1:]), config) for key, config in _answers.items() if key[0] == operation]


def dump(device: str, operation: str, configs: Iterable[tuple[Shape, Any]]) -> str:
    """The text of a file: (shape, configuration) of one operation."""
    written = [{**shape, "config": asdict(config)} for shape, config in configs]
    return json.dumps({"device": device, "operation": operation, "configs": written}, indent=1) + "\n"


def _choose(operation: str, default: C, shape: Shape) -> C:
    known = OPERATIONS[operation]
    assert set(shape) == {*known.near, *known.exact}, f"{operation} has no shape of {sorted(shape)}"
    for source in _entries:
        near = [
            (distance, entry)
            for entry in source
            if (distance := _distance(entry, operation, shape)) is not None
        ]
        if near:
            distance, found = min(near, key=lambda one: one[0])
            logger.log(
                logging.WARNING if distance else logging.INFO,  # an engine's process shows warnings
                "%s %s: %s configuration%s, from %s",
                operation,
                _show(shape),
                "nearest" if distance else "tuned",
                f" is that of {_show(found.shape)}" if distance else "",
                found.file,
            )
            return cast(C, found.config)
    return default


def _distance(entry: _Entry, operation: str, shape: Shape) -> float | None:
    """How far an entry's shape is from this one; None if it is too far, or of something else."""
    known = OPERATIONS[operation]
    if entry.operation != operation or any(entry.shape[name] != shape[name] for name in known.exact):
        return None
    ratios = {name: abs(math.log(entry.shape[name] / shape[name])) for name in known.near}
    if any(ratio > math.log(REACH) for name, ratio in ratios.items() if name != "rank"):
        return None
    return sum(ratios.values()) if known.fits(entry.config, shape) else None


def _show(shape: Shape) -> str:
    return " ".join(f"{name}={value}" for name, value in shape.items())


def _read(files: Iterable[Path], device: str) -> list[_Entry]:
    """All entries of these files that are for `device`."""
    found: list[_Entry] = []
    for file in files:
        try:
            content = json.loads(file.read_text("utf-8"))
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{file} is not valid JSON: {error}") from error
        try:
            entries = _parse(content, file)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
        found += entries if content["device"] == device else []
    return found


def _parse(content: object, file: Path) -> list[_Entry]:
    content = _table(content, "the file", {"device", "operation", "configs"})
    operation = content["operation"]
    if not isinstance(content["device"], str):
        raise ConfigError(f"device must be the name of a GPU, got {content['device']!r}")
    if not isinstance(operation, str) or operation not in OPERATIONS:
        raise ConfigError(f"operation {operation!r} is not known; known are {', '.join(OPERATIONS)}")
    if not isinstance(content["configs"], list):
        raise ConfigError("configs must be a list")
    known = OPERATIONS[operation]
    entries = []
    for number, one in enumerate(content["configs"]):
        where = f"configs[{number}]"
        entry = _table(one, where, {*known.near, *known.exact, "config"})
        shape = {
            name: _number(value, f"{where}.{name}", int) for name, value in entry.items() if name != "config"
        }
        for name in known.near:
            if shape[name] < 1:
                raise ConfigError(f"{where}.{name} must be at least 1, got {shape[name]}")
        entries.append(_Entry(operation, shape, _config(known, entry["config"], f"{where}.config"), file))
    return entries


def _config(operation: Operation, values: object, where: str) -> Any:
    """A configuration of this operation with these values."""
    known = {field.name: field for field in fields(operation.config)}
    needed = {name for name, field in known.items() if field.default is MISSING}
    table = _table(values, where, needed, set(known))
    kinds = {name: bool if known[name].type in ("bool", bool) else int for name in table}
    given = {name: _number(value, f"{where}.{name}", kinds[name]) for name, value in table.items()}
    try:
        config = operation.config(**given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return config


def _table(value: object, where: str, needed: set[str], allowed: set[str] | None = None) -> dict[str, Any]:
    """`value` if it is a table with all of these fields and none but the allowed."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a table")
    for name in sorted(needed - value.keys()):
        raise ConfigError(f"{where} lacks {name}")
    for name in sorted(value.keys() - needed - (allowed or set())):
        raise ConfigError(f"{where} has an unknown field {name}")
    return value


def _number(value: object, where: str, kind: type) -> int:
    """`value` if it is a bool or an int, as wanted, and not negative."""
    if type(value) is not kind:
        raise ConfigError(
            f"{where} must be {'true or false' if kind is bool else 'a whole number'}, got {value!r}"
        )
    number = cast(int, value)
    if number < 0:
        raise ConfigError(f"{where} must not be negative, got {number}")
    return number
