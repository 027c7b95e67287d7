"""Phones of English sentences."""

import itertools

from synth_data.phones import PHONES, phones_of, pronunciations


def test_a_sentence_sounds_like_its_words() -> None:
    assert " ".join(phones_of("The cat sat.") or ()) == "DH AH K AE T S AE T"
    assert phones_of("") == ()


def test_a_word_that_nobody_knows_leaves_the_sentence_without_phones() -> None:
    assert phones_of("the cat qxzzt") is None


def test_the_dictionary_uses_every_phone_and_no_other() -> None:
    assert set(itertools.chain(*pronunciations().values())) == set(PHONES)
    assert len(set(PHONES)) == 39
