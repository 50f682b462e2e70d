"""Who is next, and who gives way: fair shares of time by counters, fair shares of space by what is held.

Time. Each tenant has a virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", 2024): the
cost of what it was served, divided by its weight. Of those who want something the tenant with the lowest counter comes
first, and within a tenant the adapter with the lowest. A higher priority class always comes first. But for the rest of
some steps (below) nobody is held back while there is room, so the device is never idle for fairness' sake. Requests
without a tenant are not told apart: all of them are one flow in the order of arrival, as are those of one tenant with
one adapter.

Bound on the service gap. While two tenants of a class both have a request that waits for its turn or a place, and not
for pages or a copy, what they are served in any interval, divided by their weights, differs by at most

    2 · (S + R) / the lower weight + C,

S being the most that a step can cost, R what the sequences that run at a time may still cost, and C the credit below.
For a tenant is given prompt tokens only while its counter is the lowest of these; a step's charges count from the next
step on (S), and who runs is decoded to the end whatever its counter (R).

Credit. Who was away comes back with the counter that it left with, or C less than the lowest of those who are there:
what it did not ask for it may have later, up to C. (The lowest, once reached, does not fall: newcomers do not pull each
other down.) Without that, a tenant that asks for little shares the steps of a prompt with those who always ask: with
prompts of four steps its p95 time to first token was 1.8 to 2.9 times that of being alone. C is the cost of sixteen
steps of prompts: eight were used up by the second of two prompts of seven steps, and the p95 was 1.4 to 1.9 times that
of being alone; now it is 1.2 to 1.4 (docs/fairness.md).

Rest. A prompt seldom ends just where a step does. If its tenant has nothing else that waits, and is more than a step's
cost ahead of the next one of its class, the rest of the step is not filled with prompts of others: left empty, it ends
sooner. Decode rows come first in every step, so they go on. The bound stands, for who has nothing that waits is none of
the two. For 25 tokens that are computed one may be left empty, and REST_STEPS steps of these be saved up.

Space. When a request in its turn lacks a place or pages, sequences of lower classes give way, then those of tenants
whose turn is later and that hold more than it would: of the tenant with the largest dominant share (Ghodsi et al.,
"Dominant Resource Fairness", 2011) of places and pages, divided by its weight. Each time the larger of two shares
becomes smaller than it was, so two tenants cannot take the same room from each other in turn.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from motet.scheduler.sequence import SequenceState
from motet.types import Account

Turn = tuple[int, float, float, float, int]
"""Sorts who comes first: class, counter of the tenant, counter of its adapter, arrival, id."""

REST_SHARE = 0.04  # of what is computed: throughput stays within 5 %, whatever a step takes
REST_STEPS = 4
_REMEMBERED = 256  # counters of those who left that are not worth a clean-up


class Counters:
    """Virtual token counters by name, of those who have work ("active") and of those ahead of them who left.

    What is charged counts after `settle`, in `settled`. Whoever becomes active is lifted to `credit` less than the
    lowest counter of the active ones: nobody saves up more turns by being away. Charges of the last step do not count
    in this, as the newcomer had no part in it; so it comes before those who were served in it.
    """

    def __init__(self, credit: float = 0.0) -> None:
        self._credit = credit
        self._time = 0.0
        self.settled: dict[str, float] = {}
        self._active: dict[str, int] = {}
        self._pending: dict[str, float] = {}

    def __len__(self) -> int:
        """How many are active."""
        return len(self._active)

    def enter(self, name: str) -> None:
        """It has one more request."""
        if name not in self._active:
            self.settled[name] = max(self.settled.get(name, 0.0), self._level())
            self._active[name] = 0
        self._active[name] += 1

    def leave(self, name: str) -> None:
        """It has one request less."""
        self._active[name] -= 1
        if not self._active[name]:
            del self._active[name]
            if len(self.settled) > 2 * len(self._active) + _REMEMBERED:
                self._forget()

    def charge(self, name: str, cost: float) -> None:
        self._pending[name] = self._pending.get(name, 0.0) + cost

    def settle(self) -> None:
        """Count what was charged."""
        for name, cost in self._pending.items():
            if name in self.settled:
                self.settled[name] += cost
        self._pending.clear()

    def _level(self) -> float:
        """What newcomers are lifted to. It never falls: their credit is not behind that of others."""
        self._time = max(self._time, min((self.settled[name] for name in self._active), default=0.0))
        return self._time - self._credit

    def _forget(self) -> None:
        """Those who are gone and would be lifted anyway."""
        level = self._level()
        self.settled = {
            name: counter
            for name, counter in self.settled.items()
            if name in self._active or counter + self._pending.get(name, 0.0) > level
        }


@dataclass(slots=True)
class _Class:
    """A priority class: its tenants, and the adapters of those tenants that are told apart."""

    tenants: Counters
    adapters: dict[str, Counters] = field(default_factory=dict)


class Ledger:
    """The counters of all classes; `credit` is that of tenants."""

    def __init__(self, credit: float = 0.0) -> None:
        self._classes: dict[int, _Class] = {}
        self._credit = credit

    @property
    def has_rivals(self) -> bool:
        """Is there more than one tenant or class with requests?"""
        return len(self._classes) > 1 or any(len(each.tenants) > 1 for each in self._classes.values())

    def enter(self, seq: SequenceState) -> None:
        """A request came."""
        account = seq.request.account
        found = self._classes.setdefault(account.priority, _Class(Counters(self._credit)))
        found.tenants.enter(account.tenant)
        if account.tenant:
            found.adapters.setdefault(account.tenant, Counters()).enter(seq.adapter)

    def leave(self, seq: SequenceState) -> None:
        """A request ended. A class or a tenant's adapters of which none is left start anew."""
        account = seq.request.account
        found = self._classes[account.priority]
        if account.tenant:
            adapters = found.adapters[account.tenant]
            adapters.leave(seq.adapter)
            if not adapters:
                del found.adapters[account.tenant]
        found.tenants.leave(account.tenant)
        if not found.tenants:
            del self._classes[account.priority]

    def charge(self, seq: SequenceState, cost: float) -> None:
        account = seq.request.account
        tenant = account.tenant
        found = self._classes[account.priority]
        found.tenants.charge(tenant, cost / account.weight)
        if tenant:
            found.adapters[tenant].charge(seq.request.adapter, cost)

    def settle(self) -> None:
        """Count what was charged since the last call."""
        for found in self._classes.values():
            found.tenants.settle()
            for adapters in found.adapters.values():
                adapters.settle()

    def lead(self, seq: SequenceState, other: SequenceState) -> float:
        """What `seq` may be charged before it is the turn of `other`; 0 if they are of two classes."""
        account, later = seq.request.account, other.request.account
        if account.priority != later.priority:
            return 0.0
        settled = self._classes[account.priority].tenants.settled
        return (settled[later.tenant] - settled[account.tenant]) * account.weight

    def turn(self, seq: SequenceState) -> Turn:
        request = seq.request
        account = request.account
        tenant = account.tenant
        found = self._classes[account.priority]
        adapter = found.adapters[tenant].settled[request.adapter] if tenant else 0.0
        return -account.priority, found.tenants.settled[tenant], adapter, request.arrival, seq.id


class Rest:
    """How much of a step may be left empty, so that it ends sooner for that one whose prompt ends with it.

    REST_SHARE of the tokens computed so far, saved up for REST_STEPS full steps at most.
    """

    def __init__(self, step_tokens: int) -> None:
        self._step_tokens = step_tokens
        self._saved = 0.0

    def may_be_left(self, tokens: int, lead: float) -> bool:
        """So many `tokens`, by who has this `lead` on the next."""
        return tokens <= self._saved and lead > self._step_tokens

    def count(self, computed: int, left: int) -> None:
        """A step computed so many tokens and left so many empty."""
        most = REST_STEPS * self._step_tokens
        self._saved = min(self._saved - left + REST_SHARE * computed, most)


@dataclass(frozen=True, slots=True)
class Space:
    """What sequences share: places in the batch and pages of the pool."""

    places: int
    pages: int


class _Holder:
    """The running sequences of one tenant in one class, by seniority, and what they hold."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self.sequences: list[SequenceState] = []
        self.pages = 0

    def share(self, space: Space, places: int = 0, pages: int = 0) -> float:
        """Its dominant share, with so much more."""
        held = (len(self.sequences) + places) / space.places, (self.pages + pages) / space.pages
        return max(held) / self.account.weight


def youngest(running: Iterable[SequenceState], space: Space) -> SequenceState:
    """Who gives way to a running sequence: of the lowest class, and in it of the largest share, the youngest."""
    holders = _holders(running).values()
    lowest = min(holder.account.priority for holder in holders)
    largest = max(
        (holder for holder in holders if holder.account.priority == lowest),
        key=lambda holder: holder.share(space),
    )
    return largest.sequences[-1]


@dataclass(frozen=True, slots=True)
class Want:
    """What a waiting sequence lacks, its turn (class and tenant's counter), and the `share` that it would have."""

    turn: tuple[int, float]
    share: float
    places: int
    pages: int

    def is_no_easier(self, other: Want) -> bool:
        """Is there nobody to give way to this one if there was nobody to give way to the other?

        Who must give way has a later turn, and in one class a larger share.
        """
        is_later = self.turn[0] > other.turn[0] or (self.turn >= other.turn and self.share >= other.share)
        return is_later and self.places >= other.places and self.pages >= other.pages


class Standings:
    """Who holds how much when a step begins: says without a search whether somebody might have to give way."""

    def __init__(
        self, running: Iterable[SequenceState], space: Space, turn: Callable[[SequenceState], Turn]
    ) -> None:
        self._space = space
        self._holders = _holders(running)
        ranks = sorted((turn(h.sequences[0])[:2], h.share(space)) for h in self._holders.values())
        self._turns = [turn for turn, _ in ranks]
        self._largest = list(accumulate((share for _, share in reversed(ranks)), max))[::-1]

    def share(self, account: Account, pages: int) -> float:
        """What a tenant would hold with a place and so many pages more."""
        own = self._holders.get((account.priority, account.tenant)) or _Holder(account)
        return own.share(self._space, 1, pages)

    def might_give_way(self, turn: tuple[int, float], share: float) -> bool:
        """Is there a lower class, or one whose turn is later and that holds a larger share?"""
        later = bisect_right(self._turns, turn)
        return later < len(self._turns) and (self._turns[-1][0] > turn[0] or self._largest[later] > share)


def who_gives_way(
    taker: SequenceState,
    running: Iterable[SequenceState],
    space: Space,
    *,
    pages: int,
    missing_places: int,
    missing_pages: int,
    freed: Callable[[SequenceState], int],
) -> list[SequenceState]:
    """Running sequences to preempt so that `taker` has its place and its `pages`: what is missing of them.

    None of them if those who must give way do not suffice; `freed` says how many pages come back with one.
    """
    holders = _holders(running)
    account = taker.request.account
    own = holders.get((account.priority, account.tenant)) or _Holder(account)
    chosen: list[SequenceState] = []
    while missing_places > len(chosen) or missing_pages > 0:
        rivals = [h for h in holders.values() if h.sequences and _must_give_way(h, own, space, pages)]
        if not rivals:
            return []
        rival = max(rivals, key=lambda holder: (-holder.account.priority, holder.share(space)))
        chosen.append(rival.sequences.pop())
        rival.pages -= chosen[-1].blocks.num_pages
        missing_pages -= freed(chosen[-1])
    return chosen


def _must_give_way(holder: _Holder, taker: _Holder, space: Space, pages: int) -> bool:
    if holder.account.priority != taker.account.priority:
        return holder.account.priority < taker.account.priority
    return holder is not taker and holder.share(space) > taker.share(space, 1, pages)


def _holders(running: Iterable[SequenceState]) -> dict[tuple[int, str], _Holder]:
    holders: dict[tuple[int, str], _Holder] = {}
    for seq in running:
        account = seq.request.account
        holder = holders.setdefault((account.priority, account.tenant), _Holder(account))
        holder.sequences.append(seq)
        holder.pages += seq.blocks.num_pages
    return holders
