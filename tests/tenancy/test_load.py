"""The queue's places and the adapters in use, with their limits."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from motet.config import TenantPolicy
from motet.tenancy.load import Load, Overloaded
from motet.tenancy.quota import RateLimited
from motet.tenancy.tenants import Tenant


def test_the_queue_is_bounded_for_a_tenant_and_for_all() -> None:
    load, acme, beta = Load(5), Tenant("acme", TenantPolicy(max_queued=3)), Tenant("beta")
    with ExitStack() as waiting:
        for _ in range(3):
            waiting.enter_context(load.wait(acme))
        with pytest.raises(RateLimited), load.wait(acme):
            pass
        for _ in range(2):
            waiting.enter_context(load.wait(beta))
        with pytest.raises(Overloaded) as full, load.wait(beta):
            pass
        assert full.value.status == 503
        assert load.queued == 5
    assert load.queued == 0
    with load.wait(acme):
        assert load.queued == 1


def test_adapters_in_use_are_bounded_together() -> None:
    load, acme, beta = Load(9), Tenant("acme", TenantPolicy(adapter_bytes=100)), Tenant("beta")
    with load.hold(beta, "red", 80), load.hold(acme, "red", 80):
        with load.hold(acme, "red", 80):
            pass
        with pytest.raises(RateLimited) as refused, load.hold(acme, "blue", 30):
            pass
        assert refused.value.retry_after == 1.0
        with load.hold(acme, "green", 20), load.hold(beta, "blue", 10**9):
            pass
    with load.hold(acme, "blue", 30):
        pass
    with pytest.raises(RateLimited) as never, load.hold(acme, "huge", 101):
        pass
    assert never.value.retry_after is None
    assert not vars(load)["_adapters"]
    assert not vars(load)["_sizes"]
