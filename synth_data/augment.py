"""Makes clean speech sound like a call: level, noise, echo, rooms, band limits, speed.

Each function is pure: float32 [S] at 24 kHz in, a new float32 [S] out, randomness from the ``rng``
passed in. Nothing clips: levels may leave -1..1 until ``limit`` is applied at the end.

Signal-to-noise ratios are of mean powers over the whole clip (for speech: over its active 20 ms
blocks, so that silence around it does not change what "10 dB" sounds like).
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import signal

from audio_codec.audio import SAMPLE_RATE, resample

Pcm = npt.NDArray[np.float32]

# A block counts as speech within this distance of the loudest block.
_ACTIVE_DB = -35.0
_BLOCK = SAMPLE_RATE // 50


def active_power(pcm: Pcm) -> float:
    """Mean power of the 20 ms blocks that lie within 35 dB of the loudest one."""
    if not len(pcm):
        return 0.0
    padded = np.pad(pcm.astype(np.float64), (0, -len(pcm) % _BLOCK))
    powers = np.square(padded).reshape(-1, _BLOCK).mean(axis=1)
    return float(powers[powers >= powers.max() * 10 ** (_ACTIVE_DB / 10)].mean())


# --- Level ----------------------------------------------------------------------------------------


def gain(pcm: Pcm, db: float) -> Pcm:
    """Scale by ``db`` decibels."""
    return np.asarray(pcm * 10 ** (db / 20), dtype=np.float32)


def limit(pcm: Pcm, peak: float = 0.99) -> Pcm:
    """Scale down, if need be, so that no sample is beyond ``peak``."""
    loudest = float(np.abs(pcm).max(initial=0.0))
    return pcm if loudest <= peak else np.asarray(pcm * (peak / loudest), dtype=np.float32)


# --- Noise ----------------------------------------------------------------------------------------


def white(samples: int, rng: np.random.Generator) -> Pcm:
    """Gaussian noise of unit power, equal at every frequency."""
    return rng.standard_normal(samples, dtype=np.float32)


def pink(samples: int, rng: np.random.Generator) -> Pcm:
    """Gaussian noise of unit power that falls by 3 dB an octave from 20 Hz up (flat below)."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    shaped = np.fft.irfft(spectrum / np.sqrt(np.maximum(frequency, 20.0)), samples)
    return np.asarray(shaped / math.sqrt(np.square(shaped).mean()), dtype=np.float32)


def babble(voices: Sequence[Pcm], samples: int, rng: np.random.Generator) -> Pcm:
    """Several people at once: each clip at equal level, looped from a random place."""
    assert voices, "babble needs at least one voice"
    mixed = np.zeros(samples, dtype=np.float32)
    for voice in voices:
        if power := active_power(voice):
            mixed += excerpt(voice, samples, rng) / math.sqrt(power)
    return mixed


def excerpt(clip: Pcm, samples: int, rng: np.random.Generator) -> Pcm:
    """``samples`` samples of a clip from a random place, going round when it is shorter."""
    assert len(clip), "an excerpt of an empty clip"
    spare = len(clip) - samples
    start = int(rng.integers(spare + 1 if spare >= 0 else len(clip)))
    return np.take(clip, np.arange(start, start + samples), mode="wrap")


def add_noise(pcm: Pcm, noise: Pcm, snr_db: float) -> Pcm:
    """Add ``noise`` of the same length ``snr_db`` below the speech.

    A clip without speech gets the noise as it would lie under speech at -25 dBFS.
    """
    assert pcm.shape == noise.shape, (pcm.shape, noise.shape)
    noise_power = float(np.square(noise, dtype=np.float64).mean()) if len(noise) else 0.0
    if noise_power == 0:
        return pcm.copy()
    speech_power = active_power(pcm) or 10 ** (-25 / 10)
    scale = math.sqrt(speech_power / noise_power) * 10 ** (-snr_db / 20)
    return np.asarray(pcm + noise * scale, dtype=np.float32)


# --- Rooms and lines ------------------------------------------------------------------------------


def add_echo(pcm: Pcm, other: Pcm, db: float, delay_seconds: float) -> Pcm:
    """The other channel returns through the loudspeaker: ``db`` (negative) and late.

    Of the other channel only what lies in the past is heard: the echo starts after the delay and
    its last ``delay_seconds`` fall off the end.
    """
    assert pcm.shape == other.shape, (pcm.shape, other.shape)
    shift = round(delay_seconds * SAMPLE_RATE)
    assert shift >= 0, delay_seconds
    mixed = pcm.copy()
    if shift < len(pcm):
        mixed[shift:] += other[: len(pcm) - shift] * np.float32(10 ** (db / 20))
    return mixed


def room(rng: np.random.Generator, rt60: float, direct_to_reverberant_db: float = 6.0) -> Pcm:
    """An impulse response: a unit impulse, then noise that falls by 60 dB in ``rt60`` seconds.

    Polack's statistical model of late reverberation (Polack, 1988). The tail starts 2 ms after the
    impulse and holds ``direct_to_reverberant_db`` less energy than it. Length ``rt60`` seconds.
    """
    assert rt60 > 0, rt60
    samples = max(2, round(rt60 * SAMPLE_RATE))
    time = np.arange(samples) / SAMPLE_RATE
    tail = rng.standard_normal(samples) * 10 ** (-3 * time / rt60)
    tail[: round(0.002 * SAMPLE_RATE)] = 0.0
    tail[0] = 0.0
    energy = float(np.square(tail).sum())
    if energy:
        tail *= 10 ** (-direct_to_reverberant_db / 20) / math.sqrt(energy)
    tail[0] = 1.0
    return np.asarray(tail, dtype=np.float32)


def reverberate(pcm: Pcm, response: Pcm) -> Pcm:
    """Convolve with a room's impulse response; the same length and, for speech, the same start."""
    if not len(pcm):
        return pcm.copy()
    return np.asarray(signal.fftconvolve(pcm, response)[: len(pcm)], dtype=np.float32)


def telephone(pcm: Pcm) -> Pcm:
    """The band of a telephone line, 300 to 3400 Hz (-3 dB; 24 dB an octave)."""
    sections = signal.butter(4, (300, 3400), "bandpass", fs=SAMPLE_RATE, output="sos")
    return np.asarray(signal.sosfilt(sections, pcm), dtype=np.float32)


def low_rate(pcm: Pcm, sample_rate: int) -> Pcm:
    """As if recorded at a lower rate (8000 or 16000 Hz): down and up again, in step in time."""
    assert 0 < sample_rate < SAMPLE_RATE, sample_rate
    narrow = resample(pcm, SAMPLE_RATE, sample_rate)
    return resample(narrow, sample_rate, SAMPLE_RATE)[: len(pcm)]


def speed(pcm: Pcm, factor: float) -> Pcm:
    """Play ``factor`` times as fast: pitch rises and duration falls together, as on tape.

    The factor is taken to the nearest hundredth. Divide word times by it.
    """
    hundredths = round(factor * 100)
    assert hundredths > 0, factor
    return resample(pcm, hundredths, 100)
