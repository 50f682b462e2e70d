"""`motet bench` against a real server, its figures beside the server's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from motet.bench.records import read_run
from motet.bench.sweep import read_curve
from motet.cli.main import app
from motet.errors import MotetError
from tests.live import LiveServer, live_server
from tests.tiny import write_adapter, write_model

pytestmark = pytest.mark.xdist_group("live")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("bench")
    model = write_model(home / "model", "mixtral", max_position_embeddings=2048)
    for seed, name in enumerate("ab"):
        write_adapter(
            home / name, model, "mixtral", seed, r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"]
        )
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[LiveServer]:
    adapters = {name: home / name for name in "ab"}
    with live_server(home / "model", adapters, home / "cache", "--pool=32MiB") as server:
        yield server


def bench(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *map(str, arguments)])


def test_a_run_reports_what_the_server_counts(server: LiveServer, home: Path, tmp_path: Path) -> None:
    before, out, page = server.samples(), tmp_path / "a.jsonl", tmp_path / "a.html"
    answer = bench(
        "run", server.url, "--adapter", "a", "--adapter", "b", "--concurrency", 3, "--prompt", 120, "--output", 20,
        "--requests", 9, "--tokenizer", home / "model", "--slo", "ttft:60000", "--out", out, "--html", page, "--json",
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    report, after = json.loads(answer.stdout), server.samples()
    overall = report["overall"]
    assert (overall["requests"], overall["completed"], overall["output_tokens"]) == (9, 9, 180)
    assert overall["prompt_tokens"] == 120
    assert overall["goodput"] == pytest.approx(overall["requests_per_s"])
    assert [model["name"] for model in report["models"]] == ["a", "b"]
    records = read_run(out).records
    assert [record.phase for record in records].count("warm-up") == 4
    assert [record.phase for record in records].count("lead-in") == 3

    def grew(series: str) -> float:
        return sum(after[name] - before.get(name, 0) for name in after if name.startswith(series))

    assert grew("motet_generation_tokens_total") == sum(record.output_tokens for record in records)
    assert grew("motet_prompt_tokens_total") == 120 * len(records)
    assert grew("motet_ttft_seconds_count") == len(records)
    # The server's clock starts later and stops earlier than the client's, by a busy machine's moment; the tiny model's
    # bytes are often no text before the next token.
    served = grew("motet_ttft_seconds_sum") / len(records)
    seen = sum(record.ttft for record in records) / len(records)
    assert served <= seen < served + 0.5
    assert page.read_text().startswith("<!doctype html>")


def test_an_estimated_prompt_comes_near_the_length_asked_for(server: LiveServer) -> None:
    answer = bench(
        "run",
        server.url,
        "--concurrency",
        2,
        "--prompt",
        400,
        "--output",
        4,
        "--requests",
        6,
        "--json",
        "--chat",
    )
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["overall"]["prompt_tokens"] == pytest.approx(400, rel=0.1)


def test_a_sweep_leaves_a_curve(server: LiveServer, tmp_path: Path) -> None:
    out, page = tmp_path / "curve.json", tmp_path / "curve.html"
    answer = bench(
        "sweep", server.url, "--adapter", "a:4", "--adapter", "b:4", "--concurrency", "1,2", "--prompt", 60,
        "--output", 5, "--requests", 2, "--warm-up", 1, "--device", "a CPU", "--out", out, "--html", page,
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    curve = read_curve(out)
    assert (curve.model, curve.device) == ("model", "a CPU")
    shape = [(point.concurrency, point.adapters, point.rank, point.requests) for point in curve.points]
    assert shape == [(1, 0, None, 2), (2, 0, None, 4), (1, 2, 4, 2), (2, 2, 4, 4)]
    assert all(point.tokens_per_s > 0 and point.failed == 0 for point in curve.points)
    assert "<svg" in page.read_text()


def test_a_trace_is_replayed_and_runs_are_compared(server: LiveServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("at,adapter,prompt,output\n0,a,40,3\n0.1,,50,4\n0.3,b,60,5\n")
    files = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for file in files:
        answer = bench("run", server.url, "--workload", "trace", "--file", trace, "--out", file)
        assert answer.exit_code == 0, answer.output
        measured = [record for record in read_run(file).records if record.phase == "measured"]
        assert sorted((r.model, r.output_tokens) for r in measured) == [("a", 3), ("b", 5), ("model", 4)]
        sent = sorted(record.sent for record in measured)
        assert [at - sent[0] for at in sent] == pytest.approx([0.0, 0.1, 0.3], abs=0.08)
    answer = bench("--compare", *files)
    assert answer.exit_code == 0, answer.output
    assert "TTFT mean, ms" in answer.stdout


def test_what_fails_is_told_and_ends_with_1(server: LiveServer) -> None:
    answer = bench(
        "run", server.url, "--adapter", "nobody", "--concurrency", 1, "--prompt", 30, "--output", 3
    )
    assert answer.exit_code == 1
    assert "4 of 4 requests failed: http 404" in answer.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "name what is to be measured"),
        (["http://127.0.0.1:9"], "no endpoint answers"),
        (["http://127.0.0.1:9", "--workload", "sonet"], "no workload 'sonet'"),
        (["http://127.0.0.1:9", "--burst", "4"], "--burst needs a --rate"),
        (["http://127.0.0.1:9", "--in-process", "m"], "name what is to be measured"),
        (["--in-process", "m", "--chat"], "--chat is a way to ask an endpoint"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: list[str], said: str) -> None:
    error = bench("run", *options).exception
    assert isinstance(error, MotetError)
    assert said in str(error)


def test_an_engine_in_this_process_is_driven_in_the_same_way(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTET_CACHE", str(tmp_path / "cache"))
    answer = bench(
        "run", "--in-process", home / "model", "--adapter", f"a={home / 'a'}", "--concurrency", 2, "--prompt", 70,
        "--output", 6, "--requests", 4, "--workload", "random", "--pool", "16MiB", "--json",
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    overall = json.loads(answer.stdout)["overall"]
    assert (overall["completed"], overall["output_tokens"], overall["prompt_tokens"]) == (4, 24, 70)
