"""An engine around a scheduler, with a pool that remembers what was written to it.

The pool is a list of slots. In each KV group, computing a chunk writes its tokens through the block table and
reads every position that one of its queries reads; loading an adapter writes its pages. A slot remembers its
group and the whole history of its token (salt, adapter, then every token up to it, as a node of a trie), so that one
wrong page anywhere fails the next read. The sampled token is a function of that history: every output must
equal the one that the request gets alone.
"""

from __future__ import annotations

from collections import Counter

from motet.errors import CapacityExceeded, InvalidRequest
from motet.scheduler import waiting
from motet.scheduler.scheduler import Scheduler, SchedulerConfig
from motet.scheduler.sequence import SequenceState
from motet.scheduler.waiting import by_seniority
from motet.types import (
    ANYBODY,
    BASE,
    PENDING,
    Account,
    Chunk,
    KVGroup,
    Plan,
    Request,
    Sampled,
    SamplingParams,
    SeqOutput,
)

VOCAB = 61
EOS = 0


def is_bounded(group: KVGroup) -> bool:
    return bool(group.window or group.chunk)


def first_read(group: KVGroup, query: int) -> int:
    """The first position that a query reads, by the definition of windows and chunks."""
    return next(
        key
        for key in range(query + 1)
        if (not group.window or query - key < group.window)
        and (not group.chunk or query // group.chunk == key // group.chunk)
    )


def flow(seq: SequenceState) -> tuple[Account, str]:
    """What is served in the order of arrival."""
    account = seq.request.account
    return account, seq.adapter if account.tenant else BASE


class History:
    """A trie of (salt, adapter, tokens): equal nodes mean equal histories."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, str | int], int] = {}

    def node(self, parent: int, step: str | int) -> int:
        return self._nodes.setdefault((parent, step), len(self._nodes) + 1)

    @staticmethod
    def next_token(node: int) -> int:
        return (node * 2654435761 >> 9) % VOCAB


class Told:
    """What the simulation knows of one request: all its tokens with their nodes, and how it ended."""

    def __init__(self, request: Request, history: History) -> None:
        self.request = request
        self.history = history
        self.last = history.node(history.node(0, request.account.salt), request.adapter)
        self.tokens: list[int] = []
        self.nodes: list[int] = []
        for token in request.prompt:
            self.extend(token)
        self.finish: str | None = None
        self.started = False

    def extend(self, token: int) -> None:
        self.last = self.history.node(self.last, token)
        self.tokens.append(token)
        self.nodes.append(self.last)

    @property
    def expected_finish(self) -> str | None:
        """Why the request should have ended with its last token."""
        params = self.request.params
        if self.tokens[-1] in params.stop_token_ids or (self.tokens[-1] == EOS and not params.ignore_eos):
            return "stop"
        return "length" if len(self.tokens) - len(self.request.prompt) == params.max_tokens else None


class Simulation:
    """An engine around a scheduler: executes plans against the remembering pool and checks all it sees.

    With `ahead` a plan is executed when the next one has been made, as an engine does that keeps its device busy.
    """

    def __init__(self, config: SchedulerConfig, num_pages: int, ahead: bool = False) -> None:
        self.config = config
        self.ahead = ahead
        self.flying: tuple[Plan, list[Sampled]] | None = None
        self.scheduler = Scheduler(config, num_pages)
        self.history = History()
        self.memory: list[list[object]] = [[None] * config.page_tokens for _ in range(num_pages)]
        self.table: dict[str, tuple[int, ...]] = {}
        self.loading: dict[str, tuple[int, ...]] = {}
        self.remaking: str | None = None
        self.told: dict[str, Told] = {}
        self.by_seq: dict[int, Told] = {}
        self.chosen: dict[int, int] = {}  # by sequence: the token that the last plan chose
        self.passes: Counter[int] = Counter()
        self.pauses = 0
        self.now = 0.0

    # What happens between steps

    @property
    def live(self) -> list[Told]:
        return [told for told in self.told.values() if told.finish is None]

    def arrive(
        self, prompt: tuple[int, ...], adapter: str, params: SamplingParams, account: Account = ANYBODY
    ) -> None:
        request = Request(f"r{len(self.told)}", prompt, params, adapter, self.now, account)
        try:
            seq = self.scheduler.add(request)
        except (InvalidRequest, CapacityExceeded):
            return
        self.by_seq[seq] = self.told[request.id] = Told(request, self.history)

    def abort(self, told: Told) -> None:
        output = self.scheduler.abort(told.request.id)
        assert output is not None
        self.take(output)
        assert told.finish == "abort"
        assert self.scheduler.abort(told.request.id) is None

    def end_load(self, digest: str, ok: bool) -> None:
        pages = self.loading.pop(digest)
        if ok:
            self.write_adapter(digest, pages)
            self.table[digest] = pages
            self.scheduler.adapter_loaded(digest)
            return
        self.take_failure(digest, self.scheduler.adapter_failed(digest, "disk on fire"))
        assert not any(told.request.adapter == digest for told in self.live)

    def miss(self, digest: str) -> None:
        """The load finds no image."""
        del self.loading[digest]
        held = self.scheduler.stats().adapter_pages
        self.take_failure(digest, self.scheduler.adapter_missing(digest, "disk on fire"))
        assert self.scheduler.stats().adapter_pages < held

    def remade(self, ok: bool) -> None:
        """The image that is being made again is there, or cannot be."""
        digest, self.remaking = self.remaking, None
        assert digest is not None
        self.take_failure(digest, self.scheduler.image_remade(digest, None if ok else "disk on fire"))

    def take_failure(self, digest: str, outputs: list[SeqOutput]) -> None:
        for output in outputs:
            assert (output.finish, output.error) == ("error", "disk on fire")
            assert self.told[output.request_id].request.adapter == digest
            self.take(output)

    def take(self, output: SeqOutput) -> None:
        told = self.told[output.request_id]
        assert told.finish is None, "an output after the terminal one"
        assert not output.cached_tokens or not told.started
        assert output.cached_tokens < len(told.request.prompt)
        for token in output.token_ids:
            assert token == History.next_token(told.last), "not what the request gets alone"
            told.extend(token)
            told.started = True
        if output.token_ids:
            assert output.finish == told.expected_finish
        told.finish = output.finish

    # The step

    def step(self) -> Plan:
        self.now += 0.02
        before = set(self.scheduler._waiting)
        coming = {s.adapter for s in before if self.scheduler._residency.is_on_its_way(s.adapter)}
        was_busy = self.scheduler._loads.is_busy
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        self.check_passes(before, coming, was_busy, plan)
        for digest in plan.evictions:
            del self.table[digest]
        for load in plan.loads:
            assert load.digest not in self.table
            assert load.digest not in self.loading
            self.loading[load.digest] = load.pages
            self.write_adapter(load.digest, load.pages[: len(load.pages) // 2])
        most = self.config.max_resident
        assert most is None or len(self.table) + len(self.loading) <= most
        for digest in plan.remakes:
            assert self.remaking is None, "one at a time"
            self.remaking = digest
        self.check_disjoint(plan)
        sampled = [
            Sampled(chunk.seq, token) for chunk in plan.chunks if (token := self.compute(chunk)) is not None
        ]
        self.chosen = {sample.seq: sample.token_id for sample in sampled}
        landing, self.flying = self.flying, (plan, sampled) if plan.chunks else None
        waits = landing is None and not plan.chunks
        self.land(landing)
        if not self.ahead:
            landing, self.flying = self.flying, None
            self.land(landing)
        self.check_after(waits)
        return plan

    def land(self, flight: tuple[Plan, list[Sampled]] | None) -> None:
        if flight is not None:
            for output in self.scheduler.commit(*flight):
                self.take(output)

    def write_adapter(self, digest: str, pages: tuple[int, ...]) -> None:
        for index, page in enumerate(pages):
            self.memory[page] = [(digest, index)] * self.config.page_tokens

    def compute(self, chunk: Chunk) -> int | None:
        told = self.by_seq[chunk.seq]
        end = chunk.start + len(chunk.tokens)
        assert told.finish is None
        assert chunk.adapter == told.request.adapter
        known, nodes = list(told.tokens), list(told.nodes)
        if chunk.tokens[-1] == PENDING:
            known.append(self.chosen[chunk.seq])
            nodes.append(self.history.node(nodes[-1], known[-1]))
        assert [*chunk.tokens[:-1], known[end - 1]] == known[chunk.start : end]
        assert chunk.tokens[-1] in (known[end - 1], PENDING)
        assert chunk.sample == (end == len(known))
        if chunk.adapter != BASE:
            for index, page in enumerate(self.table[chunk.adapter]):
                assert set(self.memory[page]) == {(chunk.adapter, index)}, "an adapter in use was overwritten"
        for index, (group, table) in enumerate(zip(self.config.kv_groups, chunk.pages, strict=True)):
            self.attend(chunk, told, nodes, index, first_read(group, chunk.start), table)
        return History.next_token(nodes[-1]) if chunk.sample else None

    def attend(
        self, chunk: Chunk, told: Told, nodes: list[int], group: int, first: int, table: tuple[int, ...]
    ) -> None:
        """Write the chunk's KV of one group, then read all that its queries read."""
        size = self.config.page_tokens
        end = chunk.start + len(chunk.tokens)
        for position in range(chunk.start, end):
            self.memory[table[position // size]][position % size] = group, nodes[position]
        for position in range(first, end):
            assert self.memory[table[position // size]][position % size] == (group, nodes[position])
        for block, page in enumerate(table):
            assert (page == -1) == (block < first // size), (
                "a page is missing, or one is kept that nobody reads"
            )
        params = told.request.params
        longest = len(told.request.prompt) + params.max_tokens - 1
        if is_bounded(self.config.kv_groups[group]):
            longest = min(longest, chunk.start + self.config.max_step_tokens)
        assert len(table) <= -(-longest // size), "more pages than the chunk can need"

    def check_disjoint(self, plan: Plan) -> None:
        """Nobody writes where another reads, and adapters share their pages with nobody."""
        assert 0 <= plan.num_tokens <= self.config.max_step_tokens
        assert len({chunk.seq for chunk in plan.chunks}) == len(plan.chunks)
        weights = Counter(page for pages in (*self.table.values(), *self.loading.values()) for page in pages)
        assert not weights or max(weights.values()) == 1
        tables = [(chunk, table) for chunk in plan.chunks for table in chunk.pages]
        readers = Counter(page for _, table in tables for page in table if page != -1)
        assert not readers.keys() & weights.keys()
        for chunk, table in tables:
            assert chunk.tokens
            assert len({*table} - {-1}) == len(table) - table.count(-1)
            own = table[chunk.start // self.config.page_tokens :]
            assert all(readers[page] == 1 for page in own), "a page is written by one and held by another"

    def check_passes(self, before: set[SequenceState], coming: set[str], was_busy: bool, plan: Plan) -> None:
        """Count for each waiting request how often a younger one was given pages while it lacked them.

        One whose adapter is absent lacks nothing but its turn while others are copied. Those who were paused were given
        what they had before, and get no more when they come back.
        Of two tenants, or two adapters of a named one, the younger may be before the older.
        """
        queue = set(self.scheduler._waiting)
        started = {load.digest for load in plan.loads}
        returning = {seq.adapter for seq in self.scheduler._stage.running if seq.paused}
        resident = {BASE, *self.table}  # before this plan's evictions
        running = self.scheduler.stats().running
        full = running == self.config.max_running or plan.num_tokens == self.config.max_step_tokens
        full |= (
            self.scheduler.stats().pauses > self.pauses
        )  # the rows of who was paused in this step are left
        self.pauses = self.scheduler.stats().pauses
        admitted = [seq for seq in before if seq not in queue]
        fresh = started - returning
        asked = {digest: [s for s in before | queue if s.adapter == digest] for digest in fresh}
        loads = [
            min(group, key=by_seniority) for group in asked.values() if group
        ]  # the others are prefetched
        for seq in before:
            if seq not in queue:
                del self.passes[seq.id]
                continue
            if seq.adapter in coming | started:
                continue
            ready = seq.adapter in resident
            if not ready and any(s.seniority < seq.seniority for s in before if s.adapter == seq.adapter):
                continue
            behind = [load for load in loads if load.seniority > seq.seniority]
            if not ready and (was_busy or (self.scheduler._loads.is_busy and not behind)):
                continue  # it asked for nothing that it could have had
            given = admitted if ready and full else admitted + loads
            self.passes[seq.id] += any(
                other.seniority > seq.seniority and flow(other) == flow(seq) for other in given
            )
            assert self.passes[seq.id] < waiting.PATIENCE

    def check_after(self, waits: bool) -> None:
        self.scheduler.check_integrity()
        stats = self.scheduler.stats()
        assert stats.total_pages == (
            stats.free_pages + stats.kv_pages + stats.cached_pages + stats.adapter_pages
        )
        assert stats.running + stats.waiting == len(self.live)
        if self.live and waits:
            assert self.loading or self.remaking, "nothing to compute or under way, and yet requests wait"
            on_its_way = self.scheduler._residency.is_on_its_way
            assert self.loading or all(on_its_way(told.request.adapter) for told in self.live), (
                "an image that is made again holds up those who wait for something else"
            )

    def drain(self) -> None:
        """With no more arrivals everyone ends, and everything returns."""
        work = sum(len(told.tokens) + told.request.params.max_tokens for told in self.live)
        for _ in range(10 * work + 100):
            if not self.live and not self.loading and not self.remaking:
                break
            self.step()
            if self.remaking:
                self.remade(ok=True)
            for digest in list(self.loading):
                self.end_load(digest, ok=True)
        assert not self.live
        if self.scheduler.has_work:
            assert not self.step().chunks
        assert not self.scheduler.has_work
        stats = self.scheduler.stats()
        assert stats.kv_pages == 0
        assert stats.adapter_pages == sum(map(len, self.table.values()))
        assert all(told.finish for told in self.told.values())
