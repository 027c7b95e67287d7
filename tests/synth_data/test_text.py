"""Numbers, symbols and abbreviations are written out as a person would say them."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_codec.errors import UserError
from synth_data.text import (
    normalize,
    number_words,
    ordinal_words,
    sentences_from,
    spell_out,
    split_sentences,
    tokenize,
    year_words,
)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (-40, "minus forty"),
        (105, "one hundred five"),
        (1_000_000, "one million"),
        (20_340, "twenty thousand three hundred forty"),
    ],
)
def test_integers(value: int, words: str) -> None:
    assert number_words(value) == words


def test_numbers_of_any_length_are_read() -> None:
    # Python makes no number of more than 4300 digits.
    assert spell_out("7" * 5000) == " ".join(["seven"] * 5000)
    assert spell_out("$" + "1" * 4400).endswith("one one dollars")
    assert spell_out("2" * 4999 + "3rd").endswith("two two third")


@given(st.integers(0, 10**15 - 1))
def test_every_integer_has_its_own_words(value: int) -> None:
    units = {number_words(n): n for n in range(100)}
    scales = {"thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
    total = group = 0
    for word in number_words(value).split():
        if word in scales:
            total, group = total + group * scales[word], 0
        else:
            group = group * 100 if word == "hundred" else group + units[word]
    assert total + group == value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1, "first"),
        (12, "twelfth"),
        (20, "twentieth"),
        (35, "thirty fifth"),
        (100, "one hundredth"),
    ],
)
def test_ordinals(value: int, words: str) -> None:
    assert ordinal_words(value) == words


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("Dr. Lee paid $3.50.", "doctor Lee paid three dollars and fifty cents."),
        ("25+3 = 28, isn't it?", "twenty five plus three equals twenty eight, isn't it?"),
        ("a well-known café — ‘quoted’", "a well known cafe, quoted"),
        ("-5 is 7 - 12", "minus five is seven minus twelve"),
        ("the 21st, 50%", "the twenty first, fifty percent"),
        ("1,200.5 miles", "one thousand two hundred point five miles"),
        ("agent 007 in B2B", "agent zero zero seven in B two B"),
        ("...Well...", "Well."),
        ("½ of 0:MR. X² at 5am", "one slash two of zero mister X two at five am"),
    ],
)
def test_spoken_form_keeps_case_and_punctuation(text: str, spoken: str) -> None:
    assert spell_out(text) == spoken


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("On 2 Jan. 1984, e.g.", "On the second of January nineteen eighty four, for example"),
        ("May 5, 2024, 2024-05-06", "May fifth, twenty twenty four, May sixth, twenty twenty four"),
        ("1/31/1999", "January thirty first, nineteen ninety nine"),
        ("March 2005", "March two thousand five"),
        ("since 1905, 1914–1918", "since nineteen oh five, nineteen fourteen to nineteen eighteen"),
        ("in the 1990s and '80s", "in the nineteen nineties and eighties"),
        ("1984 apples", "one thousand nine hundred eighty four apples"),
        ("May 10,000 come", "May ten thousand come"),
        ("at 3:05 p.m. Then 15:00", "at three oh five pm. Then fifteen hundred"),
        ("at 5 p.m. sharp, 3:00 or 7:30", "at five pm sharp, three o'clock or seven thirty"),
        ("£2.01, €5.5, ¥100", "two pounds and one penny, five point five euros, one hundred yen"),
        ("$3.5 million or $5k", "three point five million dollars or five thousand dollars"),
        ("5 km/h, 1 kg, 6ft", "five kilometers per hour, one kilogram, six feet"),
        ("-5 °C", "minus five degrees Celsius"),
        ("5 in the morning, No. 7", "five in the morning, number seven"),
    ],
)
def test_dates_times_money_and_units(text: str, spoken: str) -> None:
    assert spell_out(text) == spoken


@given(st.integers(1000, 2999))
def test_a_year_is_read_as_a_number_of_its_own(year: int) -> None:
    assert year_words(year) not in {year_words(year - 1), year_words(year + 1)}
    assert spell_out(year_words(year)) == year_words(year)


@given(st.text(alphabet="ab .?!", max_size=40).map(spell_out))
def test_sentences_are_the_text_cut_apart(spoken: str) -> None:
    sentences = split_sentences(spoken)
    assert " ".join(sentences) == spoken
    assert all(not any(c in ".?!" for c in sentence[:-1]) for sentence in sentences)


@given(st.text(max_size=60) | st.text(alphabet="ab Mr'.,:?!05-$%+s\n’…é½", max_size=14))
def test_spoken_form_is_speakable_and_stable(text: str) -> None:
    spoken = spell_out(text)
    assert set(spoken) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ' .,;:?!")
    assert spell_out(spoken) == spoken
    assert normalize(text).split() == [token.text for token in tokenize(spoken)]
    assert normalize(normalize(text)) == normalize(text)


@given(st.text(alphabet="ab '.,-!", max_size=40))
def test_tokens_point_at_their_words(text: str) -> None:
    for token in tokenize(text):
        assert token.text in text[token.start : token.end].lower()
        assert " " not in text[token.start : token.end]


def test_sentences_from_plain_and_compressed(tmp_path: Path) -> None:
    lines = "One.\n\n  Zwölf.  \n"
    (tmp_path / "a.txt").write_text(lines, encoding="utf-8")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(lines.encode()))
    for name in ("a.txt", "b.txt.xz"):
        assert list(sentences_from(tmp_path / name)) == ["One.", "Zwölf."]


def test_sentences_from_shards_of_text(tmp_path: Path) -> None:
    (tmp_path / "text-000000.jsonl").write_text('{"text": "One. Two?"}\n{"text": "Three"}\n')
    (tmp_path / "text-000001.jsonl").write_text('{"text": "Four."}\n')
    assert list(sentences_from(tmp_path)) == ["One.", "Two?", "Three", "Four."]


def test_unreadable_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="f.jsonl"):
        list(sentences_from(tmp_path))
    (tmp_path / "c.txt.xz").write_bytes(b"not xz")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "e.csv").write_text("x")
    for name in ("missing.txt", "c.txt.xz", "d.txt", "e.csv"):
        with pytest.raises(UserError, match=name):
            list(sentences_from(tmp_path / name))
