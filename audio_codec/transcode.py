"""Files of sound into files of codes and back, block by block: memory does not grow with length.

    in.wav  ─ blocks ─ resample ─ whole frames ─ encode, with state ─ codes ─ out.npz
    out.npz ─ blocks of codes ─ decode, with state ─ as many samples as went in ─ back.wav

The codes are those of the whole sound encoded at once, because offline is streaming in one chunk;
a codec that does not stream (EnCodec) codes each block of ten seconds alone.

A file of codes is a NumPy archive:

    codes        uint16 [K, T] (uint32 for a codebook above 65,536), laid out frame after frame, so
                 that it is written and read as a stream:  │k0 k1 … │k0 k1 … │  … T frames
    sizes        int64 [K], the codebooks' sizes
    samples      int64, length of the sound at sample_rate, before it was filled up to whole frames
    sample_rate  int64, Hz
    frame_size   int64, samples
    codec        its kind, such as SpectralCodec
    weights      fingerprint of its weights

    speechlm codec encode talk.wav talk.npz
    speechlm codec decode talk.npz back.wav
    speechlm codec info talk.npz

Shapes: B batch (1), S samples, T frames, K codebooks.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from audio_codec import audio, files
from audio_codec import checkpoint as checkpoints
from audio_codec.audio import Pcm
from audio_codec.codec import Codec
from audio_codec.errors import UserError

PIPE: Final = "-"
"""As a file's name: standard input, or standard output."""

BLOCK_SECONDS: Final = 10.0

_CODES = "codes.npy"
# Any date will do, as long as it is always the same: equal sound then gives equal bytes.
_DATE = (1980, 1, 1, 0, 0, 0)

Advance = Callable[[float], None]
"""Told how many more seconds of sound are done."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Header:
    """What a file of codes says about itself."""

    codec: str
    weights: str
    sample_rate: int
    frame_size: int
    samples: int
    sizes: tuple[int, ...]
    frames: int

    @property
    def seconds(self) -> float:
        """How long the sound lasts."""
        return self.samples / self.sample_rate

    @property
    def bitrate(self) -> float:
        """Bits a second of all its codebooks."""
        return self.sample_rate / self.frame_size * sum(map(math.log2, self.sizes))

    def __str__(self) -> str:
        return (
            f"{self.seconds:.2f} s of sound in {self.frames} frames of {len(self.sizes)} "
            f"codebooks, {self.bitrate / 1000:.2f} kbit/s"
        )


def fingerprint(codec: Codec) -> str:
    """Sixteen hexadecimal digits that differ between codecs of different weights."""
    assert isinstance(codec, nn.Module), type(codec)
    digest = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def sizes_of(codec: Codec, codebooks: int | None = None) -> tuple[int, ...]:
    """Sizes of a codec's first so many codebooks; UserError when it has not so many."""
    sizes = tuple(math.prod(factors) for factors in codec.codebooks)
    if codebooks is not None and not 1 <= codebooks <= len(sizes):
        raise UserError(f"codebooks {codebooks} cannot be had: this codec has 1 to {len(sizes)}.")
    return sizes[:codebooks]


@torch.inference_mode()
def encode(
    codec: Codec,
    source: Path,
    target: Path,
    codebooks: int | None = None,
    advance: Advance | None = None,
    weights: str | None = None,
) -> Header:
    """Encode a sound file of any rate into a file of codes, of the first `codebooks` levels (all).

    `weights`: the codec's `fingerprint`, where it is known already.

    `target` appears whole or not at all. Raises UserError where `audio.load` does, when the codec
    has not so many codebooks, and when the folder of `target` refuses.
    """
    files.check_writable(target)
    sizes = sizes_of(codec, codebooks)
    dtype = np.uint16 if max(sizes) <= 2**16 else np.uint32
    block = max(1, round(BLOCK_SECONDS * codec.sample_rate / codec.frame_size))  # frames
    state = codec.new_encoder_state(1, block)
    total = frames = 0
    # The codes wait on disk: how many there are stands before them in the archive.
    with tempfile.TemporaryFile() as spool:
        silence = np.zeros(codec.delay, np.float32)  # pushes the last of the sound through
        sound = itertools.chain(audio.load_blocks(source, codec.sample_rate), [silence])
        for pcm in _reblock(sound, block * codec.frame_size):
            whole = np.pad(pcm, (0, -len(pcm) % codec.frame_size))
            x = torch.from_numpy(whole).to(state.active.device)
            codes = codec.encode(x[None, None], state)[0, : len(sizes)]
            spool.write(codes.T.cpu().numpy().astype(dtype).tobytes())
            total, frames = total + len(pcm), frames + codes.shape[1]
            if advance is not None:
                advance(len(pcm) / codec.sample_rate)
        spool.seek(0)
        header = Header(
            codec=type(codec).__name__,
            weights=weights or fingerprint(codec),
            sample_rate=codec.sample_rate,
            frame_size=codec.frame_size,
            samples=total - codec.delay,
            sizes=sizes,
            frames=frames,
        )
        _write(target, header, np.dtype(dtype), spool)
    return header


def _reblock(blocks: Iterable[Pcm], size: int) -> Iterator[Pcm]:
    """Blocks [s] of any lengths → blocks of `size`, the last one as long as it may be."""
    held = np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate((held, block))
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if len(held):
        yield held


def _write(target: Path, header: Header, dtype: np.dtype, codes: IO[bytes]) -> None:
    about = {
        "sizes": np.array(header.sizes),
        "samples": np.array(header.samples),
        "sample_rate": np.array(header.sample_rate),
        "frame_size": np.array(header.frame_size),
        "codec": np.array(header.codec),
        "weights": np.array(header.weights),
    }
    with (
        files.replacing(target) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name, array in about.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _DATE), "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        entry = zipfile.ZipInfo(_CODES, _DATE)
        entry.compress_type = zipfile.ZIP_DEFLATED  # ten bits in every sixteen
        with archive.open(entry, "w", force_zip64=True) as member:
            shape = (len(header.sizes), header.frames)
            described = {"descr": dtype.str, "fortran_order": True, "shape": shape}
            np.lib.format.write_array_header_1_0(member, described)
            shutil.copyfileobj(codes, member)


def read_header(path: Path) -> Header:
    """What a file of codes says about itself, after a look at all of it.

    Raises UserError when the file is missing, truncated, corrupt or of another kind.
    """
    if not path.is_file():
        raise UserError(f"There is no file of codes {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} does not match its checksum")
            names = ("codec", "weights", "sample_rate", "frame_size", "samples", "sizes")
            found = {name: _small(archive, name) for name in names}
            with archive.open(_CODES) as member:
                (levels, frames), _, dtype = _codes_header(member)
                begin = member.tell()
            length = archive.getinfo(_CODES).file_size - begin
        header = Header(
            codec=str(found["codec"]),
            weights=str(found["weights"]),
            sample_rate=int(found["sample_rate"]),
            frame_size=int(found["frame_size"]),
            samples=int(found["samples"]),
            sizes=tuple(map(int, found["sizes"])),
            frames=frames,
        )
        if dtype.kind != "u" or dtype.itemsize > 4 or levels != len(header.sizes):
            raise ValueError(f"codes are {dtype} [{levels}, T] for {len(header.sizes)} codebooks")
        if min(levels, *header.sizes, header.sample_rate, header.frame_size) < 1:
            raise ValueError("a count, a size or a rate is below one")
        if not 0 < header.samples <= frames * header.frame_size:
            raise ValueError(f"{frames} frames cannot hold {header.samples} samples")
        if length != levels * frames * dtype.itemsize:
            raise ValueError(f"{length} bytes of codes are not [{levels}, {frames}]")
    except Exception as error:  # zipfile and numpy raise a dozen unrelated types on damage
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is no whole file of codes: {said}.") from error
    return header


def _small(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _codes_header(member: IO[bytes]) -> tuple[tuple[int, int], bool, np.dtype]:
    """((K, T), whether frame after frame, type) at the head of the codes."""
    version = np.lib.format.read_magic(member)
    if version != (1, 0):
        raise ValueError(f"codes are of the unknown NumPy format {version}")
    (levels, frames), by_frame, dtype = np.lib.format.read_array_header_1_0(member)
    return (levels, frames), by_frame, dtype


def read_codes(path: Path, header: Header, frames: int) -> Iterator[npt.NDArray[np.int64]]:
    """Blocks [K, t ≤ frames] of a file that `read_header` has looked through.

    Raises UserError when a code lies outside its codebook.
    """
    levels, sizes = len(header.sizes), np.array(header.sizes)[:, None]
    with zipfile.ZipFile(path) as archive, archive.open(_CODES) as member:
        _, by_frame, dtype = _codes_header(member)
        # Somebody else may have saved them level after level; only then all are read at once.
        most = frames if by_frame else header.frames
        for start in range(0, header.frames, most):
            count = min(most, header.frames - start)
            flat = np.frombuffer(member.read(levels * count * dtype.itemsize), dtype)
            codes = flat.reshape((levels, count), order="F" if by_frame else "C").astype(np.int64)
            if (outside := codes >= sizes).any():
                level, frame = np.argwhere(outside)[0]
                raise UserError(
                    f"{path} holds code {codes[level, frame]} in codebook {level}, which ends at "
                    f"{header.sizes[level] - 1}."
                )
            for begin in range(0, count, frames):
                yield codes[:, begin : begin + frames]


@torch.inference_mode()
def decode(
    codec: Codec,
    source: Path,
    target: Path,
    codebooks: int | None = None,
    advance: Advance | None = None,
    weights: str | None = None,
) -> Header:
    """Decode a file of codes into a sound file, from the first `codebooks` levels (all it has).

    `weights`: the codec's `fingerprint`, where it is known already.
    `target` appears whole or not at all. Raises UserError when the file is broken or of another
    codec; codes of the same kind of codec with other weights are decoded, with a notice in the log.
    """
    audio.check_writable(target)
    header = read_header(source)
    _check_fits(codec, header, source, weights or fingerprint(codec))
    if codebooks is not None and not 1 <= codebooks <= len(header.sizes):
        raise UserError(
            f"codebooks {codebooks} cannot be had: {source} holds 1 to {len(header.sizes)}."
        )
    block = max(1, round(BLOCK_SECONDS * codec.sample_rate / codec.frame_size))  # frames
    state = codec.new_decoder_state(1, block)
    late, left = codec.delay, header.samples
    with audio.saving(target, codec.sample_rate) as write:
        for codes in read_codes(source, header, block):
            x = torch.from_numpy(np.ascontiguousarray(codes[:codebooks]))
            pcm = codec.decode(x[None].to(state.active.device), state)[0, 0].cpu().numpy()
            heard = pcm[late : late + left]
            write(heard)
            late, left = max(0, late - len(pcm)), left - len(heard)
            if advance is not None:
                advance(len(heard) / codec.sample_rate)
    return header


def _check_fits(codec: Codec, header: Header, path: Path, weights: str) -> None:
    here = {
        "codec": type(codec).__name__,
        "sample rate": codec.sample_rate,
        "frame size": codec.frame_size,
        "codebooks": sizes_of(codec)[: len(header.sizes)],
    }
    there = (header.codec, header.sample_rate, header.frame_size, header.sizes)
    for (name, mine), theirs in zip(here.items(), there, strict=True):
        if mine != theirs:
            raise UserError(f"{path} does not fit the model: its {name} is {theirs}, not {mine}.")
    if header.weights != weights:
        log.warning(
            "%s was encoded with other weights (%s) than those that decode it.",
            path, header.weights,
        )  # fmt: skip


def describe(codec: Codec) -> dict[str, str]:
    """What there is to know about a codec, as words by name."""
    assert isinstance(codec, nn.Module), type(codec)
    sizes, rate = sizes_of(codec), codec.sample_rate / codec.frame_size
    return {
        "codec": type(codec).__name__,
        "weights": fingerprint(codec),
        "parameters": f"{sum(p.numel() for p in codec.parameters()) / 1e6:.1f} M",
        "sample rate": f"{codec.sample_rate} Hz",
        "frame": f"{codec.frame_size} samples, {1000 / rate:g} ms, {rate:g} a second",
        "delay": f"{1000 * codec.delay / codec.sample_rate:g} ms beyond the frame",
        "codebooks": f"{len(sizes)} of sizes {', '.join(map(str, sizes))}",
        "bitrate": f"{rate * sum(map(math.log2, sizes)) / 1000:.2f} kbit/s",
    }


def describe_codes(header: Header) -> dict[str, str]:
    """What there is to know about a file of codes, likewise."""
    return {
        "codec": header.codec,
        "weights": header.weights,
        "sample rate": f"{header.sample_rate} Hz",
        "length": f"{header.seconds:.3f} s, {header.samples} samples",
        "frames": f"{header.frames} of {header.frame_size} samples",
        "codebooks": f"{len(header.sizes)} of sizes {', '.join(map(str, header.sizes))}",
        "bitrate": f"{header.bitrate / 1000:.2f} kbit/s",
    }


def describe_sound(header: audio.SoundHeader) -> dict[str, str]:
    """What there is to know about a sound file, likewise."""
    return {
        "length": f"{header.seconds:.3f} s",
        "sample rate": f"{header.sample_rate} Hz",
        "channels": f"{header.channels}",
        "container": header.container,
    }


# --- Over files, folders and pipes ----------------------------------------------------------------


@dataclass(frozen=True)
class Direction:
    """Encoding or decoding, as the walk over files sees it."""

    work: Callable[[Codec, Path, Path, int | None, Advance | None, str | None], Header]
    reads: frozenset[str]
    """Suffixes that are picked out of a folder."""
    writes: str
    """Suffix of what is made from a folder or for a pipe."""
    seconds: Callable[[Path], float | None]
    """How long a source's sound lasts; None where that cannot be told."""
    check: Callable[[Path], None]
    """Raises UserError when a target cannot be written."""


def _seconds_of_codes(path: Path) -> float | None:
    try:
        return read_header(path).seconds
    except UserError:
        return None  # told when its turn comes


def _check_codes(path: Path) -> None:
    if path.suffix.lower() != ".npz":
        raise UserError(f"Cannot write codes as {path.name!r}: the suffix must be .npz.")
    files.check_writable(path)


ENCODE: Final = Direction(encode, audio.SUFFIXES, ".npz", audio.duration, _check_codes)
DECODE: Final = Direction(
    decode, frozenset({".npz"}), ".wav", _seconds_of_codes, audio.check_writable
)


def _inside(root: Path, suffixes: frozenset[str]) -> list[Path]:
    """Files in and below a folder that end in one of the suffixes; UserError when there is none."""
    found = sorted(
        path for path in root.rglob("*") if path.suffix.lower() in suffixes and path.is_file()
    )
    if not found:
        wanted = ", ".join(sorted(suffixes))
        raise UserError(f"{root} holds no file to read; looked for {wanted}.")
    return found


def pairs(direction: Direction, source: str, target: str) -> list[tuple[Path, Path]]:
    """(file to read, file to write) for a file, or for each file in and below a folder.

    A folder is mirrored: `in/a/b.wav` becomes `out/a/b.npz`. Raises UserError when nothing is
    found, when a target cannot be written, or when two sources would become one target.
    """
    root = Path(source)
    if not root.is_dir():
        if not root.exists():
            raise UserError(f"There is no file or folder {source}.")
        direction.check(Path(target))
        return [(root, Path(target))]
    made: dict[Path, Path] = {}
    for path in _inside(root, direction.reads):
        place = Path(target) / path.relative_to(root).with_suffix(direction.writes)
        direction.check(place)
        if place in made:
            raise UserError(f"{made[place]} and {path} would both become {place}; rename one.")
        made[place] = path
    return [(path, place) for place, path in made.items()]


def info(what: str, load: Callable[[str], Codec], stdin: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Facts by name about a file of codes or of sound, a pipe (`-`) of either, or a model's codec.

    Of a folder of such files: what is in each, by its path; a broken one is named in the log, and
    UserError is raised at the end. Raises UserError when `what` is nothing of all that.
    """
    suffix = Path(what).suffix.lower()
    if what == PIPE:
        with tempfile.TemporaryDirectory() as spool:
            received = Path(spool, "standard-input")
            with open(received, "wb") as file:
                shutil.copyfileobj(stdin, file)
            facts = _describe_file(received)
    elif os.path.isdir(what) and not _holds_model(checkpoints.resolve(what)):
        yield from _info_of_folder(Path(what))
        return
    elif suffix in _READS or (os.path.isfile(what) and suffix not in _WEIGHTS):
        facts = _describe_file(Path(what))
    else:
        facts = describe(load(what))
    yield from facts.items()


_READS = ENCODE.reads | DECODE.reads
_WEIGHTS = (".safetensors", ".th")


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or any(folder.glob("*.safetensors"))


def _header(path: Path) -> Header | audio.SoundHeader:
    if path.suffix.lower() == ".npz" or zipfile.is_zipfile(path):
        return read_header(path)
    return audio.read_header(path)


def _describe_file(path: Path) -> dict[str, str]:
    try:
        header = _header(path)
    except UserError as error:
        raise UserError(
            f"info of '{path.name}' cannot be had ({str(error).rstrip('.')}); choices: a file of "
            f"codes or sound, a folder of them, {PIPE} or a model."
        ) from error
    return describe_codes(header) if isinstance(header, Header) else describe_sound(header)


def _info_of_folder(root: Path) -> Iterator[tuple[str, str]]:
    found = _inside(root, _READS)
    failed = 0
    for path in found:
        try:
            yield str(path), str(_header(path))
        except UserError as error:
            log.error("%s", error)
            failed += 1
    if failed:
        raise UserError(f"{failed} of {len(found)} files could not be read.")


def run(
    direction: Direction,
    load: Callable[[], Codec],
    source: str,
    target: str,
    *,
    codebooks: int | None = None,
    stdin: IO[bytes],
    stdout: IO[bytes],
    console: Console,
) -> list[tuple[Path, Header]]:
    """Encode or decode a file, a folder or a pipe (`-`); (written file, what is in it) of each.

    A pipe is kept on disk until it is whole, so that nothing half made ever leaves. In a folder a
    broken file is named in the log and the others are made. Raises UserError then, at the end, and
    where `pairs` and the work on one file do. The codec is loaded once all else is found in order;
    progress is drawn where `console` is a terminal.
    """
    if target == PIPE and Path(source).is_dir():
        raise UserError(f"{source} is a folder: its output cannot go to one pipe; name a folder.")
    with tempfile.TemporaryDirectory() as spool:
        origin, place = source, target
        if source == PIPE:
            origin = f"{spool}/standard-input"
            with open(origin, "wb") as file:
                shutil.copyfileobj(stdin, file)
        if target == PIPE:
            place = f"{spool}/standard-output{direction.writes}"
        todo = pairs(direction, origin, place)
        codec = load()
        sizes_of(codec, codebooks)  # A wrong number is no file's fault.
        done = _work_off(direction, codec, todo, codebooks, console)
        if target == PIPE:
            with open(place, "rb") as file:
                shutil.copyfileobj(file, stdout)
            stdout.flush()
    return done


def _work_off(
    direction: Direction,
    codec: Codec,
    todo: list[tuple[Path, Path]],
    codebooks: int | None,
    console: Console,
) -> list[tuple[Path, Header]]:
    lengths = [direction.seconds(path) for path, _ in todo]
    known = [length for length in lengths if length is not None]
    total = sum(known) if len(known) == len(todo) else None  # None: a bar without an end
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} s of sound"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    done: list[tuple[Path, Header]] = []
    failed, weights = 0, fingerprint(codec)  # of 100 MB: once, not once a file
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("", total=total)
        for path, place in todo:
            progress.update(task, description=path.name)
            try:
                header = direction.work(
                    codec, path, place, codebooks, lambda s: progress.advance(task, s), weights
                )
            except UserError as error:
                if len(todo) == 1:
                    raise
                log.error("%s", error)
                failed += 1
                continue
            done.append((place, header))
    if failed:
        raise UserError(f"{failed} of {len(todo)} files could not be read; the others are done.")
    return done
