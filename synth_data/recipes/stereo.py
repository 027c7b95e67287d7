"""Recorded conversations in the layout of moshi-finetune → shards of codes, encoded once.

    train.jsonl         {"path": "talks/a.wav", "duration": 84.2}, one recording a line
    talks/a.wav         stereo: left is the assistant, right the user
    talks/a.json        {"alignments": [["hello", [0.4, 0.7], "SPEAKER_MAIN"], …]}

Paths are relative to the manifest. SPEAKER_MAIN is the assistant; words of any other speaker are
the user's. Where those of a channel were not written down, there are none: the sample says so, and
nothing is learned about its transcript. What a sample holds names no vocabulary: words are spoken
forms, as everywhere.

    speechlm synth stereo configs/synth/stereo.yaml manifest=talks/train.jsonl

Shapes: C channels (assistant, user), S samples, T frames.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
from pydantic import BaseModel, ConfigDict, Field

from audio_codec import checkpoint
from audio_codec.audio import FRAME_SIZE, SAMPLE_RATE, resample
from audio_codec.codec import locate
from audio_codec.errors import UserError
from audio_codec.precision import Precision, settle
from synth_data.build import BuildReport, Dropped, run_shards
from synth_data.dialogue import ASSISTANT, UNTRANSCRIBED, USER
from synth_data.mixture import GuardConfig, Shares
from synth_data.recipes.dialogues import cached_codec, coder, encode_long
from synth_data.shards import Folder, Sample
from synth_data.text import normalize, spell_out
from synth_data.tts import Word

MAIN = "SPEAKER_MAIN"
"""Who the assistant is in an alignment."""


class StereoConfig(BaseModel):
    """Shards of recorded conversations: codes of two channels and the words on each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest: Path
    """The ``.jsonl`` file."""
    output: Folder
    """Folder of the shards, or its URL in a store (``s3://…``)."""
    codec: str
    """Checkpoint of the codec that encodes both channels: a directory, ``hf://…``,
    ``tiny/codec`` of the shipped weights."""
    licence: str
    """Of the recordings; kept with every sample."""
    synthetic: bool = False
    """Whether a machine speaks in them."""
    human: bool = True
    """Whether people chose the words; false for what a language model wrote."""
    guard: GuardConfig = GuardConfig()
    """The least that people must have made of it."""
    device: str = "cpu"
    """Where the codec runs."""
    precision: Precision = "fp32"
    """Of the codec's matrix products; `auto`: bf16 where `device` has units for it."""
    shard_size: int = Field(default=16, gt=0)
    """Recordings a shard."""
    workers: int = Field(default=1, gt=0)
    """Processes; 1 works in this one. The shards do not depend on it."""
    ray: str | None = None
    """Address of a Ray cluster that makes the shards in their place; ``auto`` finds one."""


@dataclass(frozen=True)
class _Recording:
    id: str
    path: Path
    digest: str
    """Of sound and words: other ones make another data set."""


def read_manifest(path: Path) -> list[Path]:
    """The recordings that a manifest names. Raises UserError when it is missing or no manifest."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"manifest '{path}' cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            name = json.loads(line)["path"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"manifest '{path}', line {number}: expected an object with 'path' and 'duration'."
            ) from error
        found.append(path.parent / str(name))
    if not found:
        raise UserError(f"manifest '{path}' names no recording.")
    return found


def read_words(path: Path) -> tuple[tuple[Word, ...], tuple[Word, ...]]:
    """The words in a file of alignments: the assistant's and the user's, in order of time.

    A word is put into its spoken form, which may be several ("3rd" is "third", "$5" is "five
    dollars"): they share its time. Raises UserError when the file is missing or no such file.
    """
    found = checkpoint.read_json(path).get("alignments")
    if not isinstance(found, list):
        raise UserError(f"alignments '{path}' must hold a list under 'alignments'.")
    said: tuple[list[Word], list[Word]] = ([], [])
    for number, entry in enumerate(found):
        text, start, end, speaker = _entry(entry, path, number)
        spoken = normalize(spell_out(text)).split()
        step = (end - start) / max(1, len(spoken))
        said[ASSISTANT if speaker == MAIN else USER].extend(
            Word(word, start + step * place, start + step * (place + 1))
            for place, word in enumerate(spoken)
        )
    assistant, user = (tuple(sorted(words, key=lambda word: word.start)) for words in said)
    return assistant, user


def _entry(entry: Any, path: Path, number: int) -> tuple[str, float, float, str]:
    try:
        text, (start, end), speaker = entry
        start, end = float(start), float(end)
        if not (isinstance(text, str) and 0 <= start <= end < math.inf):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise UserError(
            f"alignments '{path}', entry {number}: {entry!r} is not [word, [start, end], speaker] "
            "with times in seconds."
        ) from error
    return text, start, end, str(speaker)


def load_stereo(path: Path) -> npt.NDArray[np.float32]:
    """A stereo recording, float32 [2, S] at 24 kHz, S filled up with silence to whole frames.

    Raises UserError when it cannot be read or has not two channels.
    """
    try:
        pcm, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"recording '{path}' cannot be read: {error}") from error
    if pcm.shape[1] != 2:
        raise UserError(
            f"recording '{path}' has {pcm.shape[1]} channels; expected 2, the assistant left."
        )
    if not np.isfinite(pcm).all():
        raise UserError(f"recording '{path}' holds values that are not numbers.")
    sound = resample(np.ascontiguousarray(pcm.T), rate, SAMPLE_RATE)
    return np.pad(sound, ((0, 0), (0, -sound.shape[1] % FRAME_SIZE)))


def build_stereo(config: StereoConfig) -> BuildReport:
    """Encode the recordings of a manifest into ``config.output/stereo-*.tar``.

    Run again, it makes what is missing alone; a recording that cannot be used is dropped and named.

    Raises:
        UserError: the manifest or the codec is missing or broken, or the folder holds another
            build, or too little of it is what people made.
    """
    config = config.model_copy(update={"precision": settle(config.precision, config.device)})
    planned = Shares(float(not config.synthetic), float(config.human))
    config.guard.check(planned, "the recordings")
    recordings = []
    for number, path in enumerate(read_manifest(config.manifest)):
        digest = hashlib.sha256()
        for file in (path, path.with_suffix(".json")):
            if file.is_file():
                with file.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
        name = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)
        recordings.append(_Recording(f"r{number:06d}-{name}", path, digest.hexdigest()))
    weights = hashlib.sha256()
    for file in sorted(locate(config.codec).glob("*.safetensors")):
        weights.update(file.read_bytes())
    described = config.model_dump_json(exclude={"workers", "output", "manifest", "ray", "guard"})
    contents = [(recording.id, recording.digest) for recording in recordings]
    plan = repr((described, contents, weights.hexdigest()))
    parts = [
        recordings[start : start + config.shard_size]
        for start in range(0, len(recordings), config.shard_size)
    ]
    return run_shards(
        config.output,
        "stereo",
        parts,
        functools.partial(_samples, config=config),
        workers=config.workers,
        fingerprint=hashlib.sha256(plan.encode()).hexdigest(),
        ray=config.ray,
        guard=config.guard,
    )


def _samples(recordings: Sequence[_Recording], config: StereoConfig) -> Iterator[Sample | Dropped]:
    for recording in recordings:
        try:
            words = read_words(recording.path.with_suffix(".json"))
            pcm = load_stereo(recording.path)
        except UserError as error:  # One broken recording does not end a build.
            yield Dropped(recording.id, str(error))
            continue
        codec = cached_codec(config.codec, config.device)
        yield Sample(
            id=recording.id,
            text="",
            words=words,
            voices=(f"{recording.path.name}/left", f"{recording.path.name}/right"),
            source=config.manifest.name,
            licence=config.licence,
            synthetic=config.synthetic,
            human_text=config.human,
            seconds=pcm.shape[1] / SAMPLE_RATE,
            meta={UNTRANSCRIBED: [channel for channel, said in enumerate(words) if not said]},
            codes=encode_long(codec, pcm, config.precision),
            coded_by=coder(config.codec, config.device),
        )
