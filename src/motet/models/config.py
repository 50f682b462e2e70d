"""A model's config, completed by transformers: what its config.json leaves out has the defaults of its class.

Reading one through transformers imports torch's compiler and more of transformers than its configs: 150 MB and 2.5
seconds that an engine has no other use for. So a process that has not got transformers asks a child, which prints the
completed config as JSON, and keeps the answer: the next start, with the same config.json and transformers, asks nobody.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from motet.config import cache_dir
from motet.errors import ModelRefused


class ModelConfig:
    """The options as attributes, by all their names; those of a part, such as `text_config`, are a ModelConfig too.

    `unknown_options` are those that the config's class does not have; `rope_frequencies` the inverse frequencies and
    the scale of a rotation that is not the default one, or None.
    """

    unknown_options: dict[str, Any]
    rope_frequencies: tuple[list[float], float] | None

    def __init__(self, values: dict[str, Any]) -> None:
        """`values` are those of the options, and under "parts" those of each part."""
        self.__dict__.update(values)
        self.__dict__.update((name, ModelConfig(part)) for name, part in values["parts"].items())

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the config has no {name}")


def read_config(directory: Path) -> ModelConfig:
    """The completed config of a model directory; ModelRefused if it cannot be read or transformers refuses it."""
    if "transformers" in sys.modules:
        from motet.models.complete import complete

        return ModelConfig(json.loads(complete(directory)))
    kept = cache_dir() / "configs" / f"{_key(directory)}.json"
    if kept.is_file():
        return ModelConfig(json.loads(kept.read_text()))
    answer = _ask_child(directory)
    with suppress(OSError):  # without a place to keep it, every start asks
        kept.parent.mkdir(parents=True, exist_ok=True)
        scratch = kept.with_suffix(f".{os.getpid()}")
        scratch.write_text(answer)
        scratch.replace(kept)
    return ModelConfig(json.loads(answer))


def _key(directory: Path) -> str:
    """What the answer depends on."""
    try:
        config = (directory / "config.json").read_bytes()
    except OSError as error:
        raise ModelRefused(f"{directory}/config.json cannot be read: {error}") from error
    version = importlib.metadata.version("transformers").encode()
    return hashlib.sha256(config + version + Path(__file__).with_name("complete.py").read_bytes()).hexdigest()


def _ask_child(directory: Path) -> str:
    command = [sys.executable, "-m", "motet.models.complete", str(directory)]
    child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        reason = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        raise ModelRefused(f"{directory}/config.json cannot be read: {reason[-1]}")
    answer = json.loads(child.stdout.splitlines()[-1])
    if "refused" in answer:
        raise ModelRefused(answer["refused"])
    return json.dumps(answer["config"])
