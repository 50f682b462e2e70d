"""Drives a scheduler by hand: short names for tests that look at one rule at a time."""

from __future__ import annotations

import random

from motet.scheduler.scheduler import Scheduler, SchedulerConfig
from motet.types import (
    ANYBODY,
    BASE,
    Account,
    Chunk,
    KVGroup,
    Plan,
    Request,
    Sampled,
    SamplingParams,
    SeqOutput,
)

EOS = 2
FULL = KVGroup(layers=(0,))


class Driver:
    """A scheduler with pages of 4 tokens, whose every sampled token is 9 unless the test says otherwise."""

    def __init__(
        self,
        num_pages: int = 50,
        max_step_tokens: int = 100,
        max_running: int = 10,
        max_model_len: int = 100,
        prefix_caching: bool = True,
        groups: tuple[KVGroup, ...] = (FULL,),
        max_resident: int | None = None,
    ) -> None:
        config = SchedulerConfig(
            kv_groups=groups,
            page_tokens=4,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            max_model_len=max_model_len,
            prefix_caching=prefix_caching,
            eos_token_ids=(EOS,),
            max_resident=max_resident,
        )
        self.scheduler = Scheduler(config, num_pages)
        self.names: dict[int, str] = {}
        self.now = 0.0

    def add(
        self,
        id: str,
        prompt: int | tuple[int, ...],
        max_tokens: int = 20,
        adapter: str = BASE,
        stop_token_ids: tuple[int, ...] = (),
        ignore_eos: bool = False,
        account: Account = ANYBODY,
    ) -> None:
        """A prompt given by its length is unlike that of any other id."""
        if isinstance(prompt, int):
            rng = random.Random(id)
            prompt = tuple(rng.randrange(10, 10**6) for _ in range(prompt))
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos)
        self.now += 1.0
        seq = self.scheduler.add(Request(id, prompt, params, adapter, self.now, account))
        self.names[seq] = id

    def plan(self) -> Plan:
        self.now += 1.0
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        return plan

    def commit(self, plan: Plan, token: int = 9) -> list[SeqOutput]:
        sampled = [Sampled(chunk.seq, token) for chunk in plan.chunks if chunk.sample]
        outputs = self.scheduler.commit(plan, sampled)
        self.scheduler.check_integrity()
        return outputs

    def step(self, token: int = 9) -> list[SeqOutput]:
        return self.commit(self.plan(), token)

    def run(self, steps: int) -> list[SeqOutput]:
        return [output for _ in range(steps) for output in self.step()]

    def finish(self, limit: int = 1000) -> list[SeqOutput]:
        """Step until nobody is left, ending every load at once."""
        outputs: list[SeqOutput] = []
        while self.scheduler.has_work:
            plan = self.plan()
            for load in plan.loads:
                self.scheduler.adapter_loaded(load.digest)
            outputs += self.commit(plan)
            limit -= 1
            assert limit, "no end in sight"
        return outputs

    def make_ready(self, digest: str, num_pages: int) -> None:
        """Bring an adapter into the pool, with no request left behind."""
        self.scheduler.register_adapter(digest, num_pages)
        self.add(f"for {digest}", 1, max_tokens=1, adapter=digest)
        self.finish()
        assert self.scheduler.stats().residency[digest] == "ready"

    def rows(self, plan: Plan) -> dict[str, int]:
        """Request → tokens that the plan computes for it."""
        return {self.names[chunk.seq]: len(chunk.tokens) for chunk in plan.chunks}

    def chunk(self, plan: Plan, id: str) -> Chunk:
        (chunk,) = (chunk for chunk in plan.chunks if self.names[chunk.seq] == id)
        return chunk

    def state(self, digest: str) -> str:
        return self.scheduler.stats().residency[digest]
