"""Training shards: WebDataset tar files that name no vocabulary.

A sample is up to three members of a tar that share a key::

    s0-0000017.codes.npy   codes, uint16 [C, K, T]                     (optional)
    s0-0000017.flac        sound, 24 kHz 16-bit [S, C]                 (optional)
    s0-0000017.json        Sample: text, words with times, voices, source, licence, events

Words keep their text and their seconds; ids of text pieces are given at load, so a change of text
tokenizer re-runs nothing. Tars are deterministic (no time stamps, no owners) and appear whole or
not at all, on a local disk as in any store that fsspec knows (``s3://…``, ``memory://…``).

Letters: C channels, K codebooks, T frames, S samples.
"""

import io
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import soundfile
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)
from upath import UPath

from audio_codec.audio import SAMPLE_RATE
from audio_codec.errors import UserError
from audio_codec.files import replacing
from synth_data.tts import Word

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1

Location = UPath | Path | str
"""Of shards: on a local disk, or in a store by its URL."""


def _located(where: object) -> UPath:
    if not isinstance(where, str | os.PathLike | UPath):
        raise ValueError("give a folder or a URL")
    return UPath(where)


Folder = Annotated[
    UPath, PlainValidator(_located), PlainSerializer(str, return_type=str, when_used="json")
]
"""A location as a field of a configuration."""


class Event(BaseModel):
    """Something that happens in a conversation: a turn, a pause, an interruption, a backchannel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    channel: int
    """The channel of whoever causes it."""
    start: float
    """Seconds."""
    end: float
    """Seconds."""
    meta: dict[str, Any] = Field(default_factory=dict)


class Sample(BaseModel):
    """One recording of one or more channels, with what is said on each."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True)

    version: int = SCHEMA_VERSION
    id: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    """Unique within a data set, and the key of the tar members (so without dots)."""
    text: str
    """Spoken form; "" where nobody knows what is said."""
    words: tuple[tuple[Word, ...], ...]
    """A tuple a channel, in order of time; empty where times are unknown or nothing is said."""
    voices: tuple[str, ...]
    """Who speaks, a name a channel: a ``tts.Voice`` as text, or ``set/speaker`` of a recording."""
    source: str
    """Where the text (synthetic) or the recording comes from."""
    licence: str
    synthetic: bool
    """Whether a program made the sound; else it is a recording."""
    human_text: bool = False
    """Whether people chose the words, not templates or a language model; false where unknown."""
    seconds: float
    wer: float | None = None
    """Word error rate of an independent recognizer; None when it was not asked."""
    events: tuple[Event, ...] = ()
    meta: dict[str, Any] = Field(default_factory=dict)
    pcm: npt.NDArray[np.float32] | None = Field(default=None, exclude=True, repr=False)
    """Sound, float32 [C, S] at 24 kHz."""
    codes: npt.NDArray[np.uint16] | None = Field(default=None, exclude=True, repr=False)
    """Codec codes, uint16 [C, K, T] at 12.5 frames a second."""
    coded_by: tuple[float, ...] | None = None
    """What tells them from another tokenizer's or codec's (``codec.coded_by``), where known."""

    @model_validator(mode="after")
    def _channels_agree(self) -> "Sample":
        channels = len(self.voices)
        if len(self.words) != channels:
            raise ValueError(f"words has {len(self.words)} channels, voices {channels}")
        for name, array, axes in (("pcm", self.pcm, 2), ("codes", self.codes, 3)):
            if array is not None and (array.ndim != axes or array.shape[0] != channels):
                raise ValueError(f"{name} has shape {array.shape}, voices {channels} channels")
        if self.version != SCHEMA_VERSION:
            raise ValueError(f"schema version {self.version}; this code reads {SCHEMA_VERSION}")
        return self


# --- Writing --------------------------------------------------------------------------------------


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    if sample.codes is not None:
        assert sample.codes.dtype == np.uint16, sample.codes.dtype
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(sample.codes), allow_pickle=False)
        yield f"{sample.id}.codes.npy", buffer.getvalue()
    if sample.pcm is not None:
        buffer = io.BytesIO()
        soundfile.write(
            buffer, sample.pcm.T.clip(-1, 1), SAMPLE_RATE, format="FLAC", subtype="PCM_16"
        )
        yield f"{sample.id}.flac", buffer.getvalue()
    # Last: a tar that was cut between two members shows it by a sample without its json.
    yield f"{sample.id}.json", sample.model_dump_json().encode()


def write(path: Location, samples: Iterable[Sample]) -> int:
    """Write one shard; it appears under ``path`` only when whole. Returns the number of samples.

    ``samples`` may be a generator that computes as it goes.

    Raises:
        UserError: the place cannot be written, or the disk is full.
    """
    count = 0
    with (
        replacing(path) as temporary,
        tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for sample in samples:
            for name, data in _members(sample):
                member = tarfile.TarInfo(name)  # mtime, uid and gid are 0.
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            count += 1
    return count


class ShardWriter:
    """Writes a stream of samples into ``directory/prefix-000000.tar``, ``…-000001.tar``, ….

    Use it as a context manager; when its body raises, the unfinished shard is dropped.
    """

    def __init__(self, directory: Location, prefix: str, max_samples: int) -> None:
        """Write ``max_samples`` samples a shard."""
        assert max_samples > 0, max_samples
        self.directory = UPath(directory)
        self.prefix = prefix
        self.max_samples = max_samples
        self.paths: list[UPath] = []
        self._pending: list[Sample] = []

    def write(self, sample: Sample) -> None:
        """Add a sample."""
        self._pending.append(sample)
        if len(self._pending) == self.max_samples:
            self._flush()

    def _flush(self) -> None:
        path = self.directory / shard_name(self.prefix, len(self.paths))
        write(path, self._pending)
        self.paths.append(path)
        self._pending = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and self._pending:
            self._flush()


def shard_name(prefix: str, index: int) -> str:
    """File name of a shard."""
    return f"{prefix}-{index:06d}.tar"


# --- Reading --------------------------------------------------------------------------------------


def shard_paths(source: Location) -> list[UPath]:
    """Shards of a directory, of a glob pattern, or one tar file, sorted by name.

    Raises:
        UserError: there is none.
    """
    source = UPath(source)
    if source.is_file():
        return [source]
    folder, pattern = (source, "*.tar") if source.is_dir() else (source.parent, source.name)
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"no shard (*.tar) in {str(source)!r}")
    return found


class Reader:
    """Iterates the samples of shards, in order; what is corrupt is skipped, counted and named.

    ``skipped`` counts, since construction, the samples and the broken ends of shards left out.
    """

    _DECODERS: ClassVar = {"json", "codes.npy", "flac"}

    def __init__(self, source: Location, *, audio: bool = True) -> None:
        """Read ``source`` (see ``shard_paths``); without ``audio``, ``pcm`` stays None."""
        self.paths = shard_paths(source)
        self.audio = audio
        self.skipped = 0

    def __iter__(self) -> Iterator[Sample]:
        for path in self.paths:
            yield from self._shard(path)

    def _shard(self, path: UPath) -> Iterator[Sample]:
        key, members = "", dict[str, bytes]()
        try:
            with path.open("rb") as opened, tarfile.open(fileobj=opened) as tar:
                for member in tar:
                    stream = tar.extractfile(member)
                    if stream is None:  # A folder, a link: no sample of ours.
                        continue
                    head, _, kind = Path(member.name).name.partition(".")
                    if head != key:
                        yield from self._decode(path, key, members)
                        key, members = head, {}
                    if kind in self._DECODERS and (self.audio or kind != "flac"):
                        members[kind] = stream.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            # The sample being read when the tar broke may lack members: it goes with the rest.
            self._skip(path, f"all from {key or 'the start'} on", error)
            return
        whole = _ends_whole(path)
        if whole or "json" in members:
            yield from self._decode(path, key, members)
        if not whole:
            self._skip(path, f"all after {key}", EOFError("no end-of-archive mark"))

    def _decode(self, path: UPath, key: str, members: dict[str, bytes]) -> Iterator[Sample]:
        if not members:
            return
        try:
            sample = _decode(members)
        except (KeyError, ValueError, EOFError, soundfile.LibsndfileError) as error:
            self._skip(path, key, error)
        else:
            yield sample

    def _skip(self, path: UPath, what: str, error: Exception) -> None:
        self.skipped += 1
        text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        reason = text.partition("\n")[0].rstrip(":")  # Each way of opening a tar has its own line.
        log.warning("skipped %s in %s: %s: %s", what, path, type(error).__name__, reason)


def _ends_whole(path: UPath) -> bool:
    """Whether a tar ends in its mark of two empty blocks; ``tarfile`` does not mind if not."""
    with path.open("rb") as opened:
        opened.seek(-min(1024, path.stat().st_size), io.SEEK_END)
        return opened.read() == bytes(1024)


def _decode(members: dict[str, bytes]) -> Sample:
    sample = Sample.model_validate_json(members["json"])
    arrays: dict[str, npt.NDArray[Any]] = {}
    if "codes.npy" in members:
        arrays["codes"] = np.load(io.BytesIO(members["codes.npy"]), allow_pickle=False)
        if arrays["codes"].dtype != np.uint16:
            raise ValueError(f"codes are {arrays['codes'].dtype}, not uint16")
    if "flac" in members:
        pcm, rate = soundfile.read(io.BytesIO(members["flac"]), dtype="float32", always_2d=True)
        if rate != SAMPLE_RATE:
            raise ValueError(f"sound is at {rate} Hz, not {SAMPLE_RATE}")
        arrays["pcm"] = np.ascontiguousarray(pcm.T)
    return Sample(**{**dict(sample), **arrays})


def read(source: Location, *, audio: bool = True) -> Iterator[Sample]:
    """Iterate the samples of a directory, glob pattern or tar file; see ``Reader``."""
    return iter(Reader(source, audio=audio))


def webdataset(source: Location) -> Any:
    """The same shards as a ``webdataset.WebDataset`` of ``Sample``.

    For pipelines that shuffle and split by worker with that library. It skips corrupt samples too,
    with a warning each.
    """
    import webdataset as wds

    def decode(sample: dict[str, Any]) -> Sample:
        return _decode({kind: sample[kind] for kind in Reader._DECODERS if kind in sample})

    paths = [str(path) for path in shard_paths(source)]
    return wds.WebDataset(paths, shardshuffle=False, handler=wds.warn_and_continue).map(
        decode, handler=wds.warn_and_continue
    )
