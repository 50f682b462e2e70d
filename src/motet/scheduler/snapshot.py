"""What an observer sees of the scheduler."""

from __future__ import annotations

from collections import Counter

from motet.scheduler.stage import Stage
from motet.types import EngineStats


def snapshot(stage: Stage, steps: int) -> EngineStats:
    """Counts of requests and pages, the scheduler's counters, and who is in the pool."""
    pages, residency = stage.room.pages, stage.room.residency
    return EngineStats(
        running=len(stage.running),
        waiting=len(stage.waiting),
        total_pages=pages.num_pages,
        free_pages=pages.free,
        kv_pages=pages.held("kv"),
        cached_pages=pages.held("cached"),
        adapter_pages=pages.held("adapter"),
        steps=steps,
        preemptions=stage.preemptions,
        pauses=stage.turns.pauses,
        prefix_hit_tokens=stage.prefix_hits,
        prefix_query_tokens=stage.prefix_queries,
        evictions=residency.evictions,
        loads=residency.loads,
        residency=dict(residency.states()),
        adapter_requests=residency.ghosts.requests,
        adapter_hits_by_pages=residency.ghosts.hits(),
        running_by_adapter=Counter(seq.adapter for seq in stage.running),
        waiting_by_adapter=Counter(seq.adapter for seq in stage.waiting),
    )
