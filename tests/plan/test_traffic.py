"""Three ways to say who asks for what, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from motet.errors import ConfigError
from motet.observe.metrics import Metrics
from motet.plan.traffic import FineTune, arrivals, merge, read_traffic
from motet.types import Delta, EngineStats

TARGETS = ("attention", "mlp")


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "traffic.txt"
    file.write_text(text)
    return file


def read(tmp_path: Path, text: str, hours: float | None = None) -> list[FineTune]:
    return read_traffic(write(tmp_path, text), hours, 16, TARGETS)


def test_rates_by_the_day_or_by_the_second(tmp_path: Path) -> None:
    daily, often = read(
        tmp_path,
        "name, requests_per_day, requests_per_second, prompt, output, peak, rank, targets\n"
        "a, 43200, , 1600, 600, 2.5, 32, attention gate\n"
        "b, , 3, 100, 20, , ,\n",
    )
    assert daily == FineTune("a", 0.5, 1600, 600, 2.5, 32, ("attention", "gate"))
    assert daily.peak_rate == 1.25
    assert often == FineTune("b", 3.0, 100, 20, 1.0, 16, TARGETS)


def test_a_trace_tells_rates_peaks_and_lengths(tmp_path: Path) -> None:
    """Ten minutes: a comes once a minute but 21 times in the first; the base comes twice."""
    events = [(60.0 * i, "a", 100 + i, 10) for i in range(11)] + [
        (2.0 * i, "a", 50, 10) for i in range(1, 21)
    ]
    lines = [f"{at},{prompt},{output},{name}" for at, name, prompt, output in events]
    text = "\n".join(["at,prompt,output,adapter", *lines, "5,7,9,", "6,7,9,"]) + "\n"
    found = {one.name: one for one in read(tmp_path, text)}
    assert found["a"].rate == pytest.approx(31 / 600)
    assert found["a"].peak_rate == pytest.approx(22 / 60)  # 0, 2, …, 40 and 60 lie within a minute
    assert sorted(found["a"].lengths) == sorted((prompt, output) for _, _, prompt, output in events)
    assert (found["base"].prompt, found["base"].rank, found["a"].rank) == (7, 0, 16)
    as_json = "\n".join(f'{{"at":{at},"prompt":{p},"output":{o},"adapter":"{n}"}}' for at, n, p, o in events)
    assert read(tmp_path, as_json) == [found["a"]]


def test_a_scrape_of_motet_tells_its_own_time(tmp_path: Path) -> None:
    metrics = Metrics("house")
    metrics.track("support")
    for _ in range(6):
        meter = metrics.request("support", 30, 0.0)
        meter.delta(Delta(0, "", (1, 2, 3, 4)))
        meter.end("stop", 0)
    text = metrics.render(EngineStats(), []).decode()
    (told,) = read(tmp_path, text, hours=0.5)
    assert (told.name, told.prompt, told.output) == ("support", 30, 4)
    assert told.rate == pytest.approx(6 / 1800)
    began = next(
        float(line.split()[-1]) for line in text.splitlines() if line.startswith("motet_requests_created")
    )
    lines = [
        f"{line.rpartition(' ')[0]} {began + 120}" if line.startswith("vllm:lora_requests_info{") else line
        for line in text.splitlines()
    ]
    (timed,) = read(tmp_path, "\n".join(lines) + "\n")
    assert timed.rate == pytest.approx(6 / 120)
    assert REGISTRY is not metrics.registry


VLLM = """\
# HELP vllm:request_success_total Count of successfully processed requests.
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="legal"} 30.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="legal"} 10.0
vllm:request_success_total{engine="0",finished_reason="abort",model_name="idle"} 0.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="legal"} 48000.0
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="legal"} 8000.0
"""


def test_a_scrape_of_vllm_needs_to_be_told_how_long_it_counted(tmp_path: Path) -> None:
    (found,) = read(tmp_path, VLLM, hours=2.0)
    assert found == FineTune("legal", 40 / 7200, 1200, 200, rank=16, targets=TARGETS)
    with pytest.raises(ConfigError, match=r"requests of 'legal' were counted: give --hours"):
        read(tmp_path, VLLM)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,requests_per_day,prompt,output\n", "names no fine-tune"),
        ("name,requests_per_day,prompt,output\na,1,2\n", "line 2: 4 fields"),
        ("name,requests_per_day,prompt,output\na,1,2,many\n", "line 2: .*output"),
        ("name,requests_per_day,prompt,output\na,0,2,2\n", "the rate must be positive"),
        ("name,requests_per_day,prompt,output\na,nan,2,2\n", "the rate must be positive"),
        ("name,requests_per_day,prompt,output\na,1,0,2\n", "at least 1"),
        ("name,requests_per_day,prompt,output\na,1,2,2\na,1,2,2\n", "line 3: 'a' is there twice"),
        (
            "name,requests_per_day,requests_per_second,prompt,output\na,1,1,2,2\n",
            "one of requests_per_second",
        ),
        ("name,tokens,prompt,output\na,1,2,2\n", "unknown column 'tokens'"),
        ("at,prompt,output\n", "no requests"),
        ("at,prompt,output\n1,5,0\n", "at 1.0 has no prompt or no output"),
        ('{"at":1,"prompt":5}\n', "line 1: .*output"),
        ("# TYPE up gauge\nup 1\n", "counts no requests"),
        ("# TYPE up gauge\nup{ 1\n", "not in Prometheus"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, text)


def test_a_missing_file_and_a_fine_tune_told_twice_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_traffic(tmp_path / "nowhere.csv", None, 16, TARGETS)
    one = FineTune("a", 1.0, 10, 10)
    with pytest.raises(ConfigError, match="'a' is told twice"):
        merge([one, FineTune("b", 1.0, 10, 10), FineTune("a", 2.0, 10, 10)])


def test_arrivals_come_at_the_peak_rates_times_their_factors() -> None:
    mix = [FineTune("a", 2.0, 10, 5, peak=2.0), FineTune("b", 1.0, 20, 6, lengths=((1, 2), (3, 4)))]
    found = arrivals(mix, 9000, {"b": 5.0})
    assert [one.at for one in found] == sorted(one.at for one in found)
    assert len(found) / found[-1].at == pytest.approx(9.0, rel=0.05)
    shares = sum(one.adapter == "b" for one in found) / len(found)
    assert shares == pytest.approx(5 / 9, rel=0.05)
    assert {(one.prompt, one.output) for one in found if one.adapter == "b"} == {(1, 2), (3, 4)}
    assert arrivals(mix, 50, {}) == arrivals(mix, 50, {})
