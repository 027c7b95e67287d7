from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE, audible
from speechlm.evaluation.conversation import (
    FRAME_SECONDS,
    Call,
    Said,
    Speech,
    Talk,
    converse,
    find_speech,
    silent_after,
)

LOUD, FAINT = 0.011, 0.009  # Just above and just below −40 dBFS.


def sound(*parts: tuple[float, float]):
    """Alternating samples of (seconds, amplitude) one after the other, [S]."""
    pieces = [np.full(round(s * SAMPLE_RATE), a, np.float32) for s, a in parts]
    pcm = np.concatenate(pieces)
    pcm[1::2] *= -1
    return pcm


def test_the_threshold_is_minus_forty_dbfs():
    assert audible(sound((0.1, LOUD))).all()
    assert not audible(sound((0.1, FAINT))).any()


@pytest.mark.parametrize(("seconds", "found"), [(0.23, 0), (0.24, 1), (3.0, 1)])
def test_speech_takes_240_ms(seconds, found):
    assert len(find_speech(sound((1, 0), (seconds, LOUD), (1, 0)))) == found


@pytest.mark.parametrize(("gap", "found"), [(0.39, 1), (0.40, 2)])
def test_a_pause_of_400_ms_ends_speech(gap, found):
    speech = find_speech(sound((0.5, 0), (0.3, LOUD), (gap, FAINT), (0.3, LOUD), (0.5, 0)))
    assert len(speech) == found
    assert (speech[0].start, speech[-1].end) == pytest.approx((0.5, 1.1 + gap))


def test_no_sound_is_no_speech():
    assert find_speech(np.zeros(0, np.float32)) == []
    assert find_speech(np.zeros(SAMPLE_RATE, np.float32)) == []


@given(st.lists(st.tuples(st.integers(24, 100), st.integers(40, 100)), max_size=4))
def test_speech_is_found_where_it_was_put(stretches):
    expected, parts, now = [], [(0.0, 0.0)], 0
    for length, gap in stretches:
        expected.append(Speech(now / 100, (now + length) / 100))
        parts += [(length / 100, 0.1), (gap / 100, 0.0)]
        now += length + gap
    assert find_speech(sound(*parts)) == expected


def test_silent_after():
    pcm = sound((0.5, 0), (1.0, LOUD), (0.2, 0), (0.3, LOUD), (0.6, 0), (0.3, LOUD), (0.1, 0))
    assert silent_after(pcm, 0.0) == 0  # 500 ms of silence come first
    assert silent_after(pcm, 0.2) == pytest.approx(1.8)  # 300 ms are too few, so are 200
    assert silent_after(pcm, 1.0) == pytest.approx(1.0)
    assert silent_after(pcm, 2.1) == 0
    assert silent_after(pcm, 1.0, silence=0.7) == math.inf
    assert silent_after(pcm, 99.0) == math.inf


@given(st.integers(0, 300), st.integers(0, 60))
def test_silence_is_where_the_sound_ended(sounding, at):
    """However long it sounds, the silence that follows is found from everywhere before it."""
    pcm = sound((sounding / 100, 0.1), (1.0, 0))
    assert silent_after(pcm, at / 100) == pytest.approx(max(0, sounding - at) / 100)


# --- Calls ----------------------------------------------------------------------------------------


def frame(value: float) -> np.ndarray:
    return np.full(FRAME_SIZE, value, np.float32)


def test_the_assistant_sounds_a_frame_after_it_was_asked(puppet):
    def script():
        call = Call()
        yield from call.say(np.concatenate([frame(0.1), frame(0.2)]))
        yield from call.wait(2 * FRAME_SECONDS)
        return call

    (call,) = converse(
        puppet(lambda seed: lambda heard: (2 * heard, "", "")), [Talk(script(), 0, 1)], 1
    )
    assert call.now == pytest.approx(4 * FRAME_SECONDS)
    assert call.user[::FRAME_SIZE] == pytest.approx([0.1, 0.2, 0, 0])
    assert call.assistant[::FRAME_SIZE] == pytest.approx([0, 0.2, 0.4, 0])


@given(st.integers(0, 4 * FRAME_SIZE))
def test_echo_is_the_assistants_voice_later_and_fainter(delay):
    call = Call(echo=(-20, delay / SAMPLE_RATE))
    script = call.wait(8 * FRAME_SECONDS)
    rng = np.random.default_rng(0)
    next(script)
    with pytest.raises(StopIteration):
        while True:
            script.send(Said(rng.standard_normal(FRAME_SIZE, np.float32), "", ""))
    expected = np.zeros_like(call.user)
    expected[delay:] = 0.1 * call.assistant[: len(call.assistant) - delay]
    np.testing.assert_allclose(call.user, expected, rtol=1e-5)


def test_texts_are_kept_until_forgotten(puppet):
    words = iter([" one", " two", " three"])

    def script():
        call = Call()
        yield from call.wait(2 * FRAME_SECONDS)
        before = call.text, call.heard
        call.forget()
        yield from call.wait(FRAME_SECONDS)
        return before, call.text, call.since, len(call.assistant)

    model = puppet(lambda seed: lambda heard: (heard, next(words), " hm"))
    found = converse(model, [Talk(script(), 0, 1)], 1)
    assert found == [(("one two", "hm hm"), "three", pytest.approx(0.16), FRAME_SIZE)]


def answers(after: float, lasting: float):
    """A model that speaks once, from `after` on."""

    def make(seed):
        clock = iter(range(10**6))

        def behave(heard):
            now = next(clock) * FRAME_SECONDS
            speaks = after <= now < after + lasting
            return sound((FRAME_SECONDS, 0.1 if speaks else 0)), "", ""

        return behave

    return make


@pytest.mark.parametrize(
    ("after", "lasting", "until"),
    [
        (0.8, 1.6, 0.88 + 1.6 + 1.2),  # an answer, and 1.2 s of silence
        (99, 0, 3.0),  # no answer
        (0.8, 99, 20.0),  # no end
    ],
)
def test_listening_ends_with_the_answer(puppet, after, lasting, until):
    def script():
        call = Call()
        yield from call.listen()
        return call.now

    (now,) = converse(puppet(answers(after, lasting)), [Talk(script(), 0, 1)], 1)
    assert now == pytest.approx(until, abs=1.01 * FRAME_SECONDS)


def test_speech_is_awaited(puppet, silent):
    def script():
        call = Call()
        yield from call.wait(0.4)
        onset = yield from call.await_speech(patience=2.0)
        return onset, call.now

    onset, now = converse(puppet(answers(0.8, 1)), [Talk(script(), 0, 1)], 1)[0]
    assert onset == pytest.approx(0.88)
    assert now == pytest.approx(0.88 + 0.24, abs=FRAME_SECONDS)
    assert converse(silent, [Talk(script(), 0, 1)], 1) == [(None, pytest.approx(2.4))]


@pytest.mark.parametrize("slots", [1, 2, 3, 9])
def test_every_talk_has_a_fresh_model_with_its_own_seed(puppet, slots):
    def make(seed):
        ticks = iter(range(10**6))
        return lambda heard: (heard + 0.001 * next(ticks), f" {seed}", "")

    def script(frames):
        call = Call()
        for _ in range(frames):
            yield from call.say(frame(0.1))
        return call.text, call.assistant[-FRAME_SIZE:].mean() if frames else None

    lengths = [3, 0, 5, 1, 4, 0, 2]
    talks = [Talk(script(frames), 10 + i, 1) for i, frames in enumerate(lengths)]
    for index, (text, last) in enumerate(converse(puppet(make), talks, slots)):
        frames = lengths[index]
        assert text.split() == [str(10 + index)] * frames
        if frames > 1:  # The last frame to sound answered the last but one.
            assert last == pytest.approx(0.1 + 0.001 * (frames - 2))


def test_no_talks_find_nothing(silent):
    assert converse(silent, [], 4) == []
