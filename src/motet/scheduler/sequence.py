"""The mutable state of one sequence. Only the scheduler changes it; the sampler reads its tokens."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from motet.scheduler.admission import longest_kv, pages_for
from motet.scheduler.blocks import BlockTables, KVLayout
from motet.types import PENDING, Chunk, FinishReason, Request, Sampled, SeqOutput


@dataclass(slots=True, eq=False)
class SequenceState:
    """One request from `add` to its terminal output.

    `tokens` are all known tokens, prompt and generated, and `pending` more are being chosen by steps whose results
    are not in yet. `computed` of all of these have their KV in the pages of `blocks`, or will have it once the steps
    planned so far have run; a waiting sequence has no pages. `keys` are the prefix keys of its full blocks as far as
    they have been hashed, the first `indexed` of which the prefix index has seen in these pages. `max_blocks`
    is the longest that a block table can become, `max_pages` how many pages it can ever have at a time.
    `cached_tokens` is what its first admission found in the prefix index, `admitted` says that it has been.
    `flow` is its class, tenant and adapter; of one flow the oldest always comes first.
    `passed` counts the schedule calls of this wait in which it lacked pages. A `paused` one runs, but does not
    hold its adapter.
    """

    id: int
    request: Request
    flow: tuple[int, str, str]
    tokens: list[int]
    blocks: BlockTables
    max_blocks: int
    max_pages: int
    pending: int = 0
    computed: int = 0
    keys: list[bytes] = field(default_factory=list)
    indexed: int = 0
    cached_tokens: int = 0
    admitted: bool = False
    passed: int = 0
    paused: bool = False

    @classmethod
    def of(cls, id: int, request: Request, layout: KVLayout) -> SequenceState:
        longest = longest_kv(len(request.prompt), request.params.max_tokens)
        return cls(
            id,
            request,
            (request.account.priority, request.account.tenant, request.adapter),
            tokens=list(request.prompt),
            blocks=BlockTables(layout, layout.no_blocks),
            max_blocks=pages_for(longest, layout.page_tokens),
            max_pages=layout.most_pages(longest),
        )

    @property
    def adapter(self) -> str:
        return self.request.adapter

    @property
    def seniority(self) -> tuple[int, float, int]:
        """Sorts the oldest of the highest class first; pages are taken from the youngest."""
        return -self.request.account.priority, self.request.arrival, self.id

    @property
    def is_running(self) -> bool:
        return bool(self.blocks.tables[0])

    @property
    def length(self) -> int:
        """Tokens of it, known or pending."""
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens still to compute; 1 once the sequence is past its prompt."""
        return self.length - self.computed

    @property
    def is_complete(self) -> bool:
        """Whether it has all the tokens that it may have, so that there is nothing to compute."""
        return self.length - len(self.request.prompt) >= self.request.params.max_tokens

    @property
    def position(self) -> int:
        """How many tokens were generated before the one that the last plan chooses."""
        return self.length - len(self.request.prompt) - 1

    @property
    def headroom(self) -> int:
        """Pages that it may soon ask for: those of its prompt, and one per group that may grow past it."""
        return self.blocks.to_come(self.length, self.computed) + self.blocks.may_grow(self.max_blocks)

    def chunk(self, end: int) -> Chunk:
        """The next tokens to compute, those before `end`."""
        unknown = max(0, end - len(self.tokens))
        return Chunk(
            seq=self.id,
            tokens=(*self.tokens[self.computed : end], *(PENDING,) * unknown),
            start=self.computed,
            pages=self.blocks.tables,
            adapter=self.request.adapter,
            sample=end == self.length,
        )

    def append(self, sample: Sampled, eos_token_ids: Container[int]) -> SeqOutput:
        """A pending token is known: say what the request gets of it."""
        self.tokens.append(sample.token_id)
        self.pending -= 1
        generated = len(self.tokens) - len(self.request.prompt)
        return SeqOutput(
            self.request.id,
            token_ids=(sample.token_id,),
            logprobs=() if sample.logprob is None else (sample.logprob,),
            finish=self._finish(sample.token_id, generated, eos_token_ids),
            cached_tokens=self.cached_tokens if generated == 1 else 0,
        )

    def _finish(self, token: int, generated: int, eos_token_ids: Container[int]) -> FinishReason | None:
        """Why the sequence ends with this token, if it does.

        `max_tokens` bounds the length alone: no request is accepted with which it could pass max_model_len.
        """
        params = self.request.params
        if token in params.stop_token_ids or (token in eos_token_ids and not params.ignore_eos):
            return "stop"
        return "length" if generated >= params.max_tokens else None
