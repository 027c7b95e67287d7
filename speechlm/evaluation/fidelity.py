"""How alike two sounds are: plain functions of waveforms, without any codec or file.

Every function takes mono float32 [S] at 24 kHz. Those of two sounds take the original first and
want both in step: a lag of a few milliseconds is heard by nobody and ruins `si_sdr`. What cannot be
said of a sound (nothing was spoken, it is too short) is None, never a number.

What each is blind to:

    si_sdr          judges phase: a codec that redraws it may sound right at -10 dB
    mel_distance    hears loudness in bands of pitch, and no phase at all
    stft_distance   hears every bin alike, so noise in the treble weighs more than to an ear
    stoi, pesq      were fitted to listeners of noisy and of telephone speech, not to neural codecs
    voice_print     hears channel, noise and effort as part of the voice

Letters: S samples, B bins, T frames, D numbers of a voice print.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pystoi
import scipy.fft
import torch
from torch import Tensor

from audio_codec.audio import SAMPLE_RATE, LogMel, Pcm, resample
from audio_codec.losses import MultiScaleMel

MEL_SCALES: Final = ((256, 20), (512, 40), (1024, 80), (2048, 160))
"""(FFT size, mel bands) of each resolution of `mel_distance`."""
STFT_SIZES: Final = (512, 1024, 2048)
"""Windows of `stft_distance`, in samples; a hop is a quarter of one."""
BEST_SI_SDR: Final = 100.0
"""dB; beyond it float32 says more of itself than of the sound."""

_STOI_SECONDS = 0.4  # One of its windows is 384 ms.
_PESQ_RATE = 16_000
_PESQ_SECONDS = 0.25
_CEPSTRA = 19  # Without the zeroth, which is loudness.
_ACTIVE = 30 / 10 * np.log(10)  # 30 dB of power, in nepers.


def si_sdr(original: Pcm, decoded: Pcm) -> float | None:
    """Scale-invariant signal-to-distortion ratio (Le Roux et al., arXiv 1811.02508), in dB.

    Split `decoded` into a multiple of `original` and a rest that is orthogonal to it; the ratio of
    their powers is rho^2 / (1 - rho^2) with rho the correlation of the two sounds, so no scaling
    and no offset of either changes it. Clipped to ±100 dB; None when the original is silent.
    """
    assert original.shape == decoded.shape, (original.shape, decoded.shape)
    x, y = (pcm.astype(np.float64) - pcm.mean(dtype=np.float64) for pcm in (original, decoded))
    power = float(x @ x)
    if power == 0:
        return None
    other = float(y @ y)
    shared = float(x @ y) ** 2 / (power * other) if other > 0 else 0.0
    least = 10 ** (-BEST_SI_SDR / 10)
    shared = min(max(shared, least), 1 - least)
    return float(10 * np.log10(shared / (1 - shared)))


def mel_distance(original: Pcm, decoded: Pcm) -> float:
    """Mean absolute difference of natural-log mel spectra at four resolutions; see `MEL_SCALES`.

    Halving the amplitude of a loud sound gives ln 2 = 0.69, an equal sound 0. The windows reach
    beyond both ends, where silence is.
    """
    return float(_mel()(_batch(decoded), _batch(original)))


@functools.cache
def _mel() -> MultiScaleMel:
    return MultiScaleMel(MEL_SCALES, floor=1e-5)


def stft_distance(original: Pcm, decoded: Pcm) -> float | None:
    """Spectral convergence plus log-magnitude distance, the mean of three resolutions.

    With magnitudes X of the original and Y: |X - Y| / |X| (Frobenius) + mean |ln X - ln Y|, the
    multi-resolution STFT loss of Parallel WaveGAN (arXiv 1910.11480). Halving the amplitude gives
    0.5 + ln 2, an equal sound 0. None when the original is silent.
    """
    if not original.any():
        return None
    found = []
    for size in STFT_SIZES:
        x, y = (_magnitudes(_batch(pcm), size) for pcm in (original, decoded))
        convergence = torch.linalg.norm(x - y) / torch.linalg.norm(x)
        found.append(float(convergence + (x.log() - y.log()).abs().mean()))
    return float(np.mean(found))


def _magnitudes(pcm: Tensor, size: int) -> Tensor:
    """[1, S] → [1, B, T], floored at -100 dB of a full-scale sine."""
    window = torch.hann_window(size)
    spectrum = torch.stft(
        pcm, size, size // 4, window=window, return_complex=True, pad_mode="constant"
    )
    return spectrum.abs().clamp(min=1e-5 * float(window.sum()) / 2)


def _batch(pcm: Pcm) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pcm, dtype=np.float32)).unsqueeze(0)


def stoi(original: Pcm, decoded: Pcm) -> float | None:
    """Short-time objective intelligibility (Taal et al., 2011): 0 … 1, rarely below 0.

    None when there is less than a window (384 ms) of sound once its silences are cut.
    """
    if len(original) < _STOI_SECONDS * SAMPLE_RATE or not original.any():
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Not enough STFT frames")
        try:
            return float(pystoi.stoi(original, decoded, SAMPLE_RATE))
        except RuntimeWarning:
            return None


def pesq_installed() -> bool:
    """Whether the optional package is there; it needs a C compiler to install."""
    return importlib.util.find_spec("pesq") is not None


def pesq(original: Pcm, decoded: Pcm) -> float | None:
    """Wide-band PESQ (ITU-T P.862.2) at 16 kHz: 1.0 (bad) … 4.6 (equal).

    None where the standard defines nothing: either sound is silent or shorter than 1/4 s. Raises
    ImportError where the optional package pesq is not installed.
    """
    from pesq import PesqError, pesq

    if len(original) < _PESQ_SECONDS * SAMPLE_RATE or not decoded.any():
        return None
    try:
        pair = [resample(pcm, SAMPLE_RATE, _PESQ_RATE) for pcm in (original, decoded)]
        return float(pesq(_PESQ_RATE, *pair, "wb"))
    except PesqError:  # its activity detector finds no utterance
        return None


# --- Whose voice is it? ---------------------------------------------------------------------------


@functools.cache
def _log_mel() -> LogMel:
    return LogMel()


def voice_print(pcm: Pcm) -> npt.NDArray[np.float64] | None:
    """What stays of a voice when its words are averaged out: [D], D = 38.

    Mean and standard deviation over time of 19 mel cepstra of the frames within 30 dB of the
    loudest: the average shape of the vocal tract and how much it moves. It is no trained speaker
    encoder: it also hears the microphone, the room and the noise, and a few seconds of one sentence
    colour it. Compare with `speaker_similarity`, which sets a scale. None when fewer than ten such
    frames (100 ms) were heard.
    """
    mel = _log_mel()
    whole = pcm[: len(pcm) // mel.stride * mel.stride]
    if not whole.any():
        return None
    bands = (mel(_batch(whole).unsqueeze(0))[0] * mel.DEVIATION + mel.MEAN).double().numpy()
    level = np.logaddexp.reduce(bands, axis=1)
    active = bands[level > level.max() - _ACTIVE]
    if len(active) < 10:
        return None
    cepstra = scipy.fft.dct(active, axis=1, norm="ortho")[:, 1 : _CEPSTRA + 1]
    return np.concatenate([cepstra.mean(0), cepstra.std(0)])


def speaker_similarity(
    originals: npt.NDArray[np.float64],
    decoded: npt.NDArray[np.float64],
    speakers: Sequence[str],
) -> tuple[npt.NDArray[np.float64], float] | None:
    """How much of its speaker each decoded sound keeps, and how far that can be trusted.

    Args:
        originals: voice prints [N, D] of the recordings.
        decoded: voice prints [N, D] of what became of them.
        speakers: who speaks in each.

    Every number of a print is scaled to zero mean and unit variance over `originals`; the
    similarity of two prints is their cosine. A decoded sound is compared to the *other* recordings
    of its speaker, so that its words do not help it, and the mean is put on the scale that the
    originals set: 0 is the mean similarity of recordings of different speakers, 1 that of different
    recordings of one speaker. So an untouched sound scores 1 on average, and a codec that gives
    every speaker one voice about 0.

    Returns (scores of those whose speaker has another recording, trust): trust is the share of
    (pair of one speaker, pair of two) in which the first is the more similar; 0.5 means that the
    prints cannot tell these speakers apart and the scores mean nothing. None where there is no
    scale: a single speaker, no speaker with two recordings, or prints to which those of one speaker
    are no more alike than those of two.
    """
    assert len(originals) == len(decoded) == len(speakers)
    who = np.asarray(speakers)
    same = (who[:, None] == who) & ~np.eye(len(who), dtype=bool)
    other = who[:, None] != who
    if not same.any() or not other.any():
        return None
    mean, deviation = originals.mean(0), originals.std(0)
    deviation[deviation == 0] = 1.0
    unit, heard = (
        z / np.linalg.norm(z, axis=1, keepdims=True).clip(min=1e-12)
        for z in ((originals - mean) / deviation, (decoded - mean) / deviation)
    )
    between = unit @ unit.T
    alike, apart = between[same], np.sort(between[other])
    low, high = apart.mean(), alike.mean()
    if high <= low:
        return None
    paired = np.flatnonzero(same.any(1))
    kept = np.array([(unit[same[i]] @ heard[i]).mean() for i in paired])
    below = np.searchsorted(apart, alike, "left") + np.searchsorted(apart, alike, "right")
    return (kept - low) / (high - low), float(below.mean() / (2 * len(apart)))
