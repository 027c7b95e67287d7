"""Speech engines: the words lie where the sound is, and the same call gives the same bytes."""

from __future__ import annotations

import ctypes.util
import importlib.util
import sys
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_codec.audio import SAMPLE_RATE
from audio_codec.errors import UserError
from synth_data.text import normalize, spell_out, tokenize
from synth_data.tts import (
    ASSISTANT,
    Espeak,
    Flite,
    Voice,
    get_engine,
    new_speakers,
    sample_voices,
    speak,
    user_voices,
)

espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="needs espeakng-loader"
)
flite = pytest.mark.skipif(ctypes.util.find_library("flite") is None, reason="needs flite")
VOICES = [
    pytest.param("espeak:en-us", marks=espeak),
    pytest.param("espeak:en-gb-scotland+f2@rate=120,pitch=70", marks=espeak),
    pytest.param("espeak:en-029+klatt3@rate=230", marks=espeak),
    pytest.param("espeak:en-us+caleb@rate=170", marks=espeak),
    pytest.param("flite:rms", marks=flite),
    pytest.param("flite:kal@rate=0.8,pitch=140,range=20", marks=flite),
]


# --- Voices ---------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    st.builds(
        Voice,
        st.just("espeak"),
        st.from_regex(r"en[a-z-]{0,8}(\+[A-Za-z0-9]{1,8})?", fullmatch=True),
        st.none() | st.integers(80, 450).map(float),
        st.none() | st.integers(0, 99).map(float),
        st.none() | st.integers(0, 99).map(float),
    )
)
def test_a_voice_reads_back_what_it_writes(voice: Voice) -> None:
    assert Voice.parse(str(voice)) == voice


def test_five_of_the_held_out_voices_are_new_speakers() -> None:
    heldout = user_voices("heldout")
    new = new_speakers(heldout)
    assert (len(heldout), len(new)) == (14, 5)
    assert {voice.speaker[1] for voice in new} == {"kal", "kal16", "steph", "steph3"}
    assert not set(heldout) & set(user_voices("train"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rms", "engine:name"),
        ("mbrola:us1", "espeak, flite"),
        ("flite:", "engine:name"),
        ("flite:rms@loudness=3", "loudness"),
        ("flite:rms@rate=fast", "fast"),
        ("flite:rms@rate=9", "0.5..2"),
        ("espeak:en-us@pitch=100", "0..99"),
        ("festival:ked_diphone@pitch=1.1", "50..400"),
        ("rhvoice:clb@pitch=105", "0.5..2"),
        ("pico:en-GB@range=20", "no setting 'range'; choose rate or pitch"),
        ("piper:a.onnx@pitch=50", "no setting 'pitch'; choose rate"),
        ("http:http://host/speech@rate=3", "0.5..2"),
    ],
)
def test_a_bad_voice_is_one_clear_sentence(text: str, named: str) -> None:
    with pytest.raises(UserError) as raised:
        Voice.parse(text)
    assert named in str(raised.value)


def test_jitter_moves_a_voice_a_little() -> None:
    voice = Voice("espeak", "en-us+m1", rate=200, pitch=50)
    moved = [voice.jitter(np.random.default_rng(seed)) for seed in range(50)]
    assert len(set(moved)) == 50
    assert moved[0] == voice.jitter(np.random.default_rng(0))
    assert all(180 <= (v.rate or 0) <= 220 and 46 <= (v.pitch or 0) <= 54 for v in moved)
    assert all(v.pitch is None for v in [ASSISTANT.jitter(np.random.default_rng(0))])


def test_heldout_voices_hold_engine_voices_that_training_lacks() -> None:
    train, heldout = user_voices("train"), user_voices("heldout")
    assert len(train) >= 60 and len(heldout) >= 10
    assert len(set(train)) == len(train) and not set(train) & set(heldout)
    assert ASSISTANT.name not in {voice.name for voice in [*train, *heldout]}
    trained = {part for voice in train for part in voice.name.split("+")}
    new = {v.name for v in heldout if not trained & set(v.name.split("+"))}
    assert {name for name in new if name.startswith("kal")}
    assert {name for name in new if name.startswith("en-gb-scotland+")}
    # A combination of accent, variant, rate and pitch that training shows is no held-out voice.
    assert not {v.name for v in train if v.engine == "espeak"} & {v.name for v in heldout}


def test_the_wide_split_adds_speakers_equally_often_and_none_held_out() -> None:
    train, wide = user_voices("train"), user_voices("wide")
    assert wide == train  # Of the two engines of every installation.
    added = user_voices("wide", ("festival", "pico", "rhvoice"))
    everyone = user_voices("wide", ("espeak", "flite", "festival", "pico", "rhvoice"))
    assert everyone == train + added and len(set(everyone)) == len(everyone)
    counts = Counter((voice.engine, voice.name) for voice in added)
    assert len(counts) == 7 and set(counts.values()) == {6}
    assert not set(everyone) & set(user_voices("heldout"))
    assert not [voice for voice in everyone if "kal" in voice.name]  # In no engine.
    # Their licences forbid what is made of them, or its sale.
    assert not {voice.name for voice in added} & {"evgeniy-eng", "lyubov", "rab_diphone"}


def test_thousands_of_timbres_none_of_them_held_out() -> None:
    voices = sample_voices(3000, seed=1)
    assert len(set(voices)) == 3000
    assert voices[:50] == sample_voices(50, seed=1) != sample_voices(50, seed=2)
    heldout = user_voices("heldout")
    assert not {v.name for v in voices if v.engine == "espeak"} & {v.name for v in heldout}
    assert not [v for v in voices if "scotland" in v.name or "steph" in v.name or "kal" in v.name]
    assert len({voice.name for voice in voices}) > 200
    assert all(Voice.parse(str(voice)) == voice for voice in voices[:200])


def test_timbres_of_models() -> None:
    models = ("piper:libritts.onnx#0..903", "transformers:vits")
    voices = sample_voices(500, engines=(), models=models)
    assert len({v.name for v in voices}) > 300 and {v.engine for v in voices} <= {
        "piper",
        "transformers",
    }
    for wrong in (
        {"engines": ()},
        {"engines": ("piper",)},
        {"engines": (), "models": ("rms",)},
        {"models": ("flite:kal16",)},
        {"models": ("piper:libritts.onnx#9..0",)},
    ):
        with pytest.raises(UserError):
            sample_voices(3, **wrong)  # type: ignore[arg-type]


def test_voices_of_one_engine() -> None:
    assert {voice.engine for voice in user_voices("train", ("espeak",))} == {"espeak"}
    for split, engines in (
        ("test", ("espeak",)), ("train", ("festival",)), ("wide", ("mbrola",)), ("train", ()),
        ("train", ("piper",)),
    ):  # fmt: skip
        with pytest.raises(UserError):
            user_voices(split, engines)


# --- Engines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VOICES)
def test_words_are_the_text_and_lie_where_the_sound_is(name: str) -> None:
    text = "Seven of the best dogs, don't you think? It's twenty five. Well: goodbye!"
    utterance = speak(text, Voice.parse(name))
    assert utterance.sample_rate == SAMPLE_RATE and utterance.pcm.dtype == np.float32
    assert [word.text for word in utterance.words] == normalize(text).split()
    assert all(word.start < word.end for word in utterance.words)
    assert all(a.end <= b.start + 1e-3 for a, b in pairwise(utterance.words))
    assert utterance.words[-1].end <= utterance.seconds

    def level(start: float, end: float) -> float:
        cut = utterance.pcm[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)]
        return 10 * np.log10(np.square(cut).mean() + 1e-10)

    quietest_word = min(level(word.start, word.end) for word in utterance.words)
    pauses = [(a.end, b.start) for a, b in pairwise(utterance.words) if b.start - a.end > 0.06]
    assert len(pauses) >= 3  # After dogs, think, five, well.
    for start, end in pauses:
        assert level(start + 0.02, end - 0.02) < quietest_word - 10
        # The word after a pause begins to sound within 100 ms of its start (a stop is silent).
        assert level(end, end + 0.1) > level(start + 0.02, end - 0.02) + 10


@pytest.mark.parametrize("name", VOICES)
def test_an_utterance_does_not_depend_on_what_was_said_before(name: str) -> None:
    voice = Voice.parse(name)
    before = speak("How far is it?", voice)
    speak("Something else, in between.", voice)
    speak("And in another voice.", Voice(voice.engine, "slt" if voice.engine == "flite" else "en"))
    after = speak("How far is it?", voice)
    np.testing.assert_array_equal(before.pcm, after.pcm)
    assert before.words == after.words


@espeak
def test_espeak_noise_does_not_depend_on_the_time_of_day() -> None:
    breathy = Voice.parse("espeak:en-029+f5")
    before = speak("Hello there.", breathy)
    time.sleep(1.05)  # The engine's own seed is the clock, in seconds.
    np.testing.assert_array_equal(before.pcm, speak("Hello there.", breathy).pcm)


@pytest.mark.parametrize(
    ("base", "slow"),
    [
        pytest.param("espeak:en-us@rate=180", "espeak:en-us@rate=120", marks=espeak),
        pytest.param("flite:slt", "flite:slt@rate=0.667", marks=flite),
        pytest.param("flite:kal16", "flite:kal16@rate=0.667", marks=flite),
    ],
)
def test_rate_changes_the_duration(base: str, slow: str) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    spans = []
    for name in (base, slow, base):
        words = speak(text, Voice.parse(name)).words
        spans.append(words[-1].end - words[0].start)
    assert spans[1] == pytest.approx(1.5 * spans[0], rel=0.12)
    assert spans[2] == spans[0]  # A setting does not outlive its utterance.


def _pitch(pcm: np.ndarray) -> float:
    """F0 in Hz by the peak of the autocorrelation between 60 and 300 Hz."""
    correlation = np.fft.irfft(np.abs(np.fft.rfft(pcm, 2 * len(pcm))) ** 2)
    shortest, longest = SAMPLE_RATE // 300, SAMPLE_RATE // 60
    return SAMPLE_RATE / (shortest + int(correlation[shortest:longest].argmax()))


@pytest.mark.parametrize(
    ("low", "high"),
    [
        pytest.param("espeak:en@pitch=20,range=9", "espeak:en@pitch=80,range=9", marks=espeak),
        pytest.param("flite:kal16@pitch=90,range=2", "flite:kal16@pitch=180,range=2", marks=flite),
    ],
)
def test_pitch_raises_the_fundamental(low: str, high: str) -> None:
    text = "we are all away"
    lower, higher = (_pitch(speak(text, Voice.parse(name)).pcm) for name in (low, high))
    assert higher > 1.3 * lower
    if low.startswith("flite"):
        assert (lower, higher) == pytest.approx((90, 180), rel=0.12)


@espeak
@settings(max_examples=30, deadline=None)  # An engine's time is not ours to promise.
@given(
    st.lists(
        st.sampled_from(["of", "the", "a", "in", "to", "is", "one", "hot-dog", "I'd,", "no;", "x"]),
        min_size=1,
        max_size=6,
    )
)
def test_espeak_times_every_word(words: list[str]) -> None:
    text = " ".join(words)
    spoken = speak(text, Voice("espeak", "en-us")).words
    assert [word.text for word in spoken] == [token.text for token in tokenize(text)]
    assert all(word.start <= word.end for word in spoken)
    assert all(a.end <= b.start + 1e-3 for a, b in pairwise(spoken))


@pytest.mark.parametrize(
    "engine", [pytest.param("espeak:en-us", marks=espeak), pytest.param("flite:rms", marks=flite)]
)
def test_nothing_to_say_is_an_error(engine: str) -> None:
    for text in ("", "  ", "?!"):
        with pytest.raises(UserError, match="no word"):
            speak(text, Voice.parse(engine))


@flite
def test_flite_refuses_what_it_would_misread() -> None:
    with pytest.raises(UserError, match="spoken form"):
        speak("café", ASSISTANT)
    assert speak(spell_out("café"), ASSISTANT).words[0].text == "cafe"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("espeak:en-us+nobody", marks=espeak),
        pytest.param("espeak:de", marks=espeak),
        pytest.param("flite:cmu", marks=flite),
    ],
)
def test_unknown_voices_name_the_choices(name: str) -> None:
    with pytest.raises(UserError, match="choose one of"):
        speak("hello", Voice.parse(name))


def test_a_missing_engine_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match="pip install espeakng-loader"):
        Espeak()
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(UserError, match="apt install flite"):
        Flite()
    with pytest.raises(UserError, match="espeak, flite"):
        get_engine("mbrola")
