"""From deltas to OpenAI's answers: whole ones and chunks, for chat and for text completions."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from motet.server.intake import Job
from motet.server.openai import (
    Answer,
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    CompletionChoice,
    CompletionLogprobs,
    PromptTokensDetails,
    TopLogprob,
    Usage,
)
from motet.types import Delta, TokenLogprob

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity
Choice = ChatChoice | ChatChunkChoice | CompletionChoice


@dataclass
class Gathered:
    """What one choice has said."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str = "length"


class Tally:
    """Counts the tokens of a job while its deltas pass."""

    def __init__(self, job: Job) -> None:
        self._n = job.n
        self._prompt_tokens = job.prompt_tokens
        self._generated = 0
        self._cached: dict[int, int] = {}  # by choice

    def add(self, delta: Delta) -> None:
        self._generated += len(delta.token_ids)
        self._cached[delta.index] = max(self._cached.get(delta.index, 0), delta.cached_tokens)

    @property
    def cached_tokens(self) -> int:
        """Of each prompt, what was cached before any of its choices began: the least that one found."""
        per_prompt: dict[int, int] = {}
        for index, cached in self._cached.items():
            prompt = index // self._n
            per_prompt[prompt] = min(per_prompt.get(prompt, cached), cached)
        return sum(per_prompt.values())

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._generated,
            total_tokens=self._prompt_tokens + self._generated,
            prompt_tokens_details=PromptTokensDetails(self.cached_tokens),
        )


class Writer(ABC):
    """Writes the answer to one job; `decode_token` gives the text of a token for log-probabilities."""

    kind: str
    chunk_kind: str

    def __init__(self, job: Job, decode_token: Callable[[int], str]) -> None:
        self._job = job
        self._decode = decode_token
        self._created = int(time.time())
        self._chunk_usage: UnsetType | None = None if job.include_usage else UNSET

    @property
    def choices(self) -> int:
        return len(self._job.prompts) * self._job.n

    @property
    def with_logprobs(self) -> bool:
        return self._job.prompts[0].params.logprobs is not None

    def opening(self) -> list[Answer[Choice]]:
        """The chunks that come before the first delta."""
        return []

    @abstractmethod
    def chunks(self, delta: Delta) -> list[Answer[Choice]]:
        """The chunks that say `delta`; none if it has nothing to say yet."""

    @abstractmethod
    def choice(self, index: int, gathered: Gathered) -> Choice:
        """One choice of a whole answer."""

    def closing(self, usage: Usage) -> Answer[Choice]:
        """The chunk after the last delta that reports usage."""
        return self._envelope(self.chunk_kind, [], usage)

    def whole(self, gathered: Iterable[Gathered], usage: Usage) -> Answer[Choice]:
        """The answer in one piece."""
        return self._envelope(self.kind, [self.choice(i, g) for i, g in enumerate(gathered)], usage)

    def _chunk(self, choice: Choice) -> Answer[Choice]:
        return self._envelope(self.chunk_kind, [choice], self._chunk_usage)

    def _envelope(self, kind: str, choices: list[Choice], usage: Usage | UnsetType | None) -> Answer[Choice]:
        job = self._job
        return Answer(job.id, kind, self._created, job.model, job.fingerprint, choices, usage)


class ChatWriter(Writer):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self) -> list[Answer[Choice]]:
        role = ChatDelta(role="assistant", content="")
        return [self._chunk(ChatChunkChoice(index, role)) for index in range(self.choices)]

    def chunks(self, delta: Delta) -> list[Answer[Choice]]:
        said: list[Answer[Choice]] = []
        logprobs = self._logprobs(delta.logprobs) if self.with_logprobs and delta.logprobs else None
        if delta.text or logprobs:
            said.append(self._chunk(ChatChunkChoice(delta.index, ChatDelta(content=delta.text), logprobs)))
        if delta.finish:
            said.append(self._chunk(ChatChunkChoice(delta.index, ChatDelta(), None, delta.finish)))
        return said

    def choice(self, index: int, gathered: Gathered) -> ChatChoice:
        logprobs = self._logprobs(gathered.logprobs) if self.with_logprobs else None
        return ChatChoice(index, ChatMessage(gathered.text), logprobs, gathered.finish)

    def _logprobs(self, logprobs: Iterable[TokenLogprob]) -> ChatLogprobs:
        return ChatLogprobs([self._token(logprob) for logprob in logprobs])

    def _token(self, chosen: TokenLogprob) -> ChatTokenLogprob:
        best = self._alternative(chosen.token_id, chosen.logprob)
        return ChatTokenLogprob(
            best.token,
            best.logprob,
            best.bytes,
            [self._alternative(token, logprob) for token, logprob in chosen.top],
        )

    def _alternative(self, token_id: int, logprob: float) -> TopLogprob:
        token = self._decode(token_id)
        partial = "\N{REPLACEMENT CHARACTER}" in token
        return TopLogprob(token, _finite(logprob), None if partial else list(token.encode()))


class CompletionWriter(Writer):
    kind = chunk_kind = "text_completion"

    def __init__(self, job: Job, decode_token: Callable[[int], str]) -> None:
        super().__init__(job, decode_token)
        self._offsets: dict[int, int] = {}  # by choice: characters of token text so far

    def chunks(self, delta: Delta) -> list[Answer[Choice]]:
        if not (delta.text or delta.finish or (self.with_logprobs and delta.logprobs)):
            return []
        reported = delta.logprobs if self.with_logprobs else ()
        logprobs = self._logprobs(delta.index, reported) if reported else None
        return [self._chunk(CompletionChoice(delta.index, delta.text, logprobs, delta.finish))]

    def choice(self, index: int, gathered: Gathered) -> CompletionChoice:
        logprobs = self._logprobs(index, gathered.logprobs) if self.with_logprobs else None
        return CompletionChoice(index, gathered.text, logprobs, gathered.finish)

    def _logprobs(self, index: int, logprobs: Iterable[TokenLogprob]) -> CompletionLogprobs:
        columns = CompletionLogprobs([], [], [], [])
        for chosen in logprobs:
            token, logprob = self._decode(chosen.token_id), _finite(chosen.logprob)
            top: dict[str, float] = {}
            for other, value in (*chosen.top, (chosen.token_id, logprob)):
                top.setdefault(self._decode(other), _finite(value))
            columns.tokens.append(token)
            columns.token_logprobs.append(logprob)
            columns.top_logprobs.append(top)
            columns.text_offset.append(self._offsets.get(index, 0))
            self._offsets[index] = columns.text_offset[-1] + len(token)
        return columns


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
