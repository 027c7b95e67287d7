"""Rules name what is wrong, personal data is found, and the judge learns what rules cannot say."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_codec.errors import UserError
from synth_data import quiz
from synth_data.quality import (
    DAMAGES,
    Judge,
    RuleConfig,
    damage,
    fault,
    language_of,
    luhn,
    mask_personal,
    train_judge,
)

PROSE = (
    "The old lighthouse stood at the edge of the cliff and its lamp had not been lit for many "
    "years. People from the village said that a keeper still walked there with a lantern every "
    "autumn night. Nobody believed them until the storm came, when three fishermen saw a light "
    "and followed it safely home. They never learned who had lit it for them."
)


LETTERS = [f"w{a}{b}x" for a in "abcdefgh" for b in "abcdefgh"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE, None),
        ("How far is it to the sea?", None),
        ("Zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich.", None),
        ("On 5 May it cost $28 & more.", None),
        ("Yes.", "too short"),
        ("a " * 20_001, "too long"),
        ("~~~ ### >>> ||| ===", "symbols"),
        ("call 1234567890 9876543210 now", "digits"),
        ("こんにちは 世界 さようなら", "unspeakable"),
        ("... !!! ???", "unspeakable"),
        (
            "Antidisestablishmentarianism, counterrevolutionaries, pneumonoconiosis",
            "word length",
        ),
        ("Read more at https://example.org today", "web address"),
        ("Please enable JavaScript to go on", "boilerplate"),
        ("Lorem ipsum dolor sit amet", "boilerplate"),
        ("function f() { return 1; }", "boilerplate"),
        ("no no no no I will not", "repetition"),
        ("\n".join([PROSE] * 2 + ["Home, about, contact"] * 4), "repetition"),
        ("the quick brown fox and the lazy dog of that house " * 12, "repetition"),
        ("\n".join(f"{sentence} ..." for sentence in PROSE.split(".") if sentence), "ellipses"),
        (
            " ".join(f"w{chr(97 + i % 26)}{chr(97 + i // 26)}x" for i in range(60)),
            "no function words",
        ),
    ],
)
def test_each_rule_has_its_name(text: str, reason: str | None) -> None:
    assert fault(text, RuleConfig()) == reason


@given(st.text(max_size=200))
def test_any_text_gets_a_verdict(text: str) -> None:
    reason = fault(text, RuleConfig())
    assert reason is not None or len(text.split()) >= 3


def test_limits_are_settings() -> None:
    assert fault("Yes.", RuleConfig(min_words=1)) is None
    assert fault(PROSE, RuleConfig(max_words=10)) == "too long"


# --- Personal data --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Mail ann.lee+x@mail.example.org!", "Mail email address!"),
        ("Call (555) 010-9999 or +44 20 7946 0958.", "Call phone number or phone number."),
        ("Call 555-010-9999 or 555-0199", "Call phone number or phone number"),
        ("Call 020 7946 0958", "Call phone number"),
        ("Card 4111 1111 1111 1111, please", "Card card number, please"),
        ("Card 5500-0000-0000-0004", "Card card number"),
        ("Order 4111 1111 1111 1112 from 1914-1918", None),
        ("On 2024-05-06 at 3:05 it cost $1,200,000.50 for 10 20 30", None),
    ],
)
def test_personal_data_becomes_words(text: str, masked: str | None) -> None:
    assert mask_personal(text)[0] == (text if masked is None else masked)


def test_masks_are_counted_by_kind() -> None:
    text = "a@b.org, c@d.org, 4111111111111111, +1 555 010 9999"
    assert mask_personal(text)[1] == {"e-mail": 2, "card": 1, "phone": 1}


@given(st.text(alphabet="0123456789", min_size=12, max_size=18))
def test_one_digit_in_ten_is_the_check_digit(digits: str) -> None:
    assert sum(luhn(digits + last) for last in "0123456789") == 1


# --- Language -------------------------------------------------------------------------------------


def test_languages_are_told_apart() -> None:
    pytest.importorskip("py3langid")
    assert language_of(PROSE) == "en"
    assert (
        language_of("Der alte Leuchtturm stand am Rande der Klippe und niemand wohnte dort") == "de"
    )


def test_a_missing_language_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(UserError, match="pip install py3langid"):
        language_of(PROSE)


# --- The judge ------------------------------------------------------------------------------------


def test_the_judge_tells_good_text_from_damaged(tmp_path: Path) -> None:
    good = quiz.sentences("train", 1500, 0)
    judge = train_judge(good[:1200])
    rng = np.random.default_rng(1)
    right = {kind: 0 for kind in DAMAGES}
    for text in good[1200:]:
        for kind in DAMAGES:
            right[kind] += judge.score(damage(text, kind, rng, good[0].split())) < 0.5
    kept = sum(judge.score(text) >= 0.5 for text in good[1200:])
    assert kept >= 270, kept  # of 300
    assert sum(right.values()) >= 0.85 * 300 * len(DAMAGES), right

    judge.save(tmp_path / "judge.npz")
    again = Judge.load(tmp_path / "judge.npz")
    assert [again.score(text) for text in good[:9]] == [judge.score(text) for text in good[:9]]
    assert 0 <= judge.score("") <= 1


def test_the_judge_is_deterministic_and_needs_examples() -> None:
    good = quiz.sentences("train", 60, 0)
    np.testing.assert_array_equal(train_judge(good).weights, train_judge(good).weights)
    with pytest.raises(UserError, match="at least 2"):
        train_judge(["", "one alone"])
