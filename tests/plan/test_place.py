"""Who shares, who does not, and what the plan says of it: with shorter simulations, and fewer, than in earnest."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from motet.cli.main import app
from motet.errors import ConfigError
from motet.plan import fleet as fleets
from motet.plan import place
from motet.plan.curve import find_curve
from motet.plan.fleet import Fleet, Quality, Slo, settled
from motet.plan.gpus import find_gpu
from motet.plan.page import page
from motet.plan.place import FILL, Plan, make_plan, pack, replicas_for
from motet.plan.sizes import sizes_of
from motet.plan.traffic import FineTune, read_traffic

EXAMPLE = Path(__file__).parents[2] / "examples" / "plan" / "five_customers.csv"
SLO = Slo(ttft=0.5, otps=80.0)


@pytest.fixture(autouse=True, scope="module")
def _less() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleets, "SIMULATED_TOKENS", 6_000)
        patch.setattr(fleets, "PRECISION", 1.2)
        patch.setattr(place, "SURGES", (1.25, 3.0))
        patch.setattr(place, "BURSTS", (10.0,))
        yield


def h200(name: str = "h200-gpt-oss-20b", gpu: str = "H200") -> Fleet:
    curve = find_curve(name, None, gpu)
    return Fleet.of(curve, sizes_of(curve.config, curve.model), find_gpu(gpu))


def tune(name: str, rate: float, prompt: int = 1600, output: int = 20, rank: int = 32) -> FineTune:
    return FineTune(name, rate, prompt, output, rank=rank)


def test_five_customers_at_ten_percent_each_need_one_gpu_instead_of_five() -> None:
    mix = read_traffic(EXAMPLE, None, 16, ("attention", "mlp"))
    plan = make_plan(h200(), mix, SLO, price=5.0)
    assert (plan.dedicated_gpus, plan.planned_gpus) == (5, 1)
    assert plan.saving == 4 * 5.0 * 730
    for one in plan.fine_tunes:
        assert one.own_load == pytest.approx(0.10, abs=0.02)
        assert one.shared_load > one.own_load
        assert one.shares
        assert one.level.kept
    (gpu,) = plan.gpus
    assert gpu.load == pytest.approx(sum(one.shared_load for one in plan.fine_tunes))
    assert gpu.level.otps_p5 > 80
    memory = gpu.weight_bytes + gpu.adapter_bytes + gpu.kv_bytes + gpu.free_bytes
    assert memory < 0.9 * find_gpu("H200").memory - (3 << 30)
    assert gpu.adapter_bytes == pytest.approx(5 * 0.74e9, rel=0.01)
    surges = {burst.factor: burst.level for burst in gpu.bursts if burst.who is None}
    assert surges[1.25].kept
    assert not surges[3.0].kept


def test_one_who_fills_more_than_half_a_gpu_has_its_own_and_the_small_ones_share() -> None:
    mix = [tune("large", 50.0), tune("small", 2.0), tune("tiny", 0.5, rank=8)]
    plan = make_plan(h200(), mix, SLO, price=2.0)
    shared, own = plan.gpus
    assert (shared.members, shared.shared, shared.replicas) == (("small", "tiny"), True, 1)
    assert (own.members, own.shared) == (("large",), False)
    assert own.replicas == replicas_for(plan.fine_tunes[0].own_load) >= 2
    assert own.load <= FILL
    assert own.adapter_bytes == 0
    assert [one.shares for one in plan.fine_tunes] == [False, True, True]
    assert plan.dedicated_gpus == own.replicas + 2
    assert plan.planned_gpus == own.replicas + 1


def test_the_neighbours_of_a_burst_keep_their_first_tokens() -> None:
    """The scheduler is fair between tenants: thirty requests a second of one delay that one."""
    mix = [tune(f"c{i}", 3.0) for i in range(4)]
    served = settled(h200().serve(mix, True, {"c0": 10.0}))
    one = Quality.of([each for each in served if each.arrival.adapter == "c0"])
    others = Quality.of([each for each in served if each.arrival.adapter != "c0"])
    assert others.ttft_p95 < 0.3
    assert one.ttft_p95 > 5 * others.ttft_p95


def test_packing_takes_the_largest_first_as_load_and_memory_allow() -> None:
    mix = [tune(name, 1.0) for name in "abcde"]
    loads = {"a": 0.1, "b": 0.5, "c": 0.4, "d": 0.25, "e": 0.05}
    few = dict.fromkeys("abcde", 1)
    assert [one.name for one in pack(mix, loads, few, room=9)] == ["b", "d", "e"]
    assert [one.name for one in pack(mix, loads, few, room=2)] == ["b", "d"]
    assert [one.name for one in pack(mix, loads, {**few, "b": 99}, room=9)] == ["b"]


def test_adapters_that_do_not_fit_beside_each_other_take_another_gpu() -> None:
    """Rank 128 of Qwen3-30B-A3B takes 10 GB, and its weights leave 58 GiB of an H200."""
    mix = [tune(f"c{i}", 0.1, 400, 30, rank=128) for i in range(7)]
    plan = make_plan(h200("h200-qwen3-30b-a3b"), mix, Slo(2.0, 20.0), price=1.0)
    assert plan.planned_gpus == 2
    for gpu in plan.gpus:
        assert gpu.free_bytes > 0


def test_what_cannot_be_served_is_said_with_its_figures() -> None:
    with pytest.raises(ConfigError, match=r"slow: a request alone on a H200 .* tokens/s; .* asks for 0.01 s"):
        make_plan(h200(), [tune("slow", 0.1)], Slo(0.01, 80.0), 1.0)
    with pytest.raises(ConfigError, match=r"long: .*more than the model's context"):
        make_plan(h200(), [tune("long", 0.1, prompt=200_000)], SLO, 1.0)


def test_another_gpu_is_an_estimate_and_says_so() -> None:
    plan = make_plan(h200(gpu="H100"), [tune("a", 0.2), tune("b", 0.2)], SLO, 4.0)
    assert any("scaled" in note for note in plan.notes)
    assert any("no room for bfloat16 copies" in note for note in plan.notes)
    assert plan.fine_tunes[0].own_otps < 400


# What is printed


@pytest.fixture(scope="module")
def plan(_less: None) -> Plan:
    return make_plan(h200(), [tune("a<b>&", 0.2), tune("base", 0.2, rank=0)], SLO, 4.0)


def test_traffic_of_the_base_itself_shares_and_brings_no_adapter(plan: Plan) -> None:
    (gpu,) = plan.gpus
    assert sorted(gpu.members) == ["a<b>&", "base"]
    assert [one.adapter_bytes > 0 for one in plan.fine_tunes] == [True, False]
    assert gpu.adapter_bytes == pytest.approx(plan.fine_tunes[0].adapter_bytes, rel=0.01)


def test_the_page_is_whole_and_needs_nothing_else(plan: Plan) -> None:
    text = page(plan)
    body = text[text.index("<body>") : text.index("</body>") + 7]
    root = ET.fromstring(body)
    assert len(root.findall(".//svg")) >= 4
    assert "2 fine-tunes: one H200 instead of 2 H200s" in text
    assert "a<b>" not in text
    assert "http" not in text
    assert "src=" not in text
    cells = [cell.text for cell in root.iter("td")]
    assert "a<b>&" in cells


def test_the_command_prints_a_table_or_json_and_writes_a_page(tmp_path: Path) -> None:
    runner = CliRunner(env={"COLUMNS": "200"})
    file = tmp_path / "traffic.csv"
    file.write_text("name,requests_per_second,prompt,output\nbakery,2,800,50\norchard,3,800,50\n")
    told = runner.invoke(app, ["plan", str(file), "--price", "10", "--html", str(tmp_path / "plan.html")])
    assert told.exit_code == 0, told.output
    assert "2 fine-tunes: one H200 instead of 2 H200s, 7,300 saved per month" in told.output
    assert "bakery" in told.output
    assert "orchard" in (tmp_path / "plan.html").read_text()
    as_json = runner.invoke(app, ["plan", str(file), "--json", "--otps", "60"])
    found = msgspec.json.decode(as_json.stdout.strip().splitlines()[-1], type=Plan)
    assert (found.planned_gpus, found.slo_otps) == (1, 60.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ttft", "0"], "--ttft must be positive"),
        (["--gpu", "V100"], "no GPU 'V100'"),
        (["--curve", "nowhere"], "no capacity curve 'nowhere'"),
        (["--model", "nowhere"], "nowhere cannot be read"),
        (["--targets", "attention,experts"], "no 'experts'"),
        ([str(EXAMPLE)], "'bakery' is told twice"),
    ],
)
def test_what_is_wrong_is_one_error(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["plan", str(EXAMPLE), *arguments])
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)
