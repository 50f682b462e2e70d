"""The vocabulary of the house: complete, immutable values that travel from room to room.

Request → Plan → Sampled → SeqOutput → Delta. They are msgspec structs, so that the same value crosses
the socket between the server and the engine process without a second definition.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]
BASE = ""  # the digest of "no adapter"


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A frozen value; unknown fields are errors."""


class SamplingParams(Struct, frozen=True):
    """How tokens are chosen. Fields carry OpenAI's names and meanings where OpenAI has them.

    `temperature` 0 is greedy. `top_k` 0 means all. `seed` None draws one. `logprobs` is how many alternatives to
    report per token (0 reports just the chosen token, None nothing). `stop` strings end the text before them;
    `stop_token_ids` end it after the token. The end-of-sequence ids of the model stop too unless `ignore_eos`.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1


class Account(Struct, frozen=True):
    """Whom a request's cost is charged to.

    Tenants share what a priority class is served in proportion to their weights; a higher `priority` comes first,
    always. KV is reused only between requests of the same `salt`, so that nobody learns from the time an answer takes
    what others asked.
    """

    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    salt: str = ""


ANYBODY = Account()
"""Where nobody is told apart."""


class Request(Struct, frozen=True):
    """One sequence to generate: `n` choices of one HTTP request are `n` of these.

    `adapter` is a digest, or BASE. `arrival` is a monotonic time in seconds.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    adapter: str = BASE
    arrival: float = 0.0
    account: Account = ANYBODY


class TokenLogprob(Struct, frozen=True):
    """The natural log-probability of one sampled token and of the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SeqOutput(Struct, frozen=True):
    """What one engine step gave one sequence. `finish` is set exactly once, on the last output of a request.

    With finish "error", `error` is the message and `code` the word of the error's class. The first output of a request
    says in `queue_seconds` how long it waited to be scheduled, and in `prefill_seconds` how long its first token took
    from there. `at` is when the engine had these tokens, on the clock of `Request.arrival`.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    error: str | None = None
    code: str | None = None
    cached_tokens: int = 0
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    at: float | None = None


PENDING = -1
"""In a chunk: the token that the step before chooses for this sequence, not known yet."""


class Chunk(Struct, frozen=True):
    """The share of one sequence in a step: compute tokens [start, start + len(tokens)) of it.

    The last token may be PENDING.

    `pages` has one block table for each of the model's KV groups: entry i is the page of tokens
    [i · page tokens, (i + 1) · page tokens), or -1 where no query of this step or a later one reads them.
    `sample` says that the last row's logits choose the next token.
    """

    seq: int
    tokens: tuple[int, ...]
    start: int
    pages: tuple[tuple[int, ...], ...]
    adapter: str
    sample: bool


class Sampled(Struct, frozen=True):
    """The token that a step chose for sequence `seq`."""

    seq: int
    token_id: int
    logprob: TokenLogprob | None = None


class Load(Struct, frozen=True):
    """An adapter to copy into `pages` of the pool, in image order, beside the step loop."""

    digest: str
    pages: tuple[int, ...]


class Plan(Struct, frozen=True):
    """One step, decided and not yet executed: adapters to drop, loads to start, tokens to compute, in this order.

    `remakes` are adapters whose packed images are to be made again from their sources meanwhile.
    """

    evictions: tuple[str, ...] = ()
    loads: tuple[Load, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    remakes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)


class Site(Struct, frozen=True):
    """A linear map of the base model that an adapter may change.

    `module` is one of q k v o (latent attention: q q_a q_b kv_a kv_b o), gate up down, router, shared_gate shared_up
    shared_down, and outside the layers embed and head. `expert` is -1 outside the experts of MoE layers. Shapes are
    features; the embedding maps one-hot tokens to hidden states. `paths` are the names under which PEFT files know it,
    without the `base_model.model.` prefix. `layer` is -1 for embed, the number of layers for head.
    """

    layer: int
    module: str
    expert: int
    in_features: int
    out_features: int
    paths: tuple[str, ...]

    def __str__(self) -> str:
        if self.module in ("embed", "head"):
            return self.module
        expert = f".experts.{self.expert}" if self.expert >= 0 else ""
        return f"layers.{self.layer}{expert}.{self.module}"


class FusedExperts(Struct, frozen=True):
    """A module whose 3-D parameters hold all experts of a layer, as PEFT's `target_parameters` adapts them.

    `gate_up_proj` is [E, 2I, H] and `down_proj` [E, H, I]; with `transposed` they are [E, H, 2I] and [E, I, H]. Of the
    2I outputs gate takes the first half and up the second; with `interleaved` the even and the odd ones.
    """

    path: str
    layer: int
    num_experts: int
    transposed: bool = False
    interleaved: bool = False


class KVGroup(Struct, frozen=True):
    """Layers whose KV is kept equally long: a page of the pool holds some tokens of all of them.

    A query at position p reads the keys [first_key(p), p]: all of them, or the last `window`, or those of its own
    `chunk` of positions. 0 means no such bound.
    """

    layers: tuple[int, ...]
    window: int = 0
    chunk: int = 0

    def first_key(self, position: int) -> int:
        """The first position that a query at `position` reads; never falls as positions grow."""
        first = max(0, position - self.window + 1) if self.window else 0
        return max(first, position // self.chunk * self.chunk) if self.chunk else first


FULL = KVGroup(())
"""How far a layer sees that sees every position before it."""


class ModelSpec(Struct, frozen=True):
    """Everything about a base model that can be known without its weights.

    `sites` is ordered by layer, maps that read the same input side by side; a site's position in it is its index in
    the adapter table. A token's KV in one layer is [kv_planes, num_kv_heads, head_dim] numbers (keys and values, or one
    plane of latents); `kv_groups` all have the same number of layers and together each layer once.
    """

    architecture: str
    name: str
    digest: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    num_experts: int
    eos_token_ids: tuple[int, ...]
    kv_groups: tuple[KVGroup, ...]
    sites: tuple[Site, ...]
    fused: tuple[FusedExperts, ...] = ()
    kv_planes: int = 2


class PreparedAdapter(Struct, frozen=True):
    """An adapter that was checked, digested and packed: what is known of it before it has a name.

    `image` is the path of the packed image, `source` the directory that it was made from; `rank` the highest of its
    modules; `size_bytes` what it takes in the pool.
    """

    digest: str
    image: str
    rank: int
    num_parameters: int
    num_pages: int
    size_bytes: int
    source: str = ""


class AdapterRecord(Struct, frozen=True):
    """A served adapter: a name that points at a digest, and what an operator wants to know of it.

    `rank` is the highest of its modules; `size_bytes` what it takes in the pool; `created` is unix time in seconds;
    `image` the path of the packed image.
    """

    name: str
    digest: str
    source: str
    image: str
    rank: int
    num_parameters: int
    size_bytes: int
    num_pages: int
    created: float


class TierStats(Struct, frozen=True):
    """A tier of adapters' weights: what is in it now, and what has happened since the start.

    `hits` are loads into the tier above that found the adapter here, `loads` those that brought it here, in
    `load_seconds` together. `max_bytes` is the budget.
    """

    resident: int = 0
    bytes: int = 0
    max_bytes: int = 0
    hits: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    evictions: int = 0


class EngineStats(Struct, frozen=True):
    """A snapshot of the engine for metrics and health. Pages are counts of pool pages.

    `workspace_bytes` is what else a GPU's memory held when the engine was ready: activations, graphs, compiled code.
    `prefill_seconds` and `decode_seconds` are what steps with prompts and steps without took; on a GPU most
    replay a graph that was captured, and so compiled, before.
    `adapter_hits_by_pages` estimates for eleven sizes how many of the `adapter_requests` would have found their adapter
    at hand if adapters had a pool of so many pages to themselves.
    `residency` maps digest → absent, loading, remaking, ready or draining; the counters only grow. `tiers` are pool,
    host (if there is one) and disk; of the disk an engine alone knows only the hits.
    """

    running: int = 0
    waiting: int = 0
    total_pages: int = 0
    free_pages: int = 0
    kv_pages: int = 0
    cached_pages: int = 0
    adapter_pages: int = 0
    page_bytes: int = 0
    weight_bytes: int = 0
    workspace_bytes: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    graph_replays: int = 0
    graph_captures: int = 0
    preemptions: int = 0
    pauses: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    evictions: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    adapter_requests: int = 0
    adapter_hits_by_pages: dict[int, int] = {}
    residency: dict[str, str] = {}
    tiers: dict[str, TierStats] = {}
    loads_by_adapter: dict[str, int] = {}
    pinned: tuple[str, ...] = ()
    running_by_adapter: dict[str, int] = {}
    waiting_by_adapter: dict[str, int] = {}


class Delta(Struct, frozen=True):
    """A piece of the answer to one request: text that is final, its tokens, and at the end why it stopped.

    `queue_seconds`, `prefill_seconds` and `at` are those of SeqOutput.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    at: float | None = None
