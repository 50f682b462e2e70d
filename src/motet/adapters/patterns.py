r"""Module-name patterns of PEFT configs, matched in bounded time.

PEFT reads the keys of `rank_pattern` and `alpha_pattern` as regular expressions: the first key, in the
order of the file, with `re.match(rf"(.*\.)?({key})$", name)` wins. The keys are written by whoever made the
adapter, and Python's backtracking matcher takes exponential time on short ones such as `(\w+)+x`, holding
every thread of the process. So here a pattern maps the set of positions where it may start to the set of
positions where it may end:

    char:      {i + 1 | i in S, name[i] fits}
    sequence:  p2(p1(S))        alternatives: p1(S) | p2(S)        repetition: least fixed point

which is polynomial: a step costs at most len(name), a repetition len(name) steps, and repetitions nest at
most MAX_NESTING deep. Back-references, look-around and flags are refused by name: no adapter in the field
uses them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from motet.errors import AdapterRefused

MAX_PATTERN = 512
MAX_REGEXES = 64  # patterns beyond plain module names
REGEX_COST = 50  # microseconds per module; a plain name takes about one
MAX_NESTING = 2
MAX_REPEAT = 32
MAX_GROUPS = 16
QUANTIFIERS = ("*", "+", "?", "{")

Positions = frozenset[int]
Step = Callable[[str, Positions], Positions]
Matcher = Callable[[str], bool]

_PLAIN = re.compile(r"(?:[\w.-]|\\\.)+", re.ASCII)
_REPEAT = re.compile(r"\{(\d{1,3})(?:(,)(\d{1,3})?)?\}")
_CLASS = re.compile(r"\[\^?\]?(?:[^\]\[\\]|\\.)*\]")
_AMBIGUOUS = ("--", "&&", "||", "~~")  # reserved inside classes; Python warns about them


@dataclass(frozen=True)
class Patterns:
    """The compiled keys of one pattern table, in file order."""

    keys: tuple[str, ...]
    matchers: tuple[Matcher, ...]
    cost: int
    """About how many microseconds a module takes that matches none."""

    def find(self, name: str) -> str | None:
        """The first key that PEFT would apply to the module `name`, or None."""
        for key, matches in zip(self.keys, self.matchers, strict=True):
            if matches(name):
                return key
        return None


def compile_patterns(keys: Iterable[str], table: str) -> Patterns:
    """Compile the keys of the config entry `table`. AdapterRefused names a key that is not safe to match."""
    matchers: list[Matcher] = []
    regexes = 0
    names = tuple(keys)
    for key in names:
        if len(key) > MAX_PATTERN:
            raise AdapterRefused(f"{table}: a pattern of {len(key)} characters, more than {MAX_PATTERN}")
        if _PLAIN.fullmatch(key):
            matchers.append(_plain(key))
            continue
        regexes += 1
        if regexes > MAX_REGEXES:
            raise AdapterRefused(f"{table}: more than {MAX_REGEXES} regular expressions")
        try:
            matchers.append(_regex(key))
        except _Unsupported as error:
            raise AdapterRefused(f"{table}: pattern {key!r} is not supported: {error}") from None
    return Patterns(names, tuple(matchers), len(names) + (REGEX_COST - 1) * regexes)


class _Unsupported(Exception):
    """The pattern uses something outside the subset; the text says what."""


def _plain(key: str) -> Matcher:
    pattern = re.compile(rf"(.*\.)?({key})$")  # without repetitions of its own it cannot blow up
    return lambda name: pattern.match(name) is not None


def _regex(key: str) -> Matcher:
    step = _Parser(key).parse()

    def matches(name: str) -> bool:
        dots = (i + 1 for i, c in enumerate(name) if c == ".")  # PEFT's (.*\.)? ends there
        return len(name) in step(name, frozenset((0, *dots)))

    return matches


def _char(fits: Callable[[str], object]) -> Step:
    return lambda name, at: frozenset(i + 1 for i in at if i < len(name) and fits(name[i]))


def _run(fits: Callable[[str], object]) -> Step:
    """As many characters as fit, also none: the fixed point of _char in one sweep."""

    def step(name: str, at: Positions) -> Positions:
        found = set(at)
        for i in range(min(at, default=len(name)), len(name)):
            if i in found and fits(name[i]):
                found.add(i + 1)
        return frozenset(found)

    return step


def _start(name: str, at: Positions) -> Positions:  # noqa: ARG001  (a Step)
    return at & {0}


def _end(name: str, at: Positions) -> Positions:
    return at & {len(name)}


def _sequence(parts: list[Step]) -> Step:
    def step(name: str, at: Positions) -> Positions:
        for part in parts:
            if not at:
                break
            at = part(name, at)
        return at

    return step


def _alternatives(parts: list[Step]) -> Step:
    return lambda name, at: frozenset().union(*(part(name, at) for part in parts))


def _repeat(part: Step, low: int, high: int | None) -> Step:
    def step(name: str, at: Positions) -> Positions:
        for _ in range(low):
            at = part(name, at)
        found, new, count = at, at, low
        while new and (high is None or count < high):
            new = part(name, new) - found
            found |= new
            count += 1
        return found

    return step


class _Parser:
    """Recursive descent over the supported subset of Python's regular expressions."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.groups = 0

    def parse(self) -> Step:
        step, _ = self._alternation()
        if self.at < len(self.text):
            raise _Unsupported("unbalanced parenthesis")
        return step

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _take(self, token: str) -> bool:
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def _alternation(self) -> tuple[Step, int]:
        """A step and how deep repetitions nest in it; likewise below."""
        parts = [self._series()]
        while self._take("|"):
            parts.append(self._series())
        steps = [step for step, _ in parts]
        return steps[0] if len(steps) == 1 else _alternatives(steps), max(depth for _, depth in parts)

    def _series(self) -> tuple[Step, int]:
        steps: list[Step] = []
        deepest = 0
        while self._peek() not in ("", "|", ")"):
            step, depth = self._repetition()
            steps.append(step)
            deepest = max(deepest, depth)
        return _sequence(steps), deepest

    def _repetition(self) -> tuple[Step, int]:
        anchor = {"^": _start, "$": _end}.get(self._peek())
        if anchor is not None:
            self.at += 1
            if self._bounds() is not None:
                raise _Unsupported("repetition of an anchor")
            return anchor, 0
        if self._take("("):
            (step, depth), fits = self._group(), None
        else:
            fits = self._one()
            step, depth = _char(fits), 0
        bounds = self._bounds()
        if bounds is None:
            return step, depth
        self._take("?")  # lazy: the same set of matches
        if self._peek() in QUANTIFIERS:
            raise _Unsupported("repetition of a repetition")
        if depth + 1 > MAX_NESTING:
            raise _Unsupported(f"repetitions nested more than {MAX_NESTING} deep")
        low, high = bounds
        if fits is not None and high is None:
            return _sequence([step] * low + [_run(fits)]), 1
        return _repeat(step, low, high), depth + 1

    def _bounds(self) -> tuple[int, int | None] | None:
        for token, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(token):
                return bounds
        match = _REPEAT.match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        low = int(match[1])
        high = low if match[2] is None else int(match[3]) if match[3] else None
        if max(low, high or 0) > MAX_REPEAT or (high is not None and high < low):
            raise _Unsupported(f"repetition {match[0]} (at most {MAX_REPEAT} times)")
        return low, high

    def _group(self) -> tuple[Step, int]:
        self.groups += 1
        if self.groups > MAX_GROUPS:
            raise _Unsupported(f"more than {MAX_GROUPS} groups")
        if not self._take("?:") and self._peek() == "?":
            raise _Unsupported("look-around, named group or flag (?…)")
        inner = self._alternation()
        if not self._take(")"):
            raise _Unsupported("unbalanced parenthesis")
        return inner

    def _one(self) -> Callable[[str], object]:
        """The test for a literal, the dot, an escape or a class."""
        if self._peek() in QUANTIFIERS:
            raise _Unsupported(f"nothing to repeat at {self._peek()!r}")
        if self._take("."):
            return "\n".__ne__
        if self._peek() == "[":
            return self._class()
        if not self._take("\\"):
            literal = self._peek()
            self.at += 1
            return literal.__eq__
        letter = self._peek()
        self.at += 1
        if letter and letter in "dwsDWS":
            return re.compile("\\" + letter).fullmatch
        if not letter or letter.isalnum():
            raise _Unsupported(f"escape \\{letter}")
        return letter.__eq__

    def _class(self) -> Callable[[str], object]:
        match = _CLASS.match(self.text, self.at)
        if match is None or any(token in match[0] for token in _AMBIGUOUS):
            raise _Unsupported("malformed character class")
        self.at = match.end()
        try:
            return re.compile(match[0]).fullmatch
        except re.error as error:
            raise _Unsupported(f"malformed character class: {error}") from None
