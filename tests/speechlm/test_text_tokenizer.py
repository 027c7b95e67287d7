"""Two kinds of text vocabulary behind one protocol."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf import hf_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from audio_codec.errors import UserError
from speechlm.streams import BOS, EOS, EPAD, PAD, SPEECH, TEXT
from speechlm.text_tokenizer import (
    SPECIAL,
    HFTokenizer,
    TextTokenizer,
    load_text_tokenizer,
    train_text_tokenizer,
)

KINDS = ["sentencepiece", "bytes", "metaspace"]


def make(kind: str) -> TextTokenizer:
    if kind == "sentencepiece":
        return train_text_tokenizer(["one two three four zebra crossing"] * 3, 100)
    return HFTokenizer(hf_tokenizer(kind))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    return make(request.param)


def test_special_pieces_have_their_ids_and_no_text(tokenizer: TextTokenizer) -> None:
    special = [PAD, BOS, EOS, EPAD, SPEECH, TEXT]
    assert max(special) < SPECIAL and tokenizer.decode(special) == ""
    assert tokenizer.pieces()[:SPECIAL] == [""] * SPECIAL
    assert len(tokenizer.pieces()) == tokenizer.size


words = st.lists(st.text(alphabet="abcdefghijklmnopqrstuvwxyz'", min_size=1), min_size=1)


@pytest.mark.parametrize("kind", KINDS)
@given(said=words)
def test_words_come_back(kind: str, said: list[str]) -> None:
    tokenizer = _MADE.setdefault(kind, make(kind))
    ids = [piece for word in said for piece in tokenizer.word(word)]
    assert min(ids) >= SPECIAL and max(ids) < tokenizer.size
    assert tokenizer.decode(ids) == " ".join(said)
    # What a transcript shows piece by piece is the same text.
    pieces = _PIECES.setdefault(kind, tokenizer.pieces())
    assert "".join(pieces[i] for i in ids) == "".join(f" {word}" for word in said)


_MADE: dict[str, TextTokenizer] = {}
_PIECES: dict[str, list[str]] = {}


def test_text_is_given_to_a_hugging_face_vocabulary_as_it_stands() -> None:
    tokenizer = HFTokenizer(hf_tokenizer("bytes"))
    text = "Zebra, one: 3 naïve cafés!"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.word("Zebra") == tokenizer.word("zebra")
    shown = "".join(tokenizer.pieces()[i] for i in tokenizer.encode("naïve"))
    assert shown in ("naïve", "nave"), "half a character's bytes add nothing"


def test_a_checkpoint_says_by_a_file_which_kind_it_has(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    (tmp_path / tokenizer.FILE).write_bytes(tokenizer.model)
    found = load_text_tokenizer(tmp_path)
    assert type(found) is type(tokenizer) and found.model == tokenizer.model
    assert found.word("zebra") == tokenizer.word("zebra")


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer"):
        HFTokenizer(b"nothing")
    with pytest.raises(UserError, match=r"has no text\.model or tokenizer\.json"):
        load_text_tokenizer(tmp_path)
