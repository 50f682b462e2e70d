"""Which fine-tunes share GPUs and which get their own, and what that saves.

A fine-tune that would fill more than half of what a GPU may be filled to gets replicas of its own, merged into the
weights: two like it do not fit on one GPU. The others are put together, the largest first, each on the first GPU with
room for its load and for its adapter, which stays in memory. Every GPU is then simulated at its peak; what a GPU
turns out not to hold moves on to the next. Peaks are taken to coincide: the plan holds when all customers are busy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec

from motet.plan.fleet import Capacity, Fleet, Quality, Slo, capacity, settled
from motet.plan.simulate import Outcome, Served
from motet.plan.traffic import FineTune

FILL = 0.8
"""Of a GPU's capacity; the rest is for what no table of rates knows."""
HOURS = 730
"""In a month."""
SURGES = (1.25, 1.5, 2.0, 3.0)
"""Times the peak, of all fine-tunes of a GPU together."""
BURSTS = (2.0, 5.0, 10.0)
"""Times the peak, of its busiest fine-tune alone."""

Say = Callable[[str], None]


class Level(msgspec.Struct, frozen=True):
    """What requests get, seconds to the first token and tokens per second after it, and whether that is enough."""

    ttft_p50: float
    ttft_p95: float
    otps_p50: float
    otps_p5: float
    kept: bool

    @staticmethod
    def of(served: Sequence[Served], slo: Slo) -> Level:
        quality = Quality.of(served)
        return Level(
            quality.ttft_p50, quality.ttft_p95, quality.otps_p50, quality.otps_p5, quality.keeps(slo)
        )


class Burst(msgspec.Struct, frozen=True):
    """What becomes of a GPU's requests while `who` sends `factor` times its peak.

    None is all of them together, and `level` that of all; if one fine-tune does, it is that of the others.
    """

    who: str | None
    factor: float
    level: Level


class Placed(msgspec.Struct, frozen=True):
    """A GPU, or `replicas` like it. Memory in bytes: adapters are all of its own, KV is the most at a time at peak.

    `load` is the share of its capacity within the service level, `busy` the share of time in which it computes at all:
    one request by itself keeps a GPU busy and leaves nearly all of its capacity.
    """

    members: tuple[str, ...]
    shared: bool
    replicas: int
    load: float
    busy: float
    rows: float
    tokens_per_s: float
    level: Level
    weight_bytes: int
    adapter_bytes: int
    kv_bytes: int
    free_bytes: int
    bursts: tuple[Burst, ...] = ()


class Verdict(msgspec.Struct, frozen=True):
    """A fine-tune: GPUs that it fills merged into replicas of its own, and as an adapter; how it fares where it is.

    `own_otps` and `own_ttft` are those of a request alone on a GPU of its own, the best that there is.
    """

    name: str
    peak_rate: float
    own_load: float
    shared_load: float
    own_gpus: int
    shares: bool
    adapter_bytes: int
    own_ttft: float
    own_otps: float
    level: Level


class Plan(msgspec.Struct, frozen=True):
    """The plan and what it was made for. `saving` is per month."""

    model: str
    gpu: str
    price: float
    slo_ttft: float
    slo_otps: float
    dedicated_gpus: int
    planned_gpus: int
    saving: float
    fine_tunes: tuple[Verdict, ...]
    gpus: tuple[Placed, ...]
    notes: tuple[str, ...]


def make_plan(
    fleet: Fleet, mix: Sequence[FineTune], slo: Slo, price: float, say: Say = lambda _line: None
) -> Plan:
    """Raises ConfigError if a fine-tune cannot be served within `slo`, or not at all, on such a GPU."""
    say("capacity with adapters")
    shared = capacity(fleet, mix, True, slo)
    say("capacity of replicas of their own")
    own = capacity(fleet, mix, False, slo)
    shared_loads, own_loads = shared.loads(fleet.cost, mix), own.loads(fleet.cost, mix)
    small = [one for one in mix if shared_loads[one.name] <= FILL / 2]
    room = fleet.replica.num_pages - math.ceil(FILL * shared.outcome.kv_pages)
    placing = _Placing(fleet, slo, shared_loads, own_loads, room, say)
    placed, levels = placing.place(small, [one for one in mix if one not in small])
    verdicts = tuple(_verdict(fleet, one, own_loads, shared_loads, levels[one.name], placed) for one in mix)
    dedicated = sum(verdict.own_gpus for verdict in verdicts)
    planned = sum(one.replicas for one in placed)
    return Plan(
        model=fleet.sizes.spec.name,
        gpu=fleet.gpu.name,
        price=price,
        slo_ttft=slo.ttft,
        slo_otps=slo.otps,
        dedicated_gpus=dedicated,
        planned_gpus=planned,
        saving=(dedicated - planned) * price * HOURS,
        fine_tunes=verdicts,
        gpus=tuple(placed),
        notes=_notes(fleet, (shared, own), placed),
    )


def replicas_for(load: float) -> int:
    """GPUs for a fine-tune that has them to itself."""
    return max(1, math.ceil(load / FILL))


def pack(
    mix: Sequence[FineTune], loads: Mapping[str, float], pages: Mapping[str, int], room: int
) -> list[FineTune]:
    """The first GPU's: the largest loads first, as many as FILL and `room` pages of adapters allow, one at least."""
    taken: list[FineTune] = []
    load, used = 0.0, 0
    for one in sorted(mix, key=lambda one: -loads[one.name]):
        fits = load + loads[one.name] <= FILL and used + pages[one.name] <= room
        if fits or not taken:
            taken.append(one)
            load, used = load + loads[one.name], used + pages[one.name]
    return taken


class _Placing:
    """Placing under way."""

    def __init__(
        self,
        fleet: Fleet,
        slo: Slo,
        shared: Mapping[str, float],
        own: Mapping[str, float],
        room: int,
        say: Say,
    ) -> None:
        self._fleet = fleet
        self._slo = slo
        self._shared = shared
        self._own = own
        self._room = room
        self._say = say
        self._levels: dict[str, Level] = {}

    def place(
        self, small: list[FineTune], large: Sequence[FineTune]
    ) -> tuple[list[Placed], dict[str, Level]]:
        """GPUs that are shared, then those that are not; and each fine-tune's level."""
        placed = []
        pages = {one.name: self._fleet.adapter(one).num_pages for one in small}
        left, alone = list(small), list(large)
        while left:
            members = pack(left, self._shared, pages, self._room)
            outcome = self._serve(members)
            while len(members) > 1 and not self._level(outcome).kept:
                members.pop()
                outcome = self._serve(members)
            left = [one for one in left if one not in members]
            if len(members) == 1:  # nobody to share with
                alone += members
            else:
                placed.append(self._placed(members, True, 1, outcome))
        for one in alone:
            replicas = replicas_for(self._own[one.name])
            part = msgspec.structs.replace(one, rate=one.rate / replicas)
            self._say(f"a GPU of its own for {one.name}")
            placed.append(self._placed([part], False, replicas, self._fleet.serve([part], False, {})))
        return placed, self._levels

    def _serve(self, members: Sequence[FineTune]) -> Outcome:
        self._say(f"a GPU that {len(members)} share")
        return self._fleet.serve(members, True, {})

    def _level(self, outcome: Outcome) -> Level:
        return Level.of(settled(outcome), self._slo)

    def _placed(self, members: Sequence[FineTune], shared: bool, replicas: int, outcome: Outcome) -> Placed:
        fleet, served = self._fleet, settled(outcome)
        for one in members:
            own = [request for request in served if request.arrival.adapter == one.name]
            self._levels[one.name] = Level.of(own or served, self._slo)
        page, pool = fleet.sizes.page, fleet.replica.num_pages
        adapters = sum(fleet.adapter(one).num_pages for one in members) if shared else 0
        loads = [self._shared[one.name] if shared else self._own[one.name] / replicas for one in members]
        return Placed(
            members=tuple(one.name for one in members),
            shared=shared,
            replicas=replicas,
            load=sum(loads),
            busy=outcome.busy,
            rows=outcome.rows,
            tokens_per_s=outcome.tokens_per_s,
            level=self._level(outcome),
            weight_bytes=fleet.sizes.held(fleet.gpu),
            adapter_bytes=adapters * page,
            kv_bytes=outcome.kv_pages * page,
            free_bytes=(pool - adapters - outcome.kv_pages) * page,
            bursts=tuple(self._bursts(members, shared)),
        )

    def _bursts(self, members: Sequence[FineTune], shared: bool) -> list[Burst]:
        """All together, then the busiest alone."""
        names = [one.name for one in members]
        found: list[tuple[str | None, float, dict[str, float]]]
        found = [(None, factor, dict.fromkeys(names, factor)) for factor in SURGES]
        if shared:
            busiest = max(members, key=lambda one: self._shared[one.name]).name
            found += [(busiest, factor, {busiest: factor}) for factor in BURSTS]
        bursts = []
        for who, factor, factors in found:
            self._say(f"{who or 'all'} at {factor:g} times the peak")
            served = settled(self._fleet.serve(members, shared, factors))
            level = Level.of([one for one in served if one.arrival.adapter != who], self._slo)
            bursts.append(Burst(who, factor, level))
        return bursts


def _verdict(
    fleet: Fleet,
    one: FineTune,
    own: Mapping[str, float],
    shared: Mapping[str, float],
    level: Level,
    placed: Sequence[Placed],
) -> Verdict:
    alone = fleet.alone(one, False)
    return Verdict(
        name=one.name,
        peak_rate=one.peak_rate,
        own_load=own[one.name],
        shared_load=shared[one.name],
        own_gpus=replicas_for(own[one.name]),
        shares=any(gpu.shared and one.name in gpu.members for gpu in placed),
        adapter_bytes=fleet.sizes.adapter(one.rank, one.targets),
        own_ttft=alone.ttft_p50,
        own_otps=alone.otps_p50,
        level=level,
    )


def _notes(fleet: Fleet, capacities: Sequence[Capacity], placed: Sequence[Placed]) -> tuple[str, ...]:
    """What the reader must know of the figures."""
    curve, found = fleet.curve, []
    if curve.gpu.lower() != fleet.gpu.name.lower():
        found.append(
            f"Measured on {curve.gpu} only: times on {fleet.gpu.name} are scaled by memory bandwidth and arithmetic."
        )
    sizes = fleet.sizes
    if sizes.copies and sizes.held(fleet.gpu) == sizes.weights:
        found.append(
            f"A {fleet.gpu.name} has no room for bfloat16 copies of four-bit experts: prompts take longer than planned "
            "if the curve was measured with them."
        )
    most = max(*(one.outcome.rows for one in capacities), *(gpu.rows for gpu in placed))
    if most > curve.most_rows:
        found.append(
            f"Steps of up to {most:.0f} rows occur on average; the curve was measured up to {curve.most_rows}, "
            "beyond that it is extrapolated."
        )
    if any(not gpu.level.kept for gpu in placed):
        found.append("A GPU of its own does not keep the service level at this peak; see below.")
    return tuple(found)
