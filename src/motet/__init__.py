"""Motet: many LoRA fine-tunes of one base model, served together. `LLM` is the Python API."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from motet.llm import LLM as LLM
    from motet.types import SamplingParams as SamplingParams

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> object:
    """Import the Python API on first use: the command line and the engine process do not pay for it."""
    if name == "LLM":
        from motet.llm import LLM

        return LLM
    if name == "SamplingParams":
        from motet.types import SamplingParams

        return SamplingParams
    raise AttributeError(name)
