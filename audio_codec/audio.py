"""Sound in and out of files, and the features that models hear.

Everything inside the project is mono float32 in [-1, 1] at 24 kHz, cut into frames of 1920 samples
(80 ms, 12.5 a second). This file is where any other sound becomes that.

Letters: B batch, S samples, T mel frames, M mel bands.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import scipy.fft
import scipy.signal
import soundfile
import sphn
import torch
import torchaudio.functional
from torch import Tensor, nn

from audio_codec import files
from audio_codec.errors import UserError
from audio_codec.layers import few_rows, windows
from audio_codec.state import State, all_active

SAMPLE_RATE: Final = 24_000  # Hz
FRAME_SIZE: Final = 1_920  # samples
FRAME_RATE: Final = SAMPLE_RATE / FRAME_SIZE  # 12.5 Hz

WINDOW: Final = SAMPLE_RATE // 100
"""Samples (10 ms) over which a level is taken where an onset or an end matters."""
AUDIBLE_DBFS: Final = -40.0
"""A window louder than this is heard."""

Pcm = npt.NDArray[np.float32]

log = logging.getLogger(__name__)

# suffix -> (libsndfile container, subtype). 16 bits: 6 dB a bit leave the noise at -98 dBFS.
_WRITABLE = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
_CONTAINERS = {".wav": {"WAV", "WAVEX", "RF64"}, ".flac": {"FLAC"}, ".mp3": {"MPEG", "MP3"}}
SUFFIXES: Final = frozenset({*_WRITABLE, ".aac", ".aif", ".aiff", ".m4a", ".mp4", ".oga", ".wave"})
"""Of files that are taken for sound in a folder; a file named by itself may have any."""

_USUAL_RATES = range(8_000, 48_001)


def load(path: str | Path, sample_rate: int = SAMPLE_RATE) -> Pcm:
    """Read a sound file as mono float32 [S] at `sample_rate` Hz.

    Any container, rate and number of channels that libsndfile (or, failing that, sphn) can decode;
    channels are averaged. What is usable but unusual (more than two channels, a rate outside
    8-48 kHz, a suffix that lies about the content) is used, with one notice in the log.

    Raises UserError when the file is missing, empty, not decodable, shorter than two samples or not
    finite.
    """
    return np.concatenate(list(load_blocks(path, sample_rate, seconds=math.inf)))


def load_blocks(
    path: str | Path, sample_rate: int = SAMPLE_RATE, seconds: float = 10.0
) -> Iterator[Pcm]:
    """`load` in blocks [s] of about so many seconds; joined they equal what it gives, to the bit.

    Memory does not grow with the length of the file, but where only sphn can decode it (AAC, MP4):
    such a file is decoded whole. Raises UserError where `load` does; what is wrong further on in
    the file shows only there.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a sound file.")
    if not path.exists():
        raise UserError(f"There is no sound file {path}.")
    if not path.is_file():
        raise UserError(f"{path} is a pipe or a device; give a file, or - for standard input.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes).")
    decoded = _decode(path, seconds)
    first, rate, container = next(decoded)  # [channels, s]
    rest = (samples for samples, _, _ in decoded)
    blocks = _mix_down(path, itertools.chain([first], rest))

    unusual = []
    if len(first) > 2:
        unusual.append(f"{len(first)} channels, averaged")
    if rate not in _USUAL_RATES:
        unusual.append(f"{rate} Hz, resampled to {sample_rate}")
    expected = _CONTAINERS.get(path.suffix.lower())
    if expected is not None and container not in expected:
        unusual.append(f"{container} inside, whatever its name says")
    if unusual:
        log.warning("%s is unusual: %s.", path, "; ".join(unusual))
    yield from resample_blocks(blocks, rate, sample_rate)


# A name that ends in .raw is taken for headerless sound, whose rate would have to be told.
_UNREADABLE = (soundfile.LibsndfileError, RuntimeError, TypeError)


def duration(path: str | Path) -> float | None:
    """Seconds that a sound file's header says it lasts; None where libsndfile cannot tell."""
    try:
        info = soundfile.info(path)
    except _UNREADABLE:
        return None
    return float(info.duration) if info.frames < _UNSAID else None


@dataclass(frozen=True)
class SoundHeader:
    """What a sound file says about itself."""

    seconds: float
    sample_rate: int
    channels: int
    container: str

    def __str__(self) -> str:
        channels = f"{self.channels} channel{'' if self.channels == 1 else 's'}"
        return f"{self.seconds:.2f} s of sound, {self.sample_rate} Hz, {channels}, {self.container}"


def read_header(path: str | Path) -> SoundHeader:
    """What a sound file's header says; a file that only sphn can read is decoded for it.

    Raises UserError when the file is missing or cannot be decoded as sound.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no sound file {path}.")
    try:
        info = soundfile.info(path)
        _check_said(path, info.frames, info.format)
        return SoundHeader(info.duration, info.samplerate, info.channels, info.format)
    except _UNREADABLE:
        samples, rate, container = next(_decode(path, math.inf))
        return SoundHeader(samples.shape[1] / rate, rate, len(samples), container)


def _decode(path: Path, seconds: float) -> Iterator[tuple[Pcm, int, str]]:
    """Blocks of samples [channels, s], at least one; with each the rate and the container."""
    begun = flac = False
    try:
        with soundfile.SoundFile(path) as file:
            flac = file.format == "FLAC"  # sphn would take what there is of one for all
            _check_said(path, file.frames, file.format)
            most = -1 if math.isinf(seconds) else max(1, round(seconds * file.samplerate))
            count = 0
            while True:
                samples = file.read(most, dtype="float32", always_2d=True).T
                if begun and not samples.size:
                    break
                begun = True
                count += samples.shape[1]
                yield samples, file.samplerate, file.format
            if flac and count < file.frames:  # others count what is there
                raise UserError(
                    f"{path} cannot be decoded as sound to its end: it holds {count} of "
                    f"{file.frames} samples."
                )
    except _UNREADABLE as first:
        if begun or flac:
            raise UserError(f"{path} cannot be decoded as sound to its end: {first}") from first
        try:  # libsndfile knows no AAC or MP4; Symphonia, inside sphn, does
            samples, rate = sphn.read(str(path))
        except Exception as second:  # sphn raises bare Exceptions of no narrower type
            raise UserError(f"{path} cannot be decoded as sound: {first}") from second
        yield np.asarray(samples, dtype=np.float32), int(rate), path.suffix.lstrip(".").upper()


_UNSAID = 2**62
"""Frames that libsndfile gives, or more, where a header does not tell."""


def _check_said(path: Path, frames: int, container: str) -> None:
    if frames >= _UNSAID:  # as of a FLAC that was encoded into a pipe; it cannot be read to its end
        raise UserError(
            f"{path} does not say how long it is; encode it anew from a file, or as WAV "
            f"instead of {container}."
        )


def _mix_down(path: Path, blocks: Iterable[Pcm]) -> Iterator[Pcm]:
    """Blocks [channels, s] -> mono [s]; UserError when they are not finite or not sound."""
    count = 0
    for block in blocks:
        if not np.isfinite(block).all():
            raise UserError(f"{path} holds values that are not numbers (NaN or infinity).")
        count += block.shape[1]
        yield block.mean(axis=0, dtype=np.float32)
    if count < 2:
        raise UserError(f"{path} holds {count} sample{'' if count else 's'}; sound needs two.")


def check_writable(path: str | Path) -> None:
    """Raise the UserError that `save` would raise for this path; touch nothing."""
    path = Path(path)
    if path.suffix.lower() not in _WRITABLE:
        choices = ", ".join(_WRITABLE)
        raise UserError(
            f"Cannot write sound as {path.name!r}: the suffix must be one of {choices}."
        )
    files.check_writable(path)


def save(path: str | Path, pcm: npt.ArrayLike, sample_rate: int = SAMPLE_RATE) -> None:
    """Write mono `pcm` [S] to `path`, clipped to [-1, 1]; the suffix chooses the container.

    The file appears whole or not at all: it is written under a temporary name and renamed.
    Raises UserError for a suffix that cannot be written or a folder that refuses.
    """
    with saving(path, sample_rate) as write:
        write(pcm)


@contextmanager
def saving(
    path: str | Path, sample_rate: int = SAMPLE_RATE
) -> Iterator[Callable[[npt.ArrayLike], None]]:
    """`save` in blocks: yields what writes one [s] after another."""
    path = Path(path)
    check_writable(path)
    container, subtype = _WRITABLE[path.suffix.lower()]
    try:
        with (
            files.replacing(path) as temporary,
            soundfile.SoundFile(temporary, "w", sample_rate, 1, subtype, format=container) as file,
        ):

            def write(pcm: npt.ArrayLike) -> None:
                samples = np.asarray(pcm, dtype=np.float32)
                assert samples.ndim == 1, f"pcm is [S], got shape {samples.shape}"
                assert np.isfinite(samples).all(), "pcm must be finite"
                file.write(samples.clip(-1, 1))

            yield write
    except soundfile.LibsndfileError as error:  # A full disk is one too, not an OSError.
        raise UserError(f"Cannot write {path}: {error}") from error


def resample(pcm: Pcm, source_rate: int, target_rate: int) -> Pcm:
    """Change the rate of `pcm` [..., S] in Hz; the result has ceil(S * target / source) samples.

    Polyphase filtering with a linear-phase low pass at the lower Nyquist frequency, so that sound
    stays where it was in time; the Kaiser window (beta 8.6) keeps aliases about 80 dB down.
    """
    assert source_rate > 0 and target_rate > 0, (source_rate, target_rate)
    if source_rate == target_rate:
        return np.asarray(pcm, dtype=np.float32)
    common = math.gcd(source_rate, target_rate)
    resampled = scipy.signal.resample_poly(
        pcm, target_rate // common, source_rate // common, axis=-1, window=("kaiser", 8.6)
    )
    return np.asarray(resampled, dtype=np.float32)


def resample_blocks(blocks: Iterable[Pcm], source_rate: int, target_rate: int) -> Iterator[Pcm]:
    """`resample` of a sound that comes in blocks [s]: joined, the results are equal to the bit.

    An output hears 10 max(up, down) / up inputs on either side (the filter of `resample_poly`), so
    each block is filtered with that much of its neighbours, in whole periods of the two rates:

        inputs    |-- margin --|-------- new --------|-- margin --|
        outputs                |-------- out --------|
        next time              .        |-- margin --|---------- new …
    """
    if source_rate == target_rate:
        yield from blocks
        return
    common = math.gcd(source_rate, target_rate)
    up, down = target_rate // common, source_rate // common  # of `down` inputs become `up` outputs
    margin = math.ceil(10 * max(up, down) / up / down) * down
    held, past = np.zeros(0, np.float32), 0  # the first `past` inputs held are margin alone
    for block in blocks:
        held = np.concatenate((held, block))
        ready = (len(held) - margin) // down * down
        if ready <= past:
            continue
        made = resample(held[: ready + margin], source_rate, target_rate)
        yield made[past * up // down : ready * up // down]
        spent = max(0, ready - margin)
        held, past = held[spent:], ready - spent
    if len(held):
        yield resample(held, source_rate, target_rate)[past * up // down :]


def loudness_dbfs(pcm: Pcm) -> float:
    """Root-mean-square level in dB relative to full scale: a square wave of 1.0 is 0 dBFS, a sine
    -3 dBFS, silence (or no samples) minus infinity.
    """
    power = float(np.mean(np.square(pcm, dtype=np.float64))) if len(pcm) else 0.0
    return 10 * math.log10(power) if power > 0 else -math.inf


def window_levels(pcm: Pcm) -> npt.NDArray[np.float64]:
    """Level in dBFS of every whole `WINDOW` of pcm [S]: [S // 240]; −100 for digital silence."""
    windows = pcm[: len(pcm) // WINDOW * WINDOW].reshape(-1, WINDOW)
    power = np.square(windows, dtype=np.float64).mean(axis=1)
    return np.asarray(10 * np.log10(power + 1e-10))


def audible(pcm: Pcm) -> npt.NDArray[np.bool_]:
    """Which whole `WINDOW`s of pcm [S] are heard: bool [S // 240]."""
    return window_levels(pcm) > AUDIBLE_DBFS


def normalize(pcm: Pcm, dbfs: float) -> Pcm:
    """Scale `pcm` [S] to a level of `dbfs` (RMS), or to a peak of 1.0 if it would clip before.

    Silence stays silence.
    """
    level = loudness_dbfs(pcm)
    if level == -math.inf:
        return np.asarray(pcm, dtype=np.float32)
    gain = 10 ** ((dbfs - level) / 20)
    return np.asarray(pcm * min(gain, 1 / float(np.abs(pcm).max())), dtype=np.float32)


def mel_filterbank(sample_rate: int, n_fft: int, n_mels: int, f_min: float, f_max: float) -> Tensor:
    """Triangular mel filters [n_fft // 2 + 1, M] whose columns each sum to one.

    A power spectrum times this is the mean power in each band. The scale is Slaney's (linear below
    1 kHz): HTK's is finer than an FFT bin at the low end and would leave filters empty.
    """
    filters = torchaudio.functional.melscale_fbanks(
        n_fft // 2 + 1, f_min, f_max, n_mels, sample_rate, norm=None, mel_scale="slaney"
    )
    weight = filters.sum(0)
    assert bool((weight > 0).all()), f"{n_mels} mel bands are too many for n_fft={n_fft}"
    return filters / weight


@dataclass(slots=True)
class LogMelState(State):
    """What a `LogMel` remembers between chunks."""

    tail: Tensor  # [B, window - hop] last samples of the input


class LogMel(nn.Module):
    """Causal log-mel features: sound [B, 1, S] -> [B, T, M] with T = S / hop, in float32.

    Mel frame j sees the window of samples that ends at (j + 1) * hop, so a chunk of whole hops
    yields all its frames at once and the delay beyond the chunk is nothing:

        samples   |--hop--|--hop--|--hop--|--hop--|
        frame 1  ..window-------->|
        frame 2        ..window-------->  |

    Before the first sample there is silence. The logarithm is floored at white noise of -70 dBFS
    and followed by a fixed shift and scale that bring speech to about zero mean and unit variance;
    nothing is estimated from the input, so streaming equals offline.
    """

    FLOOR = 1e-7  # mean power in a band
    MEAN = -10.4  # of the logarithm, over recorded speech near -25 dBFS
    DEVIATION = 3.9

    window: Tensor
    filters: Tensor

    def __init__(
        self,
        sample_rate: int = SAMPLE_RATE,
        n_fft: int = 1024,
        window: int = 600,
        hop: int = 240,
        n_mels: int = 80,
        f_min: float = 0.0,
        f_max: float = 8_000.0,
    ) -> None:
        super().__init__()
        assert hop <= window <= n_fft, (hop, window, n_fft)
        self.n_fft, self.stride, self.n_mels = n_fft, hop, n_mels
        self._window_size = window
        self._band = (sample_rate, n_fft, n_mels, f_min, f_max)
        self.register_buffer("window", torch.empty(0), persistent=False)
        self.register_buffer("filters", torch.empty(0), persistent=False)
        self._build(torch.get_default_device())

    def _build(self, device: torch.device) -> None:
        window = torch.hann_window(self._window_size, device="cpu")
        # Unit energy: white noise of power p then has a spectrum of mean power p.
        self.window = (window / window.square().sum().sqrt()).to(device)
        filters = mel_filterbank(*self._band).cpu()
        within = (filters > 0).int()
        ends = len(filters) - within.flip(0).argmax(0)
        self._spans = torch.stack((within.argmax(0), ends), dim=1).numpy()
        self.filters = filters.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogMel:
        # `model.to(bfloat16)` comes through here and would round the tables: rebuild them.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._build(self.window.device)
        return self

    def new_state(self, batch: int, max_chunk: int = 1) -> LogMelState:
        """A state for `batch` slots, from silence."""
        device = self.window.device
        return LogMelState(
            all_active(batch, device),
            torch.zeros(batch, self._window_size - self.stride, device=device),
        )

    def forward(self, pcm: Tensor, state: LogMelState | None = None) -> Tensor:
        """Sound [B, 1, S], S a multiple of the stride -> features [B, S / stride, M]."""
        batch, channels, samples = pcm.shape
        assert channels == 1 and samples % self.stride == 0, tuple(pcm.shape)
        if state is None:
            state = self.new_state(batch)
        with torch.autocast(pcm.device.type, enabled=False):
            frames = windows(pcm[:, 0].float(), self.window, self.stride, state.tail, state.active)
            if few_rows(frames):
                return self._few(frames)
            spectrum = torch.fft.rfft(frames, n=self.n_fft)
            power = torch.view_as_real(spectrum).square().sum(-1)
            logarithm = torch.log(power @ self.filters + self.FLOOR)
            return (logarithm - self.MEAN) / self.DEVIATION

    def _few(self, frames: Tensor) -> Tensor:
        """Features of some windows [B, T, W] without torch, which would wake its other threads."""
        from audio_codec import kernels

        batch, time, _ = frames.shape
        spectrum = scipy.fft.rfft(frames.numpy(), self.n_fft).reshape(-1, len(self.filters))
        y = frames.new_empty(batch, time, self.n_mels)
        tables = (self.filters.numpy(), self._spans, self.FLOOR, self.MEAN, self.DEVIATION)
        kernels.log_mel(spectrum, *tables, y.numpy().reshape(-1, self.n_mels))
        return y


__all__ = [
    "FRAME_RATE",
    "FRAME_SIZE",
    "SAMPLE_RATE",
    "SUFFIXES",
    "LogMel",
    "LogMelState",
    "Pcm",
    "SoundHeader",
    "check_writable",
    "duration",
    "load",
    "load_blocks",
    "loudness_dbfs",
    "mel_filterbank",
    "normalize",
    "read_header",
    "resample",
    "resample_blocks",
    "save",
    "saving",
]
