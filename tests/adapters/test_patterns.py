from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from motet.adapters.patterns import MAX_PATTERN, MAX_REGEXES, compile_patterns
from motet.errors import AdapterRefused

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.2.mlp.experts.gate_up_proj",
    "model.layers.10.block_sparse_moe.experts.7.w1",
    "lm_head",
]


def same_as_peft(keys: list[str]) -> None:
    ours = compile_patterns(keys, "rank_pattern")
    for name in NAMES:
        theirs = get_pattern_key(keys, name)
        assert ours.find(name) == (theirs if theirs in keys else None), (keys, name)


@pytest.mark.parametrize(
    "key",
    [
        r"q_proj",
        r"proj",
        r"self_attn.q_proj",
        r"model.layers.0.self_attn.q_proj",
        r"layers.1.self_attn.q_proj",
        r"lm_head",
        r"m_head",
        r"w.",
        r"experts...w1",
        r"experts\.7\.w1",
        r"^model.layers.1.self_attn.k_proj",
        r"^layers.0.+",
        r".*\.gate_up_proj",
        r".*",
        r"\w+",
        r"layers\.(0|1|2)\..*",
        r"layers\.\d+\.self_attn\.(q|k|v)_proj",
        r"(?:q|k)_proj$",
        r"layers\.[0-9]\..*",
        r"layers\.1[0-9]\..+w[12]",
        r"[^.]+_proj",
        r"[\w.]*attn.*",
        r"[q-v]_proj",
        r".+?_proj",
        r"q_?proj",
        r"q_{0,1}proj",
        r"layers\.\d{2}\..*",
        r"layers\.\d{1,2}\.self.*",
        r"(\w+\.)+k_proj",
        r"q_proj|k_proj",
        r"^q_proj|w1$",
        r"model$",
        r"$",
        r"^",
        r"()",
        r"(q_proj)?",
        r"[]q]_proj",
        r"[.]",
        r"\Dproj",
    ],
)
def test_the_subset_means_what_it_means_to_peft(key: str) -> None:
    same_as_peft([key])


def test_order_decides() -> None:
    same_as_peft([""])
    same_as_peft(["proj", "q_proj", r".*k_proj"])
    same_as_peft([r".*[01]\..*q_proj", "q_proj", "self_attn.k_proj", "k_proj"])


@examples(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(
            [".*", ".", "q", "_proj", r"\.", r"\d", "layers", "+", "?", "|", "(", ")", "[0-3]", "^", "$"]
        ),
        max_size=8,
    )
)
def test_whatever_is_accepted_agrees_with_peft(parts: list[str]) -> None:
    try:
        compile_patterns(["".join(parts)], "rank_pattern")
    except AdapterRefused:
        return
    same_as_peft(["".join(parts)])


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (r"(a)\1", r"escape \\1"),
        (r"\bq_proj", r"escape \\b"),
        ("(?=q)q_proj", "look-around"),
        ("(?P<x>q)_proj", "look-around, named group"),
        ("(?i)q", "flag"),
        ("q(", "parenthesis"),
        ("q)", "parenthesis"),
        ("a)|(.*w1", "parenthesis"),  # fits into PEFT's own parentheses
        ("*q", "nothing to repeat"),
        ("q**", "repetition of a repetition"),
        ("q*+", "repetition of a repetition"),
        ("(((q*)*)*)", "nested"),
        ("q{1,900}", "repetition"),
        ("q{9,2}", "repetition"),
        ("[q", "character class"),
        ("[z-a]", "character class"),
        ("[a--b]", "character class"),
        ("(q)" * 40, "groups"),
        ("q\\", "escape"),
        ("^+q", "repetition of an anchor"),
    ],
)
def test_the_rest_is_refused(key: str, reason: str) -> None:
    with pytest.raises(AdapterRefused, match=f"alpha_pattern: pattern .* is not supported: .*{reason}"):
        compile_patterns([key], "alpha_pattern")


def test_limits() -> None:
    with pytest.raises(AdapterRefused, match=f"a pattern of {MAX_PATTERN + 1} characters"):
        compile_patterns(["q" * (MAX_PATTERN + 1)], "rank_pattern")
    compile_patterns([f"layers.{i}.q_proj" for i in range(5000)], "rank_pattern")
    with pytest.raises(AdapterRefused, match=f"more than {MAX_REGEXES} regular expressions"):
        compile_patterns([f"layers.{i}.*q_proj" for i in range(MAX_REGEXES + 1)], "rank_pattern")


@pytest.mark.parametrize(
    "key", [r"(\w+)+x", "(.*)*x", "(a|a|b)*(.*.*.*.*)x", "(a?){32}a{32}x", ".*" * 200 + "x"]
)
def test_no_pattern_takes_long(key: str) -> None:
    began = time.perf_counter()
    patterns = compile_patterns([key], "rank_pattern")
    assert patterns.find("a" * 60 + "." + "a" * 60) is None
    assert time.perf_counter() - began < 0.5
