"""Verdicts on sounds with known timing, and models whose scores are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE, Pcm, loudness_dbfs
from audio_codec.errors import UserError
from speechlm.evaluation import duplex
from speechlm.evaluation.duplex import (
    Take,
    alike,
    ends_early,
    judge_backchannels,
    judge_echoes,
    judge_interruptions,
    judge_turns,
    response_time,
    speaks,
    spoken,
    starts,
    stops,
)
from synth_data.dialogue import ASSISTANT, BACKCHANNELS, USER, Pause
from synth_data.shards import Event
from synth_data.tts import Utterance, Voice, Word

VOICES = [Voice("espeak", "en-us"), Voice("flite", "slt")]


def speech(*stretches: tuple[float, float], seconds: float = 10.0) -> Pcm:
    """Sound from start to end of each stretch, [S]."""
    pcm = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
    for start, end in stretches:
        pcm[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)] = 0.1
    return pcm


# --- Verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stretches", "expected"),
    [
        ([(3.2, 4.0)], 0.2),
        ([(3.0, 4.0)], 0.0),
        ([(5.0, 6.0)], 2.0),
        ([(5.1, 6.0)], None),  # too late
        ([(2.8, 4.0)], None),  # too early
        ([(1.0, 2.0), (3.5, 4.0)], 0.5),  # once more in time
        ([(3.2, 3.4)], None),  # too short
        ([], None),
    ],
)
def test_response_time(stretches, expected):
    assert response_time(speech(*stretches), 3.0) == (
        None if expected is None else pytest.approx(expected)
    )


@pytest.mark.parametrize(
    ("stretch", "speaking", "starting"),
    [
        ((3.5, 4.0), True, True),
        ((3.5, 9.0), True, True),
        ((1.0, 9.0), True, False),
        ((1.0, 3.1), True, False),
        ((1.0, 3.0), False, False),
        ((5.1, 6.0), False, False),
        ((3.5, 3.7), False, False),
    ],
)
def test_speech_in_a_window(stretch, speaking, starting):
    pcm = speech(stretch)
    assert speaks(pcm, 3.0, 5.0) is speaking
    assert starts(pcm, 3.0, 5.0) is starting


@pytest.mark.parametrize(
    ("stretches", "expected"),
    [
        ([(1.0, 3.3)], 0.3),
        ([(1.0, 3.48)], 0.48),
        ([(1.0, 3.49)], None),
        ([(1.0, 3.2), (3.5, 4.0)], None),  # only a breath
        ([(1.0, 3.2), (3.6, 4.0)], 0.2),  # 400 ms of silence are enough
        ([(1.0, 9.9)], None),
    ],
)
def test_stops(stretches, expected):
    assert stops(speech(*stretches), 3.0) == (None if expected is None else pytest.approx(expected))


@given(st.floats(0.0, 4.0), st.floats(0.0, 4.0))
def test_an_answer_that_ends_half_a_second_before_its_twin_ends_early(cut, whole):
    early = ends_early(speech((1.0, 2.0 + cut)), speech((1.0, 2.0 + whole)), 1.5)
    if abs(whole - cut - 0.5) > 0.02:
        assert early == (cut < whole - 0.5)


def test_a_pause_between_words_is_no_end():
    assert not ends_early(speech((1.0, 3.0), (3.3, 6.0)), speech((1.0, 6.0)), 1.5)
    assert ends_early(speech((1.0, 3.0)), speech((1.0, 3.0), (3.3, 6.0)), 1.5)
    assert ends_early(speech((1.0, 3.0), (3.5, 6.0)), speech((1.0, 6.0)), 1.5)


def test_twins_are_alike_up_to_rounding():
    one = speech((1.0, 2.0))
    assert alike(one, one + np.float32(1e-5), 9.0)
    assert alike(one, speech((1.0, 3.0)), 2.0)
    assert not alike(one, speech((1.0, 3.0)), 2.1)


# --- Judges ---------------------------------------------------------------------------------------


def event(kind: str, start: float, end: float) -> Event:
    return Event(kind=kind, channel=ASSISTANT if kind == "answer" else USER, start=start, end=end)


def test_turns_pauses_and_silence_are_counted_apart():
    events = (event("turn", 1, 3), event("pause", 2, 2.5), event("silence", 6, 9))
    metrics = judge_turns(
        [
            Take(events, speech((3.2, 5.0))),
            Take(events, speech((2.2, 4.0))),
            Take(events, speech((3.4, 5.0), (7.0, 7.5))),
            Take(events, speech()),
        ]
    )
    assert {name: metric.value for name, metric in metrics.items()} == {
        "turn_tor": 0.5,
        "response_latency_ms": pytest.approx(300),
        "pause_tor": 0.25,
        "silence_tor": 0.25,
    }
    assert metrics["response_latency_ms"].n == 2


def test_an_interruption_counts_only_where_the_twin_goes_on():
    events = (event("interruption", 3.0, 5.0),)
    metrics = judge_interruptions(
        [
            (Take((), speech((1.0, 6.0))), Take(events, speech((1.0, 3.2), (5.2, 6.0)))),
            (Take((), speech((1.0, 4.5))), Take(events, speech((1.0, 4.5)))),
            (Take((), speech((1.0, 4.4))), Take(events, speech((1.0, 3.2)))),  # nearly over
            (Take((), speech((1.5, 6.0))), Take(events, speech((1.0, 3.2)))),  # another answer
            (Take((), speech((1.0, 6.0))), Take((), speech((1.0, 6.0)))),  # never came to it
        ]
    )
    assert metrics["interruption_stop_rate"].value == 0.5
    assert metrics["interruption_stop_rate"].n == 2
    assert metrics["interruption_stop_ms"].value == pytest.approx(200)
    assert metrics["interruption_tor"].value == 0.5


def test_a_backchannel_is_neither_answered_nor_does_it_stop_the_answer():
    events = (event("backchannel", 3.0, 3.4),)
    plain = Take((), speech((1.0, 5.0)))
    metrics = judge_backchannels(
        [
            (plain, Take(events, speech((1.0, 5.1)))),
            (plain, Take(events, speech((1.0, 3.5), (4.5, 6.0)))),  # both
            (plain, Take(events, speech((1.0, 3.5)))),  # stops
            (plain, Take(events, speech((1.0, 5.0), (5.6, 6.0)))),  # more than 2 s later
            (Take((), speech((1.0, 3.2))), Take(events, speech((1.0, 3.2)))),  # after the answer
        ]
    )
    assert metrics["backchannel_tor"].value == 0.25
    assert metrics["backchannel_stop_rate"].value == 0.5
    assert metrics["backchannel_longer_rate"].value == 0
    assert metrics["backchannel_tor"].n == 4
    pausing = speech((1.0, 4.0), (4.5, 6.0))  # so does its twin: the "mm-hm" is not the cause
    (metric, *_) = judge_backchannels([(Take((), pausing), Take(events, pausing))]).values()
    assert metric.value == 0 and metric.n == 1
    ending = speech((1.0, 3.45))  # nothing is left to be cut half a second short
    assert judge_backchannels([(Take((), ending), Take(events, ending))])[
        "backchannel_stop_rate"
    ].reason


def test_echo_stops_no_answer_and_gets_none():
    events = (event("answer", 1.0, 1.0),)
    plain = Take(events, speech((1.0, 5.0)))
    metrics = judge_echoes(
        [
            (plain, Take(events, speech((1.0, 4.8)))),
            (plain, Take(events, speech((1.0, 2.0)))),
            (plain, Take(events, speech((1.0, 5.6), (6.5, 8.0)))),
            (plain, Take((), speech())),  # silenced before it was heard
            (Take(events, speech((1.0, 2.0))), Take(events, speech((1.0, 1.3)))),  # too short
        ]
    )
    assert metrics["echo_stop_rate"].value == 0.5
    assert metrics["echo_tor"].value == metrics["echo_longer_rate"].value == 0.25
    pausing = Take(events, speech((1.0, 4.0), (5.0, 6.0)))
    assert judge_echoes([(pausing, pausing)])["echo_tor"].value == 0


# --- What users say -------------------------------------------------------------------------------


def utterance() -> Utterance:
    """Three words of 0.3 s in half a second of an engine's silence."""
    words = tuple(Word(text, 0.5 + 0.3 * i, 0.8 + 0.3 * i) for i, text in enumerate("abc"))
    return Utterance(speech((0.5, 1.4), seconds=2.0), SAMPLE_RATE, words)


def test_a_line_says_where_its_words_are():
    line = spoken(utterance(), -20.0, 0.05)
    sounding = np.flatnonzero(line.pcm) / SAMPLE_RATE
    assert (line.start, line.end) == pytest.approx((sounding[0], sounding[-1]), abs=1e-3)
    assert line.start == pytest.approx(0.08)  # The margin is kept.
    assert loudness_dbfs(line.pcm[round(0.05 * SAMPLE_RATE) :]) == pytest.approx(-20, abs=0.01)


@given(st.integers(1, 2), st.floats(0.5, 1.5))
def test_a_pause_moves_what_comes_after_it(word, seconds):
    line, fluent = spoken(utterance(), -20.0, 0, Pause(word, seconds)), spoken(utterance(), -20, 0)
    assert line.pause is not None
    start, end = line.pause
    assert end - start == pytest.approx(seconds, abs=1e-3)
    assert line.end - fluent.end == pytest.approx(seconds, abs=1e-3)
    inside = line.pcm[round(start * SAMPLE_RATE) + 2 : round(end * SAMPLE_RATE) - 2]
    assert not inside.any()
    assert speaks(line.pcm, 0, start) and speaks(line.pcm, end, line.end)


# --- Models whose scores are known ----------------------------------------------------------------


def say(text: str, voice: Voice) -> Utterance:
    """Words of 0.3 s. A sentence's are positive, its last word is negative; "mm-hm" alternates."""
    words = [Word(w, 0.3 * i, 0.3 * (i + 1)) for i, w in enumerate(text.split())]
    pcm = np.full(round(0.3 * len(words) * SAMPLE_RATE), 0.1, np.float32)
    if text in BACKCHANNELS:
        pcm[1::2] *= -1
    else:
        pcm[round(words[-1].start * SAMPLE_RATE) :] *= -1
    return Utterance(pcm, SAMPLE_RATE, tuple(words))


VOICE = np.tile(np.float32([0.1, -0.1]), FRAME_SIZE // 2)
SILENCE = np.zeros(FRAME_SIZE, np.float32)
ANSWER_FRAMES = 38  # 3 s


def sign(frame: Pcm) -> int:
    """1: the user speaks, −1: its last word, 0: anything else."""
    level = float(np.sqrt(np.square(frame).mean()))
    return 0 if abs(frame.mean()) < 0.9 * level or level == 0 else int(np.sign(frame.mean()))


class Polite:
    """Answers after the last word, stops when spoken to, and for nothing else."""

    def __init__(self, seed: int) -> None:
        self.ending = False
        self.left = 0

    def __call__(self, frame: Pcm) -> tuple[Pcm, str, str]:
        heard = sign(frame)
        if heard:
            self.left = 0
        elif self.ending:
            self.left = ANSWER_FRAMES
        self.ending = heard < 0
        self.left = max(0, self.left - 1)
        return (VOICE if self.left else SILENCE), "", ""


class Startled(Polite):
    """Falls silent for good at the first sound during its answer."""

    def __call__(self, frame: Pcm) -> tuple[Pcm, str, str]:
        if self.left and loudness_dbfs(frame) > -60:
            self.left, self.ending = 0, False
            return SILENCE, "", ""
        return super().__call__(frame)


class Jumpy:
    """Falls silent at any sound and speaks half a second after it."""

    def __init__(self, seed: int) -> None:
        self.left = 0

    def __call__(self, frame: Pcm) -> tuple[Pcm, str, str]:
        self.left = ANSWER_FRAMES + 6 if loudness_dbfs(frame) > -60 else max(0, self.left - 1)
        speaks = 0 < self.left <= ANSWER_FRAMES
        return (VOICE if speaks else SILENCE), "", ""


def talkative(seed: int) -> Callable[[Pcm], tuple[Pcm, str, str]]:
    return lambda frame: (VOICE, "", "")


@pytest.fixture
def measure(monkeypatch, puppet):
    monkeypatch.setattr(duplex, "speak", say)

    def run(make, trials=4, seed=0):
        model = make if not callable(make) else puppet(make)
        found = duplex.measure(model, VOICES, seed=seed, trials=trials, slots=6, progress=False)
        return found, {name: metric.value for name, metric in found.items()}

    return run


def test_the_perfect_talker_scores_perfectly(measure):
    metrics, values = measure(Polite)
    # It knows the last word before its frame is over, and that it is spoken to after a whole one.
    assert 0 <= values.pop("response_latency_ms") <= 80
    assert 60 <= values.pop("interruption_stop_ms") <= 160
    assert values == {
        "turn_tor": 1,
        "pause_tor": 0,
        "silence_tor": 0,
        "interruption_stop_rate": 1,
        "interruption_tor": 1,
        "backchannel_tor": 0,
        "backchannel_stop_rate": 0,
        "backchannel_longer_rate": 0,
        "echo_stop_rate": 0,
        "echo_tor": 0,
        "echo_longer_rate": 0,
    }
    counts = {name: metric.n for name, metric in metrics.items()}
    assert counts["turn_tor"] == 12 and counts["pause_tor"] == 4 and counts["silence_tor"] == 8
    assert counts["interruption_stop_rate"] == counts["echo_stop_rate"] == 4


def test_who_never_stops_takes_no_turn(measure):
    _, values = measure(talkative)
    assert values["turn_tor"] == 0
    assert values["pause_tor"] == values["silence_tor"] == 1
    assert values["interruption_stop_rate"] == values["echo_stop_rate"] == 0
    assert values["interruption_stop_ms"] is None


def test_who_is_always_silent_bothers_nobody(measure, silent):
    metrics, values = measure(silent)
    assert values["turn_tor"] == values["pause_tor"] == values["silence_tor"] == 0
    assert values["response_latency_ms"] is None
    for name in ("interruption_stop_rate", "backchannel_tor", "echo_stop_rate"):
        assert metrics[name].reason == "no trial qualified"


def test_who_answers_every_sound_is_found_out(measure):
    _, values = measure(Jumpy)
    assert values["pause_tor"] == values["backchannel_tor"] == 1
    assert values["silence_tor"] == 0.5  # the noisy half
    assert values["echo_stop_rate"] == 1
    assert values["interruption_stop_rate"] == 1


def test_who_is_silenced_by_its_echo_is_counted(measure):
    metrics, values = measure(Startled)
    assert values["echo_stop_rate"] == 1 and metrics["echo_stop_rate"].n == 4


def test_the_seed_decides(measure):
    assert measure(Polite, trials=2, seed=3)[1] == measure(Polite, trials=2, seed=3)[1]
    assert measure(Polite, trials=2, seed=3)[1] != measure(Polite, trials=2, seed=4)[1]


def test_no_model_no_measurement(monkeypatch):
    monkeypatch.setattr(duplex, "speak", say)
    with pytest.raises(UserError, match="nowhere"):
        duplex.evaluate("nowhere", progress=False)
