"""Conversations in time: nothing overlaps that should not, and events are where labels say."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from synth_data import dialogue, quiz
from synth_data.dialogue import (
    ASSISTANT,
    USER,
    Backchannel,
    Dialogue,
    DialogueConfig,
    Disfluency,
    Exchange,
    Interruption,
    Pause,
    Script,
    Turn,
    arrange,
    cut_events,
    cut_words,
    script,
    spoken,
    truncate,
)
from synth_data.quiz import Question
from synth_data.text import tokenize
from synth_data.tts import Utterance, Word

RATE = 1000
SECONDS_A_WORD = 0.3


def speak(text: str, channel: int) -> Utterance:
    """A synthesizer of constant pitch: a word is 0.25 s of sound and 0.05 s of silence."""
    tokens = tokenize(text)
    lead = 0.1
    pcm = np.zeros(round((lead + SECONDS_A_WORD * len(tokens) + 0.2) * RATE), np.float32)
    words = []
    for i, token in enumerate(tokens):
        start = lead + SECONDS_A_WORD * i
        pcm[round(start * RATE) : round((start + 0.25) * RATE)] = 0.5
        words.append(Word(token.text, start, start + 0.25))
    return Utterance(pcm, RATE, tuple(words))


def question(text: str = "What is it now?", answer: str = "It is one two three four.") -> Question:
    return Question(text, answer, ("one",), "plus", "train", "number", pause=(1, 3))


def arranged(*turns: Turn, seconds: float = 30.0) -> Dialogue:
    return arrange(Script(seconds, 1.0, turns), speak, RATE)


def of_kind(found: Dialogue, kind: str) -> list[dialogue.Event]:
    return [event for event in found.events if event.kind == kind]


def loud(pcm: np.ndarray, start: float, end: float) -> bool:
    return bool(np.abs(pcm[round(start * RATE) : round(end * RATE)]).max(initial=0) > 1e-6)


def test_a_turn_is_answered_after_its_gap() -> None:
    found = arranged(Turn(question(), silence=1.0, gap=0.2))
    (end,) = of_kind(found, "turn_end")
    (answer,) = of_kind(found, "answer")
    assert end.meta["start"] == pytest.approx(1.03)
    assert end.end == pytest.approx(1.03 + 3 * 0.3 + 0.25)
    assert answer.start - end.end == pytest.approx(0.2)
    assert answer.meta == {"text": "It is one two three four.", "cut": False}
    assert [w.text for w in found.user_words] == ["what", "is", "it", "now"]
    # Words stand where their sound is.
    for words, pcm in ((found.user_words, found.user), (found.assistant_words, found.assistant)):
        for word in words:
            assert loud(pcm, word.start + 0.02, word.start + 0.05)
    assert not loud(found.assistant, 0, answer.start - 0.001)
    (silence,) = of_kind(found, "silence")
    assert (silence.start, silence.end) == (pytest.approx(answer.end), 30.0)


def test_a_pause_is_silent_and_shifts_what_follows() -> None:
    found = arranged(Turn(question(), 1.0, 0.2, pause=Pause(2, 1.2)))
    (pause,) = of_kind(found, "pause")
    assert pause.end - pause.start == pytest.approx(1.2 + 0.05, abs=0.002)
    assert not loud(found.user, pause.start + 0.03, pause.end - 0.03)
    assert not loud(found.assistant, pause.start, pause.end)
    before, after = found.user_words[1], found.user_words[2]
    assert before.end == pytest.approx(pause.start) and after.start == pytest.approx(pause.end)


def test_an_interruption_stops_voice_and_text() -> None:
    long = question(answer="One two three four five six seven eight nine ten.")
    found = arranged(
        Turn(long, 1.0, 0.2, interruption=Interruption(0.3, 0.24)),
        Turn(question(), 1.0, 0.2),
    )
    (event,) = of_kind(found, "interruption")
    first, second = of_kind(found, "answer")
    assert event.end - event.start == pytest.approx(0.24)
    assert first.meta["cut"] and first.end == pytest.approx(event.end, abs=2 / RATE)
    assert not loud(found.assistant, event.end + 0.002, second.start - 0.002)
    # The new question starts while the assistant still speaks, and is answered.
    assert loud(found.user, event.start + 0.01, event.end)
    assert second.start == pytest.approx(of_kind(found, "turn_end")[1].end + 0.2)
    spoken = [w.text for w in found.assistant_words if w.start < event.end]
    assert 3 <= len(spoken) < 10
    assert all(w.end <= event.end + 1e-9 for w in found.assistant_words[: len(spoken)])


def test_a_short_answer_is_not_interrupted() -> None:
    found = arranged(
        Turn(question(answer="One."), 1.0, 0.2, interruption=Interruption(0.5, 0.2)),
        Turn(question(), 1.0, 0.2),
    )
    assert of_kind(found, "interruption") == []
    assert not any(answer.meta["cut"] for answer in of_kind(found, "answer"))


def test_a_backchannel_lies_within_the_answer_that_goes_on() -> None:
    long = question(answer="One two three four five six seven eight nine ten.")
    found = arranged(Turn(long, 1.0, 0.2, backchannel=Backchannel(0.4, "Yeah.")))
    (event,) = of_kind(found, "backchannel")
    (answer,) = of_kind(found, "answer")
    assert answer.start < event.start < event.end < answer.end
    assert answer.end - answer.start == pytest.approx(9 * 0.3 + 0.25 + 0.06, abs=2 / RATE)
    assert loud(found.user, event.start + 0.01, event.end)
    without = arranged(Turn(long, 1.0, 0.2))
    assert np.array_equal(without.assistant, found.assistant)


def test_an_overlapping_answer_begins_before_the_question_ends() -> None:
    found = arranged(Turn(question(), 1.0, gap=-0.3))
    (overlap,) = of_kind(found, "overlap")
    (end,) = of_kind(found, "turn_end")
    (answer,) = of_kind(found, "answer")
    assert overlap.start == answer.start == pytest.approx(end.end - 0.3)
    assert (overlap.channel, overlap.end) == (ASSISTANT, end.end)
    assert loud(found.user, overlap.start, overlap.end)
    assert loud(found.assistant, overlap.start + 0.04, overlap.end)
    # Nobody is answered before half of what they ask.
    early = arranged(Turn(question("What now?"), 1.0, gap=-5.0))
    (turn,) = of_kind(early, "turn_end")
    (overlap,) = of_kind(early, "overlap")
    assert overlap.start == pytest.approx((turn.meta["start"] + turn.end) / 2)


def test_an_overlapping_answer_can_be_interrupted_all_the_same() -> None:
    long = question(answer="One two three four five six seven eight nine ten.")
    found = arranged(
        Turn(long, 1.0, -0.5, interruption=Interruption(0.01, 0.24)),
        Turn(question(), 1.0, 0.2),
        seconds=20,
    )
    (event,) = of_kind(found, "interruption")
    assert event.start >= of_kind(found, "turn_end")[0].end
    words = found.user_words
    assert all(a.end <= b.start for a, b in zip(words, words[1:], strict=False))


@pytest.mark.parametrize(
    ("slip", "said"),
    [
        (Disfluency(2, "filler", "um,"), "what is um it now"),
        (Disfluency(0, "filler", "you know,"), "you know what is it now"),
        (Disfluency(3, "repetition", "now"), "what is it now now"),
        (Disfluency(2, "restart", "What is,"), "what is what is it now"),
    ],
)
def test_a_disfluency_is_said_and_labelled(slip: Disfluency, said: str) -> None:
    found = arranged(Turn(question(), 1.0, 0.2, disfluency=slip))
    assert " ".join(word.text for word in found.user_words) == said
    (event,) = of_kind(found, "disfluency")
    inside = [w.text for w in found.user_words if event.start <= w.start < event.end]
    assert inside == [token.text for token in tokenize(slip.text)]
    assert event.meta == {"kind": slip.kind, "text": slip.text}
    (end,) = of_kind(found, "turn_end")
    assert end.meta["question"] == "What is it now?"  # What is meant, without the slip.


def test_scripts_slip_and_overlap_when_told_to() -> None:
    config = DialogueConfig(seconds=2000, overlap=0.4, disfluency=0.5, pause=0.2)
    made = script(np.random.default_rng(0), config)
    before = (None, *made.turns)
    free = [
        turn
        for turn, last in zip(made.turns, before, strict=False)
        if turn.pause is None and not (last and last.interruption)
    ]
    slips = [turn.disfluency for turn in free if turn.disfluency]
    assert len(slips) / len(free) == pytest.approx(0.5, abs=0.06)
    assert {slip.kind for slip in slips} == {"filler", "repetition", "restart"}
    for turn in made.turns:
        if turn.disfluency and turn.disfluency.kind == "repetition":
            words = [token.text for token in tokenize(spoken(turn))]
            assert any(a == b for a, b in zip(words, words[1:], strict=False))
    early = [-turn.gap for turn in free if turn.gap < 0]
    assert len(early) / len(free) == pytest.approx(0.4, abs=0.06)
    assert min(early) >= 0.08 and max(early) <= 0.5
    assert all(turn.gap > 0 for turn in made.turns if turn.pause)


def test_what_is_switched_off_asks_nothing_of_chance() -> None:
    """Recipes written before there were overlaps and slips keep their sound."""
    plain = script(np.random.default_rng(0), DialogueConfig(seconds=600))
    digest = hashlib.sha256(
        repr([(t.question.text, t.silence, t.gap) for t in plain.turns]).encode()
    )
    assert digest.hexdigest()[:16] == "eca63019a7cd40a5"


def test_a_written_dialogue_is_spoken_in_its_order() -> None:
    exchanges = [Exchange("Is it far?", "No, it is near."), Exchange("Good.", "Yes.")]
    config = DialogueConfig(seconds=30, interruption=0, backchannel=0, greeting=1.0)
    made = script(np.random.default_rng(1), config, exchanges, "Hello there.")
    found = arrange(made, speak, RATE)
    assert " ".join(w.text for w in found.user_words) == "is it far good"
    said = " ".join(w.text for w in found.assistant_words)
    assert said == "hello there no it is near yes"
    answers = of_kind(found, "answer")
    assert [a.meta["text"] for a in answers] == ["Hello there.", "No, it is near.", "Yes."]
    assert len(of_kind(found, "turn_end")) == 2
    assert Exchange("Is it far?", "").pause == (1, 2) and Exchange("Good.", "").pause == ()
    # Without an opening the assistant waits, whatever the greetings of the quiz.
    quiet = arrange(script(np.random.default_rng(1), config, exchanges), speak, RATE)
    assert quiet.assistant_words[0].start > quiet.user_words[0].start


def test_noise_fills_the_silence_that_asks_for_it() -> None:
    found = arranged(Turn(question(), 1.0, 0.2), Turn(question(), 5.0, 0.2, noise_dbfs=-30.0))
    (noise,) = of_kind(found, "noise")
    silence = of_kind(found, "silence")[0]
    assert silence.start < noise.start < noise.end < silence.end
    assert noise.meta == {"dbfs": -30.0}


def test_whole_conversation_labels() -> None:
    made = Script(5.0, 1.0, (Turn(question(), 1.0, 0.2),), "Hello!", 12.0, (-20.0, 0.1))
    found = arrange(made, speak, RATE)
    kinds = [(e.kind, e.start, e.end) for e in found.events[:2]]
    assert sorted(kinds) == [("echo", 0.0, 5.0), ("noise", 0.0, 5.0)]
    assert found.assistant_words[0].text == "hello"
    assert of_kind(found, "turn_end")[0].start > of_kind(found, "answer")[0].end


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    seconds=st.integers(5, 90),
    overlap=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_script_keeps_the_rules_of_turn_taking(seed: int, seconds: int, overlap: float) -> None:
    config = DialogueConfig(
        seconds=seconds,
        interruption=0.3,
        backchannel=0.3,
        pause=0.5,
        greeting=0.5,
        overlap=overlap,
        disfluency=0.3,
    )
    found = arrange(script(np.random.default_rng(seed), config), speak, RATE)
    assert len(found.user) == len(found.assistant) == round(seconds * RATE)
    for words in (found.user_words, found.assistant_words):
        assert all(0 <= w.start <= w.end <= seconds for w in words)
        assert all(a.end <= b.start + 1e-9 for a, b in zip(words, words[1:], strict=False))
    assert all(0 <= e.start <= e.end <= seconds for e in found.events)
    assert [e.start for e in found.events] == sorted(e.start for e in found.events)
    answers = of_kind(found, "answer")
    for pause in of_kind(found, "pause"):
        assert not any(a.start < pause.end and pause.start < a.end for a in answers)
    for event in of_kind(found, "interruption"):
        low, high = config.stop_range
        if event.end < seconds:
            assert low - 1e-6 <= event.end - event.start <= high + 1e-6
    for event in of_kind(found, "silence"):
        for word in (*found.user_words, *found.assistant_words):
            assert word.end <= event.start + 1e-9 or word.start >= event.end - 1e-9
    # Both voices at once only where a backchannel, an interruption or an overlap says so.
    overlaps = [
        event
        for kind in ("backchannel", "interruption", "overlap")
        for event in of_kind(found, kind)
    ]
    both = np.flatnonzero((np.abs(found.user) > 1e-6) & (np.abs(found.assistant) > 1e-6)) / RATE
    for time in both:
        assert any(e.start - 0.05 <= time <= e.end + 0.05 for e in overlaps), time


def test_scripts_are_seeded_and_make_about_ten_turns_a_minute() -> None:
    config = DialogueConfig(seconds=600)
    one, two = (script(np.random.default_rng(5), config) for _ in range(2))
    assert one == two
    assert one != script(np.random.default_rng(6), config)
    turns = len(of_kind(arrange(one, speak, RATE), "turn_end")) / 10
    assert 7 <= turns <= 14


def test_only_named_categories_come_up() -> None:
    for named in ({"days": 1.0, "counting": 1.0}, {"days": 1.0}):
        config = DialogueConfig(seconds=400, categories=named, interruption=0.5, unknown=0)
        made = script(np.random.default_rng(0), config)
        assert {turn.question.category for turn in made.turns} == set(named)


def test_a_range_is_written_in_order() -> None:
    with pytest.raises(ValidationError, match="0.7 is more than 0.2; write the smaller end first"):
        DialogueConfig(gap_range=(0.7, 0.2))


def test_no_pause_falls_where_words_are_guessed() -> None:
    def guess(text: str, channel: int) -> Utterance:
        return replace(speak(text, channel), estimated=True)

    made = script(np.random.default_rng(0), DialogueConfig(seconds=200, pause=1.0))
    assert of_kind(arrange(made, speak, RATE), "pause")
    assert not of_kind(arrange(made, guess, RATE), "pause")


def test_gaps_are_human() -> None:
    made = script(np.random.default_rng(0), DialogueConfig(seconds=4000))
    gaps = np.array([turn.gap for turn in made.turns])
    assert np.median(gaps) == pytest.approx(0.22, rel=0.1)
    assert gaps.min() >= 0.08 and gaps.max() <= 0.7


def test_shares_follow_the_configuration() -> None:
    config = DialogueConfig(seconds=4000, unknown=0.3, interruption=0.0)
    made = script(np.random.default_rng(0), config)
    unknown = sum(turn.question.category == quiz.UNKNOWN for turn in made.turns) / len(made.turns)
    assert unknown == pytest.approx(0.3, abs=0.04)
    assert all(turn.interruption is None for turn in made.turns)


@given(st.floats(0.0, 3.0))
def test_truncation_fades_and_ends(seconds: float) -> None:
    utterance = speak("one two three four five six seven", ASSISTANT)
    cut = truncate(utterance, seconds)
    assert len(cut.pcm) == min(round(seconds * RATE), len(utterance.pcm))
    assert np.abs(cut.pcm[-2:]).max(initial=0) < 0.02
    head = max(0, len(cut.pcm) - round(0.02 * RATE))
    assert np.array_equal(cut.pcm[:head], utterance.pcm[:head])
    assert all(word.end <= seconds for word in cut.words)


def test_cutting_loses_and_doubles_nothing() -> None:
    found = arrange(script(np.random.default_rng(3), DialogueConfig(seconds=120)), speak, RATE)
    windows = [(0.0, 40.0), (40.0, 80.0), (80.0, 120.0)]
    words = [(w.text, w.start + a) for a, b in windows for w in cut_words(found.user_words, a, b)]
    assert [t for t, _ in words] == [w.text for w in found.user_words]
    assert [s for _, s in words] == pytest.approx([w.start for w in found.user_words])
    ends = [e for a, b in windows for e in cut_events(found.events, a, b) if e.kind == "turn_end"]
    assert len(ends) == len(of_kind(found, "turn_end"))
    assert all(0 <= e.start <= e.end <= 40 for e in ends)
    assert {USER, ASSISTANT} == {e.channel for a, b in windows for e in found.events}
