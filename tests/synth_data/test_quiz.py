"""The quiz world: the split leaks nothing, and an answer is judged as a careful listener would."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synth_data import quiz
from synth_data.quiz import CATEGORIES, UNKNOWN, Question, normalize, score
from synth_data.text import number_words, spell_out


@pytest.fixture(scope="module")
def train() -> list[Question]:
    return quiz.questions("train", 6000, seed=0)


@pytest.fixture(scope="module")
def heldout() -> list[Question]:
    return quiz.questions("heldout", 3000, seed=0)


def find(questions: list[Question], category: str) -> Question:
    return next(q for q in questions if q.category == category)


def test_draws_are_seeded_and_equal_over_categories(heldout: list[Question]) -> None:
    assert heldout[:50] == quiz.questions("heldout", 50, seed=0)
    assert heldout[:50] != quiz.questions("heldout", 50, seed=1)
    counts = Counter(q.category for q in quiz.questions("heldout", 300, seed=3))
    assert set(counts) == set(CATEGORIES)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_every_reference_answer_is_right(train: list[Question], heldout: list[Question]) -> None:
    wrong = [(q.text, q.answer) for q in train + heldout if not score(q.answer, q)]
    assert wrong == []


def test_answers_to_other_facts_are_wrong(heldout: list[Question]) -> None:
    for category in CATEGORIES:
        of_category = [q for q in heldout if q.category == category][:40]
        for q in of_category:
            for other in of_category:
                # "Paris is the capital of France" answers the question from either end.
                if other.keys != q.keys and other.kind == q.kind:
                    assert not score(other.answer, q), (q.text, other.answer)


def test_thousands_of_distinct_questions(train: list[Question]) -> None:
    assert len({normalize(q.text) for q in train}) > 3000


def test_questions_are_words_only(train: list[Question], heldout: list[Question]) -> None:
    for q in train + heldout:
        assert re.fullmatch(r"[A-Za-z',.?!: ]+", q.text + q.answer), q
        assert q.text[0].isupper() and q.answer[0].isupper()
        assert spell_out(q.text) == q.text and spell_out(q.answer) == q.answer


def test_no_heldout_wording_is_trained(train: list[Question], heldout: list[Question]) -> None:
    trained = {normalize(q.text) for q in train + quiz.out_of_world("train", 500, seed=0)}
    leaked = [q.text for q in heldout if normalize(q.text) in trained]
    leaked += [
        q.text for q in quiz.out_of_world("heldout", 300, seed=0) if normalize(q.text) in trained
    ]
    assert leaked == []


def test_phrasings_are_disjoint_and_plenty() -> None:
    for name, lists in quiz._data()["phrasings"].items():
        known, new = set(map(normalize, lists["train"])), set(map(normalize, lists["heldout"]))
        assert not known & new, name
        # A number said alone has few forms; everything else has at least nine with held-out ones.
        assert len(lists["train"] + lists["heldout"]) >= (7 if name == "next_number" else 9), name
        assert len(new) >= 3


def test_heldout_operands_never_occur_in_training(train: list[Question]) -> None:
    many = train + quiz.questions("train", 6000, seed=1, categories=["plus", "minus"])
    seen = Counter()
    for q in many:
        if q.category in ("plus", "minus"):
            a, b = (int(x) for x in re.findall(r"\d+", q.fact))
            one, other = (a, b) if q.category == "plus" else (a - b, b)
            pair = (min(one, other), max(one, other))
            assert pair not in quiz.heldout_pairs(), q.fact
            seen[pair] += 1
    pairs = (quiz.MAX_OPERAND + 1) * (quiz.MAX_OPERAND + 2) // 2
    assert len(seen) == pairs - len(quiz.heldout_pairs())
    assert len(quiz.heldout_pairs()) == pytest.approx(0.1 * pairs, abs=1)


@pytest.mark.parametrize("category", quiz.BEYOND)
def test_sums_beyond_the_world_are_right_and_undo_no_heldout_one(category: str) -> None:
    rng = np.random.default_rng(0)
    drawn = [quiz.draw_beyond(rng, category) for _ in range(2000)]
    for q in drawn:
        a, b = (int(x) for x in re.findall(r"\d+", q.fact))
        value = a + b if category == "plus" else a - b
        assert max(a, b) > quiz.MAX_OPERAND and 0 <= value < 100
        pair = (min(a, b), max(a, b)) if category == "plus" else (min(value, b), max(value, b))
        assert pair not in quiz.heldout_pairs(), q.fact
        assert q.answer.lower().endswith(f" is {number_words(value)}.") and score(q.answer, q)
        assert q.split == "train" and q.category == category
    assert len({q.fact for q in drawn}) > 1000


def test_half_of_heldout_arithmetic_has_heldout_operands(heldout: list[Question]) -> None:
    arithmetic = [q for q in heldout if q.category in ("plus", "minus", "times")]
    assert sum(q.fact_heldout for q in arithmetic) / len(arithmetic) == pytest.approx(0.5, abs=0.06)


def test_finite_facts_are_all_trained() -> None:
    open_ended = ("repeat", "social", "identity")
    for category in set(CATEGORIES) - set(open_ended):
        for source in quiz.GROUPS[category]:
            trainable, _ = quiz._weights(source, heldout=False)
            assert len(trainable) > 0
            if category not in ("plus", "minus"):
                assert trainable == quiz._facts(source)


def test_a_pause_leaves_an_open_sentence(train: list[Question], heldout: list[Question]) -> None:
    complete = {normalize(q.text) for q in train + heldout}
    for q in train + heldout:
        if q.pause:
            words = q.text.split()
            first, last = q.pause
            assert 1 <= first <= last < len(words)
            for i in range(first, last + 1):
                assert normalize(" ".join(words[:i])) not in complete, (q.text, i)


@given(st.lists(st.sampled_from(quiz.vocabulary()), min_size=1, max_size=8))
def test_word_sequences_belong_to_one_split_for_ever(words: list[str]) -> None:
    held = quiz.sequence_heldout(words)
    assert held == quiz.sequence_heldout(list(words))
    assert not (held and len(words) == 1)


def test_repeat_draws_from_its_own_split() -> None:
    for split in ("train", "heldout"):
        for q in quiz.questions(split, 300, seed=2, categories=["repeat"]):
            assert quiz.sequence_heldout(q.keys[0].split()) == (split == "heldout")


def test_vocabulary_is_about_a_thousand_distinct_words() -> None:
    assert len(set(quiz.vocabulary())) == len(quiz.vocabulary())
    assert 900 <= len(quiz.vocabulary()) <= 1100


@given(st.integers(0, 999))
def test_number_words_read_back(n: int) -> None:
    words = number_words(n)
    assert quiz.mentions(words, "number") == [words]
    assert quiz.mentions(words.replace("hundred ", "hundred and "), "number") == [words]
    assert quiz.mentions(str(n), "number") == [words]
    assert quiz.mentions(words.replace(" ", "-"), "number") == [words]


@given(st.integers(0, 90), st.integers(2, 10))
def test_counted_numbers_stay_apart(first: int, length: int) -> None:
    words = [number_words(n) for n in range(first, first + length)]
    assert quiz.mentions(", ".join(words), "counting") == words


def plus(a: int, b: int) -> Question:
    fact = next(f for f in quiz._facts("plus") if f.name == f"plus:{a}+{b}")
    return Question("", fact.answer, fact.keys, "plus", "train", "number", fact.given)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("Thirteen plus eight is twenty one.", True),
        ("Thirteen plus eight is twenty-one.", True),
        ("13 plus 8 is 21", True),
        ("twenty one", True),
        ("Thirteen plus eight is twenty.", False),
        ("one", False),
        ("Thirteen plus eight is twenty one, no, twenty two.", False),
        ("Thirteen plus nine is twenty one.", False),
        ("Sorry, I don't know that.", False),
        ("", False),
    ],
)
def test_score_compares_whole_numbers(said: str, right: bool) -> None:
    assert score(said, plus(13, 8)) is right


def test_score_does_not_take_an_echo_for_the_answer() -> None:
    question = plus(0, 5)
    assert score("Zero plus five is five.", question)
    assert not score("Zero plus five is zero.", question)
    assert not score("Zero plus five is six.", question)
    after = next(
        q
        for q in quiz.questions("train", 500, seed=0, categories=["numbers"])
        if q.fact == "number_after:seven"
    )
    assert score("Eight comes after seven.", after)
    assert not score("Seven comes after eight.", after)


def test_score_of_sequences_wants_all_and_no_more(heldout: list[Question]) -> None:
    spelling = find(heldout, "spelling")
    word = spelling.keys[0].replace(" ", "")
    assert score(f"{word} is spelled {' '.join(word)}", spelling)
    assert not score(f"{word} is spelled {' '.join(word[:-1])}", spelling)
    repeat = find(heldout, "repeat")
    assert not score(repeat.answer + " apple", repeat)
    assert not score(" ".join(reversed(repeat.keys[0].split())), repeat)


def test_letters_are_heard_by_their_names() -> None:
    question = next(
        q
        for q in quiz.questions("train", 500, seed=0, categories=["letters"])
        if q.fact == "letter_after:A"
    )
    assert score("the letter after a is bee", question)
    assert not score("the letter after a is see", question)
    assert quiz.mentions("double you", "letter") == ["w"]


def test_refusals() -> None:
    (unknown,) = quiz.out_of_world("heldout", 1, seed=0)
    assert score("Sorry, I don't know that.", unknown)
    assert score("sorry i do not know that", unknown)
    assert not score("The capital of France is Paris.", unknown)
    assert len({q.text for q in quiz.out_of_world("heldout", 200, seed=1)}) == 200


def test_all_answers_cover_what_is_asked(heldout: list[Question]) -> None:
    answers = {normalize(a) for a in quiz.all_answers(repeat=10)}
    missing = [
        q.answer for q in heldout if q.category != "repeat" and normalize(q.answer) not in answers
    ]
    assert missing == []


def test_weights_and_unknown_names() -> None:
    drawn = quiz.questions("train", 400, seed=0, categories={"plus": 3.0, UNKNOWN: 1.0})
    assert Counter(q.category for q in drawn)["plus"] / 400 == pytest.approx(0.75, abs=0.08)
    with pytest.raises(ValueError, match="no such category"):
        quiz.questions("train", 1, seed=0, categories=["sports"])


def test_sentences_are_seeded() -> None:
    assert quiz.sentences("train", 30, seed=1) == quiz.sentences("train", 30, seed=1)
    assert len(set(quiz.sentences("train", 300, seed=1))) > 200


def test_a_part_of_the_world_is_spoken_about_as_often_as_weighed():
    assert quiz.sentences("train", 50, 0) == quiz.sentences("train", 50, 0, None)
    said = quiz.sentences("train", 400, 0, {"days": 3.0, "next_number": 1.0})
    days = sum("day" in sentence.lower() for sentence in said)
    assert 200 <= days <= 300 and not any("capital" in s and "city" in s for s in said)
    rng = np.random.default_rng(0)
    drawn = Counter(quiz.draw_category(rng, {"days": 3.0, "plus": 1.0}) for _ in range(400))
    assert set(drawn) == {"days", "plus"} and 260 <= drawn["days"] <= 340
