from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from motet.engine.detokenize import Detokenizer
from tests.tiny import write_tokenizer

TEXT = "naïve café 👩‍🚀 — 日本語\nEND of it"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("step", [1, 2, 7])
def test_pieces_join_to_the_text_and_never_split_a_character(tokenizer: Tokenizer, step: int) -> None:
    ids = tokenizer.encode(TEXT).ids
    detokenizer = Detokenizer(tokenizer, ())
    pieces = [detokenizer.push(ids[at : at + step]) for at in range(0, len(ids), step)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == TEXT


def test_unfinished_character_at_the_end_becomes_a_replacement(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ())
    text = detokenizer.push(tokenizer.encode("ok é").ids[:-1])
    assert text + detokenizer.flush() == "ok \ufffd"


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    ("stop", "kept"), [("END", "naïve café 👩‍🚀 — 日本語\n"), ("café", "naïve "), ("zzz", TEXT)]
)
def test_text_ends_before_a_stop_string(tokenizer: Tokenizer, step: int, stop: str, kept: str) -> None:
    ids = tokenizer.encode(TEXT).ids
    detokenizer = Detokenizer(tokenizer, (stop, "never"))
    text = "".join(detokenizer.push(ids[at : at + step]) for at in range(0, len(ids), step))
    assert text + detokenizer.flush() == kept
    assert detokenizer.stopped == (kept != TEXT)


def test_a_possible_beginning_of_a_stop_string_is_held_back_until_it_is_not(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ("END",))
    assert detokenizer.push(tokenizer.encode("a E").ids) == "a "
    assert detokenizer.push(tokenizer.encode("N").ids) == ""
    assert detokenizer.push(tokenizer.encode("Q").ids) == "ENQ"


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ())
    assert detokenizer.push([*tokenizer.encode("hi").ids, 1]) + detokenizer.flush() == "hi"
