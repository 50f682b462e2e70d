"""What the server may ask of the rooms below it, so that it can be written and tested without an engine.

`Generator` turns prompts into text (`engine.frontend.Frontend`, over the engine process); `AdapterHost` knows
which models are served (`registry.catalog.Catalog`). No torch here: the HTTP process imports this module.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from motet.types import ANYBODY, Account, AdapterRecord, Delta, EngineStats, ModelSpec, SamplingParams


class Generator(Protocol):
    """Text and tokens in, deltas out."""

    @property
    def alive(self) -> bool:
        """The engine process is up."""
        ...

    @property
    def ready(self) -> bool:
        """The engine is warm and serves."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: list[dict[str, object]]) -> list[int]:
        """Apply the model's chat template. Raises InvalidRequest for messages that the template refuses."""
        ...

    def decode_token(self, token_id: int) -> str: ...

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        adapter: str,
        request_id: str,
        account: Account = ANYBODY,
    ) -> AsyncIterator[Delta]:
        """Yield the deltas of all `params.n` choices interleaved; each choice ends with exactly one that has
        `finish`.

        Raises MotetError before the first delta for bad input. Closing the iterator (`aclose`, or cancelling
        the task that awaits it) aborts the request in the engine.
        """
        ...

    async def stats(self) -> EngineStats: ...

    async def prefetch(self, adapter: str) -> None:
        """Bring an adapter, by digest, into the pool soon, if there is room that nobody wants."""
        ...

    async def pin_adapter(self, adapter: str, pinned: bool) -> None:
        """Never evict an adapter, or do so again. Raises CapacityExceeded if all that is pinned would take too much."""
        ...


class AdapterHost(Protocol):
    """The served models: one base, and adapters whose names point at digests."""

    @property
    def base(self) -> str:
        """The served name of the base model."""
        ...

    @property
    def root(self) -> str:
        """The path of the base model as it was given."""
        ...

    @property
    def created(self) -> float:
        """When the base began to be served, unix time in seconds."""
        ...

    @property
    def spec(self) -> ModelSpec: ...

    async def load(self, name: str, path: str, *, replace: bool = False) -> AdapterRecord: ...

    async def unload(self, name: str) -> AdapterRecord: ...

    async def want(self, name: str, tenant: str | None = None) -> None:
        """Make `name` known, where there is a place to look for names that are not served yet."""
        ...

    def resolve(self, name: str, user: str = "", tenant: str | None = None) -> AdapterRecord | None:
        """The adapter of this name; None is the base. Raises ModelNotFound that lists what exists.

        An alias may stand for another adapter with each `user`, always the same. Raises what a policy has against
        serving it to `tenant` (None: to anybody at all).
        """
        ...

    def hold(
        self, name: str, user: str = "", tenant: str | None = None
    ) -> AbstractContextManager[AdapterRecord | None]:
        """`resolve`, and the engine keeps accepting the digest until the block ends, wherever the name goes."""
        ...

    def records(self, tenant: str | None = None) -> list[AdapterRecord]:
        """All adapters, aliases among them; of those that a policy judges, what exists for `tenant`."""
        ...
