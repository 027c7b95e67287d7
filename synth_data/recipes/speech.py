"""Shards of single-speaker speech: sentences read aloud in many voices, recordings, or both.

    speechlm synth speech configs/synth/speech_users.yaml workers=2

Every utterance is planned first: its words, its voice, its place in the shards.
"""

import csv
import functools
import gzip
import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from audio_codec.audio import SAMPLE_RATE, load
from audio_codec.errors import UserError
from synth_data import quiz
from synth_data.build import BuildReport, Dropped, run_shards
from synth_data.mixture import GuardConfig, Shares
from synth_data.shards import Folder, Sample
from synth_data.text import labelled_sentences, normalize, spell_out
from synth_data.tts import (
    SynthesisConfig,
    Voice,
    Word,
    get_synthesizer,
    sample_voices,
    speak,
    user_voices,
)
from synth_data.verify import get_recognizer, verify

# Kept out of training for good: it is what the finished model is tested on.
_NEVER_TRAINED = frozenset({"digits"})

# Synthetic English, over all training voices: 0.3 s of lead-in and tail, then 14 characters a
# second. Used only to turn hours into a number of utterances before anything is spoken.
_LEAD_SECONDS, _CHARACTERS_A_SECOND = 0.3, 14.0

# In a data folder: a row a recording.
MANIFEST = "manifest.tsv.gz"


class TextSource(BaseModel):
    """Sentences of a text file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["text"]
    path: Path
    """A ``.txt`` or ``.txt.xz`` file, one sentence a line, or a folder of ``synth text``."""
    licence: str
    """Of what does not name its own, as the documents of ``synth text`` do."""
    human: bool = True
    """Whether people wrote it; false for what a language model wrote."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the utterances, relative to the other sources."""
    max_words: int = Field(default=30, gt=0)
    """Longer sentences are left out."""


class QuizSource(BaseModel):
    """Questions and answers of the built-in quiz world."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["quiz"]
    split: Literal["train", "heldout"] = "train"
    pool: int = Field(default=20_000, gt=0)
    """Number of sentences to draw from."""
    categories: quiz.CategoryWeights | None = None
    """Weights of the quiz categories; None weighs all alike."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the utterances, relative to the other sources."""


class RecordedSource(BaseModel):
    """Recordings of a data folder with a ``manifest.tsv.gz``: each file once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["recorded"]
    data: Path
    """The folder that holds ``manifest.tsv.gz``."""
    sets: tuple[str, ...]
    """Values of the manifest's column ``set``."""
    splits: tuple[str, ...] = ("train",)
    """Values of its column ``split``."""
    max_seconds: float = Field(default=20.0, gt=0)
    """Longer recordings are left out."""

    @field_validator("sets")
    @classmethod
    def _no_test_set(cls, sets: tuple[str, ...]) -> tuple[str, ...]:
        if barred := _NEVER_TRAINED & set(sets):
            raise ValueError(f"{sorted(barred)} is kept for testing; leave it out")
        return sets


Source = Annotated[TextSource | QuizSource | RecordedSource, Field(discriminator="kind")]


class VerifyConfig(BaseModel):
    """Listen to what was synthesized, with an independent recognizer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    drop_above: float = Field(gt=0)
    """Utterances with a larger word error rate are dropped; the others carry theirs."""
    recognizer: str = "pocketsphinx"
    """See ``verify.get_recognizer``."""


class SpeechConfig(BaseModel):
    """Shards of single-speaker speech: synthesized, recorded, or both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: Folder
    """Folder of the shards, or its URL in a store (``s3://…``)."""
    sources: tuple[Source, ...] = Field(min_length=1)
    hours: float | None = Field(default=None, gt=0)
    """Synthesized speech, about (recorded speech comes on top)."""
    utterances: int | None = Field(default=None, gt=0)
    """Synthesized utterances; one of ``hours`` and ``utterances`` is needed for text or quiz."""
    voices: Literal["train", "wide", "heldout"] | PositiveInt | tuple[str, ...] = "train"
    """User voices: a split of ``tts.user_voices``, so many of ``tts.sample_voices``, or by name."""
    engines: tuple[str, ...] = ("espeak", "flite")
    """Speech engines that a split's or drawn voices may use; all must be installed."""
    models: tuple[str, ...] = ()
    """Voices of other engines to draw from beside them, as ``piper:libritts.onnx#0..903``."""
    synthesis: SynthesisConfig = SynthesisConfig()
    """A cache, a time limit."""
    assistant: str = "flite:rms"
    """The assistant's voice."""
    assistant_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the synthesized utterances that the assistant's voice speaks."""
    jitter: bool = True
    """Vary the rate, pitch and range of user voices from one utterance to the next."""
    verify: VerifyConfig | None = None
    guard: GuardConfig = GuardConfig()
    """The least that people must have made of it."""
    seed: int = Field(default=0, ge=0)
    shard_size: int = Field(default=256, gt=0)
    """Utterances a shard, dropped ones included."""
    workers: int = Field(default=1, gt=0)
    """Processes; 1 works in this one. The shards do not depend on it."""
    ray: str | None = None
    """Address of a Ray cluster that makes the shards in their place; ``auto`` finds one."""

    @model_validator(mode="after")
    def _amount_given(self) -> "SpeechConfig":
        if self.models and not isinstance(self.voices, int):
            raise ValueError(
                f"models are drawn from where voices is a number; voices is {self.voices!r}"
            )
        spoken = any(source.kind != "recorded" for source in self.sources)
        if spoken and (self.hours is None) == (self.utterances is None):
            raise ValueError("give either hours or utterances")
        return self


@dataclass(frozen=True)
class Line:
    """One utterance of the plan: a text and a voice, or a recording."""

    id: str
    text: str
    voice: str
    """A ``tts.Voice`` as text, or ``set/speaker``."""
    source: str
    licence: str
    human_text: bool
    seconds: float
    """About; of a recording, exactly."""
    recording: Path | None = None


def build_speech(config: SpeechConfig) -> BuildReport:
    """Synthesize and collect speech into ``config.output/speech-*.tar``.

    Raises:
        UserError: a source, voice or engine is missing, the folder holds another build, or too
            little of it is what people made.
    """
    lines = plan_speech(config)
    config.guard.check(planned_shares(lines), "the planned speech")
    parts = [
        lines[start : start + config.shard_size]
        for start in range(0, len(lines), config.shard_size)
    ]
    # Of the plan, not of the configuration: another text file or quiz makes another data set too.
    fingerprint = hashlib.sha256(repr((lines, config.verify, config.shard_size)).encode())
    make = functools.partial(speak_lines, verification=config.verify, synthesis=config.synthesis)
    return run_shards(
        config.output,
        "speech",
        parts,
        make,
        workers=config.workers,
        fingerprint=fingerprint.hexdigest(),
        ray=config.ray,
        guard=config.guard,
        source=(line.text for line in lines),
    )


def plan_speech(config: SpeechConfig) -> list[Line]:
    """Decide every utterance: its words, its voice, its place. Pure but for reading the sources."""
    rng = np.random.default_rng(config.seed)
    lines = [
        line
        for source in config.sources
        if isinstance(source, RecordedSource)
        for line in _recordings(source)
    ]
    spoken = [source for source in config.sources if not isinstance(source, RecordedSource)]
    if spoken:
        lines += _utterances(config, spoken, rng)
    order = rng.permutation(len(lines))
    return [lines[index] for index in order]


def planned_shares(lines: Sequence[Line]) -> Shares:
    """How much people will have made: known before hours of work, but for what is dropped."""
    recorded = sum(line.seconds for line in lines if line.recording is not None)
    words = [(len(line.text.split()), line.human_text) for line in lines]
    return Shares(
        recorded / (sum(line.seconds for line in lines) or 1),
        sum(count for count, human in words if human) / (sum(count for count, _ in words) or 1),
    )


def _utterances(
    config: SpeechConfig, sources: Sequence[TextSource | QuizSource], rng: np.random.Generator
) -> Iterator[Line]:
    if isinstance(config.voices, str):
        voices = user_voices(config.voices, config.engines)
    elif isinstance(config.voices, int):
        voices = sample_voices(config.voices, config.seed, config.engines, config.models)
    else:
        voices = [Voice.parse(text) for text in config.voices]
    assistant = Voice.parse(config.assistant)
    used = [*voices, assistant] if config.assistant_share else voices
    synthesizer = get_synthesizer(config.synthesis)
    for voice in used:
        # A missing engine or an unknown name shows here, before hours of work.
        speak("one", voice, synthesizer)
    if config.verify is not None:
        get_recognizer(config.verify.recognizer)
    pools = [_sentences(source, config.seed) for source in sources]
    orders = [rng.permutation(len(pool)) for pool in pools]
    weights = np.array([source.weight for source in sources])
    taken = [0] * len(sources)
    seconds = 0.0
    for number in range(config.utterances or 10**9):
        if config.hours is not None and seconds >= config.hours * 3600:
            return
        chosen = int(rng.choice(len(sources), p=weights / weights.sum()))
        source, pool = sources[chosen], pools[chosen]
        text, told = pool[orders[chosen][taken[chosen] % len(pool)]]
        taken[chosen] += 1
        if rng.random() < config.assistant_share:
            voice = assistant
        else:
            voice = voices[int(rng.integers(len(voices)))]
            voice = voice.jitter(rng) if config.jitter else voice
        length = _LEAD_SECONDS + len(text) / _CHARACTERS_A_SECOND
        seconds += length
        yield Line(
            id=f"s{config.seed}-{number:07d}",
            text=text,
            voice=str(voice),
            source=told["source"],
            licence=told["licence"],
            human_text=not isinstance(source, QuizSource) and source.human,
            seconds=length,
        )


def _sentences(source: TextSource | QuizSource, seed: int) -> list[tuple[str, dict[str, str]]]:
    """Sentences in their spoken form, with where each is from and its licence."""
    sentences: Iterable[tuple[str, dict[str, str]]]
    if isinstance(source, QuizSource):
        asked = quiz.sentences(source.split, source.pool, seed, source.categories)
        sentences = ((text, {}) for text in asked)
        usual = {"source": "quiz", "licence": "Apache-2.0"}
        limit, name = None, "quiz"
    else:
        sentences = labelled_sentences(source.path)
        usual = {"source": source.path.name, "licence": source.licence}
        limit, name = source.max_words, str(source.path)
    spoken = [
        (text, {**usual, **told} if told else usual)
        for text, told in ((spell_out(text), told) for text, told in sentences)
        if (words := len(normalize(text).split())) and (limit is None or words <= limit)
    ]
    if not spoken:
        raise UserError(f"text source {name!r} holds no sentence to speak")
    return spoken


def read_manifest(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a data folder's ``manifest.tsv.gz``, a recording each.

    Raises:
        UserError: the file is missing, cannot be read, or lacks one of ``columns``.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as opened:
            reader = csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows = list(reader)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise UserError(f"manifest {str(path)!r} cannot be read: {error}.") from error
    for name in columns:
        if name not in (reader.fieldnames or ()):
            raise UserError(f"manifest {str(path)!r} has no column {name!r}.")
    return rows


def _recordings(source: RecordedSource) -> Iterator[Line]:
    columns = ("set", "split", "id", "speaker", "path", "seconds", "text", "licence_source")
    rows = read_manifest(source.data / MANIFEST, columns)
    known = {row["set"] for row in rows}
    for name in source.sets:
        if name not in known:
            raise UserError(
                f"recorded source: unknown set {name!r}; "
                f"choose from {', '.join(sorted(known - _NEVER_TRAINED))}"
            )
    for row in rows:
        if not row["seconds"].replace(".", "", 1).isdigit():
            raise UserError(
                f"manifest {str(source.data / MANIFEST)!r}: seconds of {row['path']!r} is "
                f"{row['seconds']!r}; it must be a number"
            )
    splits = {row["split"] for row in rows if row["set"] in source.sets}
    for name in source.splits:
        if name not in splits:
            raise UserError(
                f"recorded source: unknown split {name!r}; choose from {', '.join(sorted(splits))}"
            )
    for row in rows:
        if (
            row["set"] in source.sets
            and row["split"] in source.splits
            and float(row["seconds"]) <= source.max_seconds
        ):
            yield Line(
                id=re.sub(r"[^A-Za-z0-9_-]", "_", f"{row['set']}-{row['id']}"),
                text=spell_out(row["text"]),
                voice=f"{row['set']}/{row['speaker']}",
                source=row["set"],
                licence=row["licence_source"],
                human_text=True,
                seconds=float(row["seconds"]),
                recording=source.data / row["path"],
            )


def speak_lines(
    lines: Sequence[Line], verification: VerifyConfig | None, synthesis: SynthesisConfig
) -> Iterator[Sample | Dropped]:
    """The samples of some lines, in order, with their sound."""
    for line in lines:
        try:
            yield _sample(line, verification, synthesis)
        except UserError as error:
            # One text that an engine cannot read, or one broken recording, does not end a build.
            yield Dropped(line.id, str(error))


def _sample(
    line: Line, verification: VerifyConfig | None, synthesis: SynthesisConfig
) -> Sample | Dropped:
    words: tuple[Word, ...] = ()
    wer = None
    if line.recording is None:
        utterance = speak(line.text, Voice.parse(line.voice), get_synthesizer(synthesis))
        pcm, words = utterance.pcm, utterance.words
        if verification is not None:
            wer = verify(utterance, get_recognizer(verification.recognizer)).errors.rate
            if wer > verification.drop_above:
                return Dropped(line.id, f"word error rate {wer:.2f} of {line.text!r}")
    else:
        pcm = load(line.recording)
    return Sample(
        id=line.id,
        text=line.text,
        words=(words,),
        voices=(line.voice,),
        source=line.source,
        licence=line.licence,
        synthetic=line.recording is None,
        human_text=line.human_text,
        seconds=len(pcm) / SAMPLE_RATE,
        wer=wer,
        pcm=pcm[None],
    )
