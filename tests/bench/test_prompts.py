from __future__ import annotations

from pathlib import Path

import pytest

from motet.bench.calls import Call, Closed, Open
from motet.bench.experiment import Experiment, check, planned
from motet.bench.prompts import (
    Counted,
    Estimated,
    RandomTokens,
    RandomWords,
    Sonnets,
    fitted,
    read_prompts,
    read_trace,
    sonnets,
    typical_of_trace,
    typical_prompt,
)
from motet.errors import ConfigError
from tests.tiny import write_tokenizer


def test_the_package_brings_at_least_forty_sonnets_of_fourteen_verses() -> None:
    poems = sonnets()
    assert len(poems) >= 40
    assert len(set(poems)) == len(poems)
    for poem in poems:
        assert len(poem.strip().splitlines()) == 14
    assert "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n" in "".join(
        poems
    )


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Counted(directory)


@pytest.mark.parametrize("tokens", [1, 2, 17, 1600, 40_000])
def test_with_a_tokenizer_prompts_have_exactly_the_length_asked_for(counted: Counted, tokens: int) -> None:
    assert counted.count(Sonnets(counted).prompt(tokens)) == tokens
    assert counted.count(RandomWords(counted).prompt(tokens)) == tokens


def test_no_two_prompts_begin_alike() -> None:
    for source in (Sonnets(Estimated(), 1), RandomWords(Estimated(), 1), RandomTokens(1000, 1)):
        assert len({source.prompt(50) for _ in range(1000)}) == 1000
    assert Sonnets(Estimated(), 1).prompt(90) != Sonnets(Estimated(), 2).prompt(90)


def test_without_one_words_are_counted_by_what_two_prompts_told() -> None:
    measure = fitted((100, 148), (400, 568))  # 1.4 a word and 8 of a template
    assert (measure.per_word, measure.fixed) == pytest.approx((1.4, 8))
    assert len(Sonnets(measure).prompt(708).split()) == 500
    with pytest.raises(ConfigError, match="counts 7 and 7 tokens"):
        fitted((10, 7), (20, 7))


def test_random_tokens_leave_the_special_ones_out() -> None:
    tokens = RandomTokens(1000).prompt(5000)
    assert len(tokens) == 5000
    assert (min(tokens), max(tokens)) == (5, 999)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Counted(tmp_path)


def test_prompts_are_read_with_what_they_say_of_themselves(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "One?"}\n\n{"messages": [{"role": "user", "content": "Two?"}], "adapter": "a", "output": 9}\n'
    )
    assert read_prompts(file, 50) == [
        Call("", "One?", 50),
        Call("a", ({"role": "user", "content": "Two?"},), 9),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", "line 2: one of prompt and messages"),
        ('{"prompt": "x", "messages": []}', "line 2: one of"),
        ('{"prompt": "x", "output": 0}', "line 2: output"),
        ('{"promt": "x"}', "line 2: .*promt"),
        ("nonsense", "line 2"),
    ],
)
def test_a_bad_line_of_prompts_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=said):
        read_prompts(file, 50)


TRACE = {
    "trace.csv": "at,adapter,prompt,output\n12.5,a,30,4\n10,,20,3\n",
    "trace.jsonl": '{"at": 12.5, "adapter": "a", "prompt": 30, "output": 4}\n{"at": 10, "prompt": 20, "output": 3}\n',
}


@pytest.mark.parametrize("name", TRACE)
def test_a_trace_gives_times_adapters_and_lengths(tmp_path: Path, counted: Counted, name: str) -> None:
    file = tmp_path / name
    file.write_text(TRACE[name])
    first, second = read_trace(file, Sonnets(counted), "base")
    assert (first.model, first.output, first.at) == ("base", 3, 0.0)
    assert (second.model, second.output, second.at) == ("a", 4, 2.5)
    assert isinstance(first.prompt, str)
    assert isinstance(second.prompt, str)
    assert (counted.count(first.prompt), counted.count(second.prompt)) == (20, 30)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", "at,prompt,output\n1,x,3\n", "line 2: .*int"),
        ("t.csv", "at,prompt\n1,5\n", "line 2: .*output"),
        ("t.csv", "at,prompt,output\n1,5,3,9\n", "line 2"),
        ("t.csv", "at,prompt,output,colour\n1,5,3,red\n", "line 2: .*colour"),
        ("t.csv", "at,prompt,output\n", "holds no request"),
        ("t.jsonl", '{"at": 0, "prompt": 0, "output": 3}', "line 1: prompt and output"),
        ("t.jsonl", "", "holds nothing"),
    ],
)
def test_a_bad_trace_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_trace(file, Sonnets(Estimated()), "base")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "nowhere", Sonnets(Estimated()), "base")


def test_a_plan_has_a_warm_up_a_lead_in_and_what_is_measured() -> None:
    wanted = Experiment("x", "base", ("a", "b", "c"), arrival=Closed(6), prompt=20, output=60, warm_up=1)
    plan = planned(wanted, Estimated())
    assert [call.model for call in plan.measured[:4]] == ["a", "b", "c", "a"]
    assert len(plan.measured) == 24
    assert [call.output for call in plan.lead_in] == [10, 20, 30, 40, 50, 60]
    assert [(call.model, call.output) for call in plan.warm_up] == [("a", 16), ("b", 16), ("c", 16)]
    prompts = [call.prompt for call in (*plan.warm_up, *plan.lead_in, *plan.measured)]
    assert len(set(prompts)) == len(prompts)


def test_requests_that_start_together_have_no_lead_in_and_an_open_loop_has_times() -> None:
    together = planned(Experiment("x", "base", ("base",), arrival=Closed(6, together=True)), Estimated())
    assert together.lead_in == []
    assert together.concurrency == 6
    opened = planned(Experiment("x", "base", ("base",), arrival=Open(2.0), requests=9), Estimated())
    assert opened.concurrency is None
    assert len(opened.measured) == 9
    assert all(call.at is not None for call in opened.measured)


def test_a_users_prompts_are_sent_in_their_order_and_again_if_more_are_wanted(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "1"}\n{"prompt": "2", "adapter": "b"}\n{"prompt": "3"}\n')
    wanted = Experiment(
        "x", "base", ("base", "a"), "jsonl", file, arrival=Closed(2, together=True), requests=4
    )
    said = [(call.prompt, call.model) for call in planned(wanted, Estimated()).measured]
    assert said == [("1", "base"), ("2", "b"), ("3", "a"), ("1", "base")]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Experiment("x", "b", ("b",), prompt=0), "prompt must be at least 1"),
        (Experiment("x", "b", ("b",), arrival=Closed(0)), "concurrency must be at least 1"),
        (Experiment("x", "b", ("b",), arrival=Open(0.0)), "rate must be positive"),
        (Experiment("x", "b", ("b",), warm_up=-1), "-1 warm-up"),
        (Experiment("x", "b", ("b",), workload="trace"), "trace needs a file"),
        (Experiment("x", "b", ("b",), file=Path("f")), "sonnet takes no file"),
        (Experiment("x", "b", ("b",), popularity="zipff"), "zipff"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_sent(wanted: Experiment, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(wanted)


def test_probes_and_warm_up_are_as_long_as_a_files_own_prompts(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("at,prompt,output\n0,10,2\n1,30,4\n2,9000,4\n")
    assert typical_of_trace(trace) == (30, 4)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one two three four five"}\n')
    assert typical_prompt(prompts) == 7
