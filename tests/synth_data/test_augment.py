"""Each augmentation does what its physics says, by measurement."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_codec.audio import SAMPLE_RATE
from synth_data import augment


def tone(frequency: float, seconds: float = 1.0, level: float = 0.3) -> np.ndarray:
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (level * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def power(pcm: np.ndarray) -> float:
    return float(np.square(pcm, dtype=np.float64).mean())


def db(ratio: float) -> float:
    return 10 * math.log10(ratio)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@given(st.floats(-40, 20))
def test_gain_moves_the_level(decibels: float) -> None:
    clip = tone(440, 0.1)
    assert db(power(augment.gain(clip, decibels)) / power(clip)) == pytest.approx(
        decibels, abs=0.01
    )


def test_limit_only_ever_lowers(rng: np.random.Generator) -> None:
    loud = 3 * augment.white(1000, rng)
    assert np.abs(augment.limit(loud)).max() == pytest.approx(0.99)
    np.testing.assert_array_equal(augment.limit(tone(440)), tone(440))
    assert len(augment.limit(loud[:0])) == 0


def test_active_power_leaves_silence_out() -> None:
    clip = tone(440)
    padded = np.pad(clip, 3 * SAMPLE_RATE)
    assert db(augment.active_power(padded) / power(clip)) == pytest.approx(0, abs=0.2)
    assert augment.active_power(clip[:0]) == 0
    assert augment.active_power(np.zeros(5000, np.float32)) == 0


def test_white_noise_is_flat_and_pink_falls_three_decibels_an_octave(
    rng: np.random.Generator,
) -> None:
    samples = 20 * SAMPLE_RATE
    frequency = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)

    def octave(noise: np.ndarray, start: float) -> float:
        """Power density in dB of the octave from ``start``."""
        spectrum = np.abs(np.fft.rfft(noise)) ** 2
        return db(spectrum[(frequency >= start) & (frequency < 2 * start)].mean())

    for make, slope in ((augment.white, 0.0), (augment.pink, -3.01)):
        noise = make(samples, rng)
        assert noise.dtype == np.float32 and power(noise) == pytest.approx(1, rel=0.02)
        steps = np.diff([octave(noise, start) for start in (100, 200, 400, 800, 1600, 3200)])
        assert np.allclose(steps, slope, atol=0.3)


@settings(deadline=None, max_examples=25)
@given(snr=st.floats(-10, 40), kind=st.sampled_from(["white", "pink", "babble", "clip"]))
def test_noise_has_the_signal_to_noise_ratio_asked_for(snr: float, kind: str) -> None:
    rng = np.random.default_rng(3)
    clean = np.pad(tone(440), (0, SAMPLE_RATE))  # Half of it silence, which must not count.
    clean[:SAMPLE_RATE] += tone(900, level=0.1)
    noise = {
        "white": lambda: augment.white(len(clean), rng),
        "pink": lambda: augment.pink(len(clean), rng),
        "babble": lambda: augment.babble([tone(200), tone(310, 0.4)], len(clean), rng),
        "clip": lambda: augment.excerpt(augment.white(5000, rng), len(clean), rng),
    }[kind]()
    noisy = augment.add_noise(clean, noise, snr)
    assert noisy.dtype == np.float32
    added = power(noisy.astype(np.float64) - clean)
    assert db(power(clean[:SAMPLE_RATE]) / added) == pytest.approx(snr, abs=0.1)


def test_noise_on_silence_and_silence_as_noise(rng: np.random.Generator) -> None:
    silence = np.zeros(SAMPLE_RATE, np.float32)
    hiss = augment.add_noise(silence, augment.white(SAMPLE_RATE, rng), 20)
    assert db(power(hiss)) == pytest.approx(-45, abs=0.1)
    np.testing.assert_array_equal(augment.add_noise(tone(440), silence, 0), tone(440))


def test_babble_holds_every_voice_at_equal_level(rng: np.random.Generator) -> None:
    mixed = augment.babble([tone(500, level=0.9), tone(2000, 0.5, level=0.01)], SAMPLE_RATE, rng)
    spectrum = np.abs(np.fft.rfft(mixed))
    assert db((spectrum[495:506] ** 2).sum() / (spectrum[1950:2051] ** 2).sum()) == pytest.approx(
        0, abs=1
    )


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 9))
def test_an_excerpt_is_a_run_of_the_clip(length: int, samples: int, seed: int) -> None:
    clip = np.arange(length, dtype=np.float32)
    cut = augment.excerpt(clip, samples, np.random.default_rng(seed))
    assert len(cut) == samples
    assert np.all(np.diff(cut) % length == 1 % length)
    if samples <= length:
        assert np.all(np.diff(cut) == 1)  # It does not go round without need.


@given(decibels=st.floats(-30, -10), delay=st.floats(0.05, 0.3))
def test_echo_is_the_other_channel_late_and_lower(decibels: float, delay: float) -> None:
    mine, other = tone(440, 0.5), np.zeros(SAMPLE_RATE // 2, np.float32)
    other[1000] = 1.0
    echo = augment.add_echo(mine, other, decibels, delay) - mine
    arrival = 1000 + round(delay * SAMPLE_RATE)
    assert 20 * math.log10(echo[arrival]) == pytest.approx(decibels, abs=0.01)
    assert np.count_nonzero(echo) == 1


def test_echo_later_than_the_clip_is_not_heard() -> None:
    clip = tone(440, 0.1)
    np.testing.assert_array_equal(augment.add_echo(clip, clip, 0, 0.2), clip)


@pytest.mark.parametrize("rt60", [0.2, 0.5, 1.0])
def test_a_room_decays_by_sixty_decibels(rng: np.random.Generator, rt60: float) -> None:
    response = augment.room(rng, rt60, direct_to_reverberant_db=3)
    assert response[0] == 1 and np.all(response[1:40] == 0)
    assert db(1 / np.square(response[1:], dtype=np.float64).sum()) == pytest.approx(3, abs=0.01)
    # Schroeder's backward integration: the slope between -5 and -25 dB, to 60 dB (T20, ISO 3382).
    decay = np.cumsum(np.square(response[:0:-1], dtype=np.float64))[::-1]
    level = 10 * np.log10(decay / decay[0])
    fall = np.flatnonzero(level < -25)[0] - np.flatnonzero(level < -5)[0]
    assert 3 * fall / SAMPLE_RATE == pytest.approx(rt60, rel=0.1)


def test_reverberation_convolves_from_the_same_start(rng: np.random.Generator) -> None:
    click = np.zeros(SAMPLE_RATE, np.float32)
    click[500] = 0.5
    response = augment.room(rng, 0.3)
    wet = augment.reverberate(click, response)
    assert wet.shape == click.shape and wet.dtype == np.float32
    np.testing.assert_allclose(wet[500 : 500 + len(response)], 0.5 * response, atol=1e-5)
    np.testing.assert_allclose(wet[:500], 0, atol=1e-5)
    assert len(augment.reverberate(click[:0], response)) == 0


def response_db(process, frequency: float) -> float:  # type: ignore[no-untyped-def]
    """Steady-state gain at a frequency, away from the clip's ends."""
    clip = tone(frequency, 0.5)
    middle = slice(SAMPLE_RATE // 8, -SAMPLE_RATE // 8)
    return db(power(process(clip)[middle]) / power(clip[middle]))


def test_telephone_keeps_its_band() -> None:
    for frequency in (600, 1000, 2500):
        assert response_db(augment.telephone, frequency) == pytest.approx(0, abs=0.5)
    for edge in (300, 3400):
        assert response_db(augment.telephone, edge) == pytest.approx(-3, abs=0.3)
    for frequency in (75, 8000):
        assert response_db(augment.telephone, frequency) < -30


@pytest.mark.parametrize("rate", [8000, 16000])
def test_a_low_rate_cuts_above_its_nyquist_frequency(rate: int) -> None:
    def through(clip: np.ndarray) -> np.ndarray:
        return augment.low_rate(clip, rate)

    assert response_db(through, 0.35 * rate) == pytest.approx(0, abs=0.3)
    assert response_db(through, 0.6 * rate) < -30
    clip = tone(rate / 8, 0.3)
    assert len(through(clip)) == len(clip)
    # In step in time: what comes out lies over what went in.
    assert np.abs(through(clip) - clip)[500:-500].max() < 0.01


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1, 1.25])
def test_speed_raises_pitch_and_shortens(factor: float) -> None:
    clip = tone(400)
    fast = augment.speed(clip, factor)
    assert len(fast) == pytest.approx(len(clip) / factor, abs=1)
    peak = np.fft.rfftfreq(len(fast), 1 / SAMPLE_RATE)[np.abs(np.fft.rfft(fast)).argmax()]
    assert peak == pytest.approx(400 * factor, abs=2)


def test_nothing_changes_its_input(rng: np.random.Generator) -> None:
    clip, other = tone(440, 0.2), tone(600, 0.2)
    before = clip.copy()
    augment.add_noise(clip, augment.white(len(clip), rng), 0)
    augment.add_echo(clip, other, -10, 0.05)
    augment.reverberate(clip, augment.room(rng, 0.2))
    augment.telephone(clip), augment.low_rate(clip, 8000), augment.speed(clip, 1.1)
    augment.gain(clip, 3), augment.limit(clip, 0.1)
    np.testing.assert_array_equal(clip, before)
