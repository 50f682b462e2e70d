from __future__ import annotations

from pathlib import Path

import pytest

from motet.bench.calls import Closed, Open
from motet.bench.endpoint import Endpoint
from motet.bench.experiment import Experiment, ProbeFailed, Tokens, perform
from motet.bench.figures import Report, report
from motet.bench.records import Record, Run
from tests.bench.fake_endpoint import Behaviour, fake_endpoint
from tests.bench.virtual import run_virtual

QUICK = Behaviour(0.1, 0.01)


def performed(wanted: Experiment, **behaviours: Behaviour) -> tuple[Run, list[Record]]:
    """The run, and what was told of it on the way."""
    ended: list[Record] = []

    async def main() -> Run:
        async with fake_endpoint(**behaviours) as (url, _), Endpoint(url) as endpoint:
            return await perform(endpoint, wanted, Tokens(), ended.append)

    return run_virtual(main()), ended


def reported(wanted: Experiment, **behaviours: Behaviour) -> Report:
    return report(performed(wanted, **behaviours)[0])


def test_a_run_probes_warms_up_leads_in_and_measures() -> None:
    wanted = Experiment("there", "base", ("a", "b"), arrival=Closed(2), prompt=90, output=8, requests=6)
    run, ended = performed(wanted, base=QUICK, a=QUICK, b=QUICK)
    assert list(run.records) == ended
    phases = [(record.phase, record.model) for record in run.records]
    assert phases[:6] == [("probe", "base")] * 2 + [("warm-up", "a")] * 2 + [("warm-up", "b")] * 2
    assert [phase for phase, _ in phases[6:]].count("lead-in") == 2
    assert [phase for phase, _ in phases[6:]].count("measured") == 6
    measured = [record.prompt_tokens for record in run.records if record.phase == "measured"]
    assert measured == pytest.approx([90] * 6, abs=1)
    assert (run.settings.concurrency, run.settings.rate) == (2, None)


def test_what_the_first_request_of_a_model_costs_is_called_out() -> None:
    wanted = Experiment("there", "base", ("a", "b"), arrival=Closed(2), prompt=90, output=8, requests=6)
    told = reported(wanted, base=QUICK, a=Behaviour(0.1, 0.01, cold=0.7), b=QUICK)
    uses = {use.model: use for use in told.first_uses}
    assert {name: use.surprise for name, use in uses.items()} == {"base": False, "a": True, "b": False}
    assert uses["a"].cold == pytest.approx(0.8, rel=0.02)
    assert uses["a"].warm == pytest.approx(0.1, rel=0.02)
    assert told.overall.ttft is not None
    assert told.overall.ttft.max == pytest.approx(0.1, rel=0.02)  # the cold one is not in what is measured


def test_an_open_loop_keeps_its_rate() -> None:
    wanted = Experiment(
        "there", "base", ("base",), arrival=Open(20.0, burst=4), prompt=30, output=3, requests=41
    )
    told = reported(wanted, base=Behaviour(1.0, 0.01))
    assert told.overall.completed == 41
    assert told.duration == pytest.approx(2.0 + 1.0 + 2 * 0.01, rel=0.02)
    assert told.full_load_tokens_per_s is None


def test_failures_before_and_in_the_run_are_told_apart() -> None:
    wanted = Experiment(
        "there", "base", ("a",), arrival=Closed(2, together=True), prompt=30, output=3, requests=3
    )
    told = reported(wanted, base=QUICK, a=Behaviour(0.1, 0.01, fault="busy"))
    assert told.failed_before == {"http 503": 2}
    assert told.overall.errors == {"http 503": 3}
    assert "busy" in told.messages["http 503"]


def test_an_endpoint_that_does_not_answer_a_probe_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(ProbeFailed, match="there does not answer: http 503"):
        performed(Experiment("there", "base", ("base",)), base=Behaviour(0.1, 0.01, fault="busy"))
    trace = tmp_path / "trace.csv"
    trace.write_text("at,prompt,output\n0,50,3\n")
    run, _ = performed(Experiment("there", "base", ("base",), "trace", trace), base=QUICK)
    assert (run.settings.prompt, run.settings.output, run.settings.concurrency) == (50, 3, None)
