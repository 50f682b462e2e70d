"""What requests say: verses, random tokens, a user's own prompts, a trace.

A prompt of N tokens is N tokens of the served model when its tokenizer is at hand. Otherwise its words are counted, and
how many tokens a word is comes from what the endpoint reports for two prompts of different length (`Measure.fitted`),
which also shows what a chat template adds.
"""

from __future__ import annotations

import csv
import itertools
import random
import re
import statistics
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
from tokenizers import Tokenizer

from motet.bench.calls import Call, Content
from motet.errors import ConfigError

TOKENS_PER_WORD = 1.4
"""Of verse, before the endpoint has said; 1.25–1.5 with vocabularies of 32,000 to 200,000."""
T = TypeVar("T")
_WORD = re.compile(r"\S+\s*")


class Source(Protocol):
    """Makes prompts of a number of tokens, no two alike."""

    def prompt(self, tokens: int) -> Content:
        """A new prompt."""
        ...


class Measure(Protocol):
    """Cuts a text to a number of tokens."""

    def cut(self, words: Iterator[str], tokens: int) -> str:
        """The beginning of the text, whose words come with the space behind them."""
        ...


class Counted:
    """By the served model's own tokenizer, with the special tokens that it puts in front of a prompt."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError for a directory without tokenizer.json."""
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"{directory} has no tokenizer.json; name a local directory of the served model"
            )
        self._tokenizer = Tokenizer.from_file(str(file))

    @property
    def vocabulary(self) -> int:
        """Tokens, those added included."""
        return self._tokenizer.get_vocab_size()

    def count(self, text: str) -> int:
        """Tokens of a text as a prompt."""
        return len(self._tokenizer.encode(text).ids)

    def cut(self, words: Iterator[str], tokens: int) -> str:
        # a word is at least a token; what is too much is taken off where the last token ends
        text = "".join(word for word, _ in zip(words, range(tokens), strict=False))
        ends = [end for _, end in self._tokenizer.encode(text).offsets]
        return text[: ends[tokens - 1]] if len(ends) > tokens else text


class Estimated(msgspec.Struct, frozen=True):
    """By counting words: tokens = `fixed` + `per_word` × words."""

    per_word: float = TOKENS_PER_WORD
    fixed: float = 0.0

    def cut(self, words: Iterator[str], tokens: int) -> str:
        wanted = max(1, round((tokens - self.fixed) / self.per_word))
        return "".join(word for word, _ in zip(words, range(wanted), strict=False)).rstrip()


def fitted(short: tuple[int, int], long: tuple[int, int]) -> Estimated:
    """The line through two prompts, each its words and the tokens that the endpoint counted."""
    per_word = (long[1] - short[1]) / (long[0] - short[0])
    if per_word <= 0:
        raise ConfigError(
            f"the endpoint counts {short[1]} and {long[1]} tokens for {short[0]} and {long[0]} words"
        )
    return Estimated(per_word, short[1] - per_word * short[0])


class Sonnets:
    """Prompts from Shakespeare's sonnets: from a verse on, then other sonnets in a random order. Each begins with
    another verse; when all have been used, with another word of it."""

    def __init__(self, measure: Measure, seed: int = 0) -> None:
        self._measure = measure
        self._chance = random.Random(seed)
        self._beginnings = self._verses()

    def prompt(self, tokens: int) -> str:
        return self._measure.cut(self._words(), tokens)

    def _verses(self) -> Iterator[list[str]]:
        """The words of a sonnet from some verse on, never the same twice."""
        verses = [(poem.splitlines(keepends=True), i) for poem in sonnets() for i in range(14)]
        for skipped in itertools.count():
            for verse, i in self._chance.sample(verses, len(verses)):
                if skipped < len(verse[i].split()):
                    yield _WORD.findall("".join(verse[i:]))[skipped:]

    def _words(self) -> Iterator[str]:
        yield from next(self._beginnings)
        while True:
            for poem in self._chance.sample(sonnets(), len(sonnets())):
                yield from _WORD.findall(poem)


class RandomWords:
    """The sonnets' words, each as likely as any other."""

    def __init__(self, measure: Measure, seed: int = 0) -> None:
        self._measure = measure
        self._chance = random.Random(seed)
        self._known = sorted({word.strip() for poem in sonnets() for word in _WORD.findall(poem)})

    def prompt(self, tokens: int) -> str:
        words = iter(lambda: self._chance.choice(self._known) + " ", None)
        return self._measure.cut(words, tokens)


class RandomTokens:
    """Token ids; the first of a vocabulary, where special ones tend to be, are left out."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        self._range = (vocabulary // 200, vocabulary)
        self._chance = random.Random(seed)

    def prompt(self, tokens: int) -> tuple[int, ...]:
        return tuple(self._chance.randrange(*self._range) for _ in range(tokens))


@cache
def sonnets() -> tuple[str, ...]:
    """The poems that come with the package, without their numbers."""
    text = (resources.files("motet.bench") / "sonnets.txt").read_text("utf-8")
    return tuple(f"{poem}\n\n" for poem in text.strip().split("\n\n")[1::2])


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """A line of a file of prompts."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    adapter: str | None = None
    output: int | None = None


class _Event(msgspec.Struct, forbid_unknown_fields=True):
    """A request of a trace: due at a second, of an adapter (or the base), lengths in tokens."""

    at: float
    prompt: int
    output: int
    adapter: str | None = None


def read_prompts(file: Path, output: int) -> list[Call]:
    """Of a file of JSON lines `{"prompt": …}` or `{"messages": […]}`, with `adapter` and `output` where wanted; `model`
    is empty where no adapter is named. Raises ConfigError with the file's name and line."""
    calls = []
    for number, line in _lines(file):
        where = f"{file}, line {number}"
        asked = _decode(line, _Line, where)
        if (asked.prompt is None) == (asked.messages is None):
            raise ConfigError(f"{where}: one of prompt and messages is needed")
        if asked.output is not None and asked.output <= 0:
            raise ConfigError(f"{where}: output must be positive")
        content: Content = asked.prompt if asked.prompt is not None else tuple(asked.messages or ())
        calls.append(Call(asked.adapter or "", content, asked.output or output))
    return calls


def read_trace(file: Path, source: Source, base: str) -> list[Call]:
    """Of JSON lines or a CSV with the columns at, prompt, output and, where wanted, adapter; in the order of time, the
    first at second 0. Raises ConfigError with the file's name and line."""
    events = sorted(_events(file), key=lambda event: event.at)
    return [
        Call(event.adapter or base, source.prompt(event.prompt), event.output, event.at - events[0].at)
        for event in events
    ]


def typical_of_trace(file: Path) -> tuple[int, int]:
    """Median lengths of its prompts and answers. Raises ConfigError as `read_trace` does."""
    events = _events(file)
    return statistics.median_low(e.prompt for e in events), statistics.median_low(e.output for e in events)


def typical_prompt(file: Path) -> int:
    """About the median length of a file's prompts. Raises ConfigError as `read_prompts` does."""
    words = statistics.median(len(str(call.prompt).split()) for call in read_prompts(file, 1))
    return max(1, round(TOKENS_PER_WORD * words))


def _events(file: Path) -> list[_Event]:
    events = []
    rows = _rows(file) if file.suffix == ".csv" else _lines(file)
    for number, row in rows:
        where = f"{file}, line {number}"
        if isinstance(row, str):
            event = _decode(row, _Event, where)
        else:
            event = _converted(row, where)
        if event.prompt <= 0 or event.output <= 0:
            raise ConfigError(f"{where}: prompt and output must be positive")
        events.append(event)
    if not events:
        raise ConfigError(f"{file} holds no request")
    return events


def _lines(file: Path) -> Sequence[tuple[int, str]]:
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"{file} holds nothing")
    return lines


def _rows(file: Path) -> Sequence[tuple[int, dict[str, str]]]:
    lines = _lines(file)
    table = csv.DictReader([line for _, line in lines], strict=True)
    return [(number, row) for (number, _), row in zip(lines[1:], table, strict=True)]


def _decode(line: str, kind: type[T], where: str) -> T:
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{where}: {error}") from error


def _converted(row: dict[str, str], where: str) -> _Event:
    given = {key: value for key, value in row.items() if value}
    try:
        return msgspec.convert(given, _Event, strict=False)
    except (msgspec.ValidationError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error
