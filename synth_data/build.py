"""Builds shards with many workers: what to say is planned once, each shard is made by one process.

The plan is a pure function of the configuration, a shard is a pure function of its part of the
plan, and a shard appears on disk only when whole. So the bytes do not depend on the number of
workers, and an interrupted build, started again, makes the missing shards alone.

    speechlm synth speech configs/synth/shipped_users.yaml workers=2
"""

import csv
import functools
import gzip
import hashlib
import json
import logging
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from audio_codec import checkpoint
from audio_codec.audio import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE, load
from audio_codec.audio import normalize as normalize_level
from audio_codec.codec import Codec, load_codec
from audio_codec.errors import UserError
from audio_codec.files import replacing
from synth_data import augment, quiz
from synth_data.dialogue import ASSISTANT as ASSISTANT_CHANNEL
from synth_data.dialogue import (
    Dialogue,
    DialogueConfig,
    arrange,
    cut_events,
    cut_words,
    script,
)
from synth_data.shards import Reader, Sample, shard_name, write
from synth_data.text import normalize, sentences_from, spell_out
from synth_data.tts import (
    SynthesisConfig,
    Utterance,
    Voice,
    Word,
    get_synthesizer,
    sample_voices,
    speak,
    user_voices,
)
from synth_data.verify import get_recognizer, verify

log = logging.getLogger(__name__)

# Kept out of training for good: it is what the finished model is tested on.
_NEVER_TRAINED = frozenset({"digits"})

# Synthetic English, over all training voices: 0.3 s of lead-in and tail, then 14 characters a
# second. Used only to turn hours into a number of utterances before anything is spoken.
_LEAD_SECONDS, _CHARACTERS_A_SECOND = 0.3, 14.0


class TextSource(BaseModel):
    """Sentences of a text file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["text"]
    path: Path
    """A ``.txt`` or ``.txt.xz`` file, one sentence a line."""
    licence: str
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

    output: Path
    """Folder of the shards."""
    sources: tuple[Source, ...] = Field(min_length=1)
    hours: float | None = Field(default=None, gt=0)
    """Synthesized speech, about (recorded speech comes on top)."""
    utterances: int | None = Field(default=None, gt=0)
    """Synthesized utterances; one of ``hours`` and ``utterances`` is needed for text or quiz."""
    voices: Literal["train", "heldout"] | PositiveInt | tuple[str, ...] = "train"
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
    seed: int = 0
    shard_size: int = Field(default=256, gt=0)
    """Utterances a shard, dropped ones included."""
    workers: int = Field(default=1, gt=0)
    """Processes; 1 works in this one. The shards do not depend on it."""

    @model_validator(mode="after")
    def _amount_given(self) -> "SpeechConfig":
        spoken = any(source.kind != "recorded" for source in self.sources)
        if spoken and (self.hours is None) == (self.utterances is None):
            raise ValueError("give either hours or utterances")
        return self


@dataclass(frozen=True)
class Dropped:
    """A planned sample that could not be made or was not good enough."""

    id: str
    reason: str


@dataclass
class BuildReport:
    """What a build did."""

    samples: int = 0
    seconds: float = 0.0
    """Of sound, in the shards written now."""
    written: int = 0
    """Shards."""
    kept: int = 0
    """Shards that an earlier run had finished."""
    compute_seconds: float = 0.0
    """Spent in workers, summed over them."""
    dropped: list[Dropped] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Seconds of sound made in one second of one worker (0 when nothing was made)."""
        return self.seconds / self.compute_seconds if self.compute_seconds else 0.0


# --- Running --------------------------------------------------------------------------------------

Part = TypeVar("Part")


def run_shards(
    directory: Path,
    prefix: str,
    parts: Sequence[Part],
    make: Callable[[Part], Iterable[Sample | Dropped]],
    *,
    workers: int = 1,
    fingerprint: str = "",
) -> BuildReport:
    """Make one shard a part, skip what is there, show progress with the time left.

    Args:
        directory: where the shards go.
        prefix: of their names.
        parts: what ``make`` turns into the samples of a shard; must pickle.
        make: a pure function (picklable, so of a module or a partial of one).
        workers: processes; 1 works in this one.
        fingerprint: names the plan; a folder that holds shards of another plan is refused.

    Raises:
        UserError: the folder holds shards of another plan.
    """
    _claim(directory / f"{prefix}.json", fingerprint, len(parts))
    report = BuildReport()
    todo = []
    for index, part in enumerate(parts):
        path = directory / shard_name(prefix, index)
        if path.exists():
            report.kept += 1
        else:
            todo.append((path, part))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards, {task.fields[hours]:.2f} h"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(prefix, total=len(parts), completed=report.kept, hours=0.0)
        for made in _run(todo, make, workers):
            report.samples += made.samples
            report.seconds += made.seconds
            report.written += made.written
            report.compute_seconds += made.compute_seconds
            report.dropped += made.dropped
            progress.update(task, advance=1, hours=report.seconds / 3600)
    report.dropped.sort(key=lambda dropped: dropped.id)
    for dropped in report.dropped:
        log.info("dropped %s: %s", dropped.id, dropped.reason)
    return report


def _claim(marker: Path, fingerprint: str, shards: int) -> None:
    plan = {"fingerprint": fingerprint, "shards": shards}
    if marker.exists():
        if json.loads(marker.read_text()) != plan:
            raise UserError(
                f"output {str(marker.parent)!r} holds shards of another plan (its configuration or "
                "its texts have changed); choose another folder or delete it"
            )
        return
    with replacing(marker) as temporary:
        temporary.write_text(json.dumps(plan))


def _run(
    todo: Sequence[tuple[Path, Part]],
    make: Callable[[Part], Iterable[Sample | Dropped]],
    workers: int,
) -> Iterator[BuildReport]:
    if workers == 1 or len(todo) <= 1:
        for path, part in todo:
            yield _make_shard(path, make, part)
        return
    # Spawned, not forked: torch's thread pool and the speech engines do not survive a fork.
    pool = ProcessPoolExecutor(
        min(workers, len(todo)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    try:
        futures = [pool.submit(_make_shard, path, make, part) for path, part in todo]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _make_shard(
    path: Path, make: Callable[[Part], Iterable[Sample | Dropped]], part: Part
) -> BuildReport:
    report = BuildReport(written=1)
    started = time.perf_counter()

    def kept() -> Iterator[Sample]:
        for result in make(part):
            if isinstance(result, Dropped):
                report.dropped.append(result)
            else:
                report.samples += 1
                report.seconds += result.seconds
                yield result

    write(path, kept())
    report.compute_seconds = time.perf_counter() - started
    return report


# --- Speech ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """One utterance of the plan: a text and a voice, or a recording."""

    id: str
    text: str
    voice: str
    """A ``tts.Voice`` as text, or ``set/speaker``."""
    source: str
    licence: str
    recording: Path | None = None


def build_speech(config: SpeechConfig) -> BuildReport:
    """Synthesize and collect speech into ``config.output/speech-*.tar``.

    Raises:
        UserError: a source, voice or engine is missing, or the folder holds another build.
    """
    lines = plan_speech(config)
    parts = [
        lines[start : start + config.shard_size]
        for start in range(0, len(lines), config.shard_size)
    ]
    # Of the plan, not of the configuration: another text file or quiz makes another data set too.
    fingerprint = hashlib.sha256(repr((lines, config.verify, config.shard_size)).encode())
    make = functools.partial(_speech, verification=config.verify, synthesis=config.synthesis)
    return run_shards(
        config.output,
        "speech",
        parts,
        make,
        workers=config.workers,
        fingerprint=fingerprint.hexdigest(),
    )


def plan_speech(config: SpeechConfig) -> list[_Line]:
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


def _utterances(
    config: SpeechConfig, sources: Sequence[TextSource | QuizSource], rng: np.random.Generator
) -> Iterator[_Line]:
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
        text = pool[orders[chosen][taken[chosen] % len(pool)]]
        taken[chosen] += 1
        if rng.random() < config.assistant_share:
            voice = assistant
        else:
            voice = voices[int(rng.integers(len(voices)))]
            voice = voice.jitter(rng) if config.jitter else voice
        seconds += _LEAD_SECONDS + len(text) / _CHARACTERS_A_SECOND
        yield _Line(
            id=f"s{config.seed}-{number:07d}",
            text=text,
            voice=str(voice),
            source="quiz" if isinstance(source, QuizSource) else source.path.name,
            licence="Apache-2.0" if isinstance(source, QuizSource) else source.licence,
        )


def _sentences(source: TextSource | QuizSource, seed: int) -> list[str]:
    if isinstance(source, QuizSource):
        sentences: Iterable[str] = quiz.sentences(source.split, source.pool, seed)
        limit, name = None, "quiz"
    else:
        sentences = sentences_from(source.path)
        limit, name = source.max_words, str(source.path)
    spoken = [
        text
        for text in map(spell_out, sentences)
        if (words := len(normalize(text).split())) and (limit is None or words <= limit)
    ]
    if not spoken:
        raise UserError(f"text source {name!r} holds no sentence to speak")
    return spoken


def read_manifest(data: Path) -> list[dict[str, str]]:
    """The rows of a data folder's ``manifest.tsv.gz``; UserError when there is none."""
    manifest = data / "manifest.tsv.gz"
    if not manifest.is_file():
        raise UserError(f"recorded source: {str(manifest)!r} is not a file")
    with gzip.open(manifest, "rt", encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))


def _recordings(source: RecordedSource) -> Iterator[_Line]:
    rows = read_manifest(source.data)
    known = {row["set"] for row in rows}
    for name in source.sets:
        if name not in known:
            raise UserError(
                f"recorded source: unknown set {name!r}; "
                f"choose from {', '.join(sorted(known - _NEVER_TRAINED))}"
            )
    for row in rows:
        if (
            row["set"] in source.sets
            and row["split"] in source.splits
            and float(row["seconds"]) <= source.max_seconds
        ):
            yield _Line(
                id=re.sub(r"[^A-Za-z0-9_-]", "_", f"{row['set']}-{row['id']}"),
                text=spell_out(row["text"]),
                voice=f"{row['set']}/{row['speaker']}",
                source=row["set"],
                licence=row["licence_source"],
                recording=source.data / row["path"],
            )


def _speech(
    lines: Sequence[_Line], verification: VerifyConfig | None, synthesis: SynthesisConfig
) -> Iterator[Sample | Dropped]:
    for line in lines:
        try:
            yield _sample(line, verification, synthesis)
        except UserError as error:
            # One text that an engine cannot read, or one broken recording, does not end a build.
            yield Dropped(line.id, str(error))


def _sample(
    line: _Line, verification: VerifyConfig | None, synthesis: SynthesisConfig
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
        seconds=len(pcm) / SAMPLE_RATE,
        wer=wer,
        pcm=pcm[None],
    )


# --- Dialogues ------------------------------------------------------------------------------------

# Long enough that a codec's cost a call vanishes, short enough that a sliding attention window does
# not compute much outside itself.
_ENCODED_SECONDS = 8.0
# Generated noise is this long and goes round: nobody hears that, and minutes of it cost as much as
# the user's speech.
_NOISE_SAMPLES = 20 * SAMPLE_RATE
# Answers repeat from one conversation to the next, and the assistant's engine is the slowest.
_ANSWERS_KEPT = 8192


class DialoguesConfig(BaseModel):
    """Shards of conversations: codes of two channels (assistant, user), words and events."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: Path
    """Folder of the shards."""
    codec: str
    """Checkpoint of the codec that encodes both channels: a directory, ``hf://…``, a shipped
    name."""
    hours: float = Field(gt=0)
    """Conversation in all, rounded up to whole conversations."""
    dialogue: DialogueConfig = DialogueConfig(seconds=240)
    """How conversations go, and how long each lasts."""
    sample_seconds: float = Field(default=60.0, gt=0)
    """A conversation is encoded in one piece and cut into samples of this length."""
    voices: Literal["train", "heldout"] | tuple[str, ...] = "train"
    """User voices: a split of ``tts.user_voices``, or voices by name; one a conversation."""
    engines: tuple[str, ...] = ("espeak", "flite")
    """Speech engines that a split's voices may use; all must be installed."""
    assistant: str = "flite:rms"
    """The assistant's voice."""
    jitter: bool = True
    """Vary the user's rate, pitch and range from one conversation to the next."""
    user_dbfs: tuple[float, float] = (-36.0, -18.0)
    """Level of the user's speech: uniform."""
    reverberation: float = Field(default=0.15, ge=0, le=1)
    """Share of conversations with the user in a reverberant room."""
    telephone: float = Field(default=0.1, ge=0, le=1)
    """Share of conversations with the user's channel limited to a telephone's band."""
    noise: tuple[Path, ...] = ()
    """Shards of noise clips; white and pink noise are always among the noises."""
    batch: int = Field(default=4, gt=0)
    """Conversations that are encoded together."""
    device: str = "cpu"
    """Where the codec runs."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the codec's matrix products; bf16 costs about half on a CPU that has it, and moves one
    code in twenty to a near neighbour."""
    keep_sound: bool = False
    """Store the sound beside the codes."""
    seed: int = 0
    shard_size: int = Field(default=16, gt=0)
    """Conversations a shard."""
    workers: int = Field(default=1, gt=0)
    """Processes; 1 works in this one. The shards do not depend on it."""

    @model_validator(mode="after")
    def _whole_frames(self) -> "DialoguesConfig":
        for name, seconds in (
            ("sample_seconds", self.sample_seconds),
            ("dialogue.seconds", self.dialogue.seconds),
        ):
            frames = seconds * FRAME_RATE
            if abs(frames - round(frames)) > 1e-6:
                raise ValueError(f"{name} {seconds:g} is not a whole number of 80 ms frames")
        return self


def build_dialogues(config: DialoguesConfig) -> BuildReport:
    """Write conversations into ``config.output/dialogues-*.tar``.

    A sample's channels are ``dialogue.ASSISTANT`` and ``dialogue.USER``; its events are those of
    ``dialogue.Dialogue``, on the sample's own clock; ``meta`` says which conversation it is from,
    and where it starts in it.

    Raises:
        UserError: a voice, engine, codec or noise folder is missing, or the folder holds another
            build.
    """
    weights = hashlib.sha256()
    for path in sorted(checkpoint.resolve(config.codec).glob("*.safetensors")):
        weights.update(path.read_bytes())
    for voice in (*_user_voices(config), Voice.parse(config.assistant)):
        speak("one", voice)  # A missing engine or an unknown name shows here.
    conversations = math.ceil(config.hours * 3600 / config.dialogue.seconds)
    numbers = range(conversations)
    parts = [
        numbers[start : start + config.shard_size]
        for start in range(0, conversations, config.shard_size)
    ]
    described = config.model_dump_json(exclude={"workers", "output"})
    fingerprint = hashlib.sha256((described + weights.hexdigest()).encode()).hexdigest()[:16]
    make = functools.partial(_dialogues, config=config)
    return run_shards(
        config.output, "dialogues", parts, make, workers=config.workers, fingerprint=fingerprint
    )


def encode_long(
    codec: Codec, pcm: npt.NDArray[np.float32], precision: Literal["fp32", "bf16"] = "fp32"
) -> npt.NDArray[np.uint16]:
    """Encode long sound [B, S] (S in whole frames) piece by piece: codes uint16 [B, K, T].

    The same codes as in one piece, at a cost that grows with S and not with its square.
    """
    assert pcm.shape[1] % codec.frame_size == 0, pcm.shape
    assert max(math.prod(factors) for factors in codec.codebooks) <= 2**16, codec.codebooks
    frames = round(_ENCODED_SECONDS * codec.sample_rate / codec.frame_size)
    state = codec.new_encoder_state(len(pcm), frames)
    device = state.active.device
    lower = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.inference_mode(), lower:
        pieces = [
            codec.encode(piece[:, None].to(device), state).cpu()
            for piece in torch.from_numpy(pcm).split(frames * codec.frame_size, dim=1)
        ]
    return torch.cat(pieces, dim=2).numpy().astype(np.uint16)


@functools.cache
def _codec(name: str, device: str) -> Codec:
    return load_codec(name).to(device)


@functools.cache
def _noises(folders: tuple[Path, ...]) -> tuple[npt.NDArray[np.float32], ...]:
    """Every clip of some noise shards, float32 [S] each."""
    return tuple(
        sample.pcm[0] for folder in folders for sample in Reader(folder) if sample.pcm is not None
    )


@functools.lru_cache(maxsize=_ANSWERS_KEPT)
def _answer(text: str, voice: Voice) -> Utterance:
    return speak(text, voice)


def _user_voices(config: DialoguesConfig) -> list[Voice]:
    if isinstance(config.voices, str):
        return user_voices(config.voices, config.engines)
    return [Voice.parse(text) for text in config.voices]


def _dialogues(numbers: Sequence[int], config: DialoguesConfig) -> Iterator[Sample | Dropped]:
    """The samples of some conversations, encoded a batch at a time."""
    for start in range(0, len(numbers), config.batch):
        made: list[tuple[int, str, Dialogue]] = []
        for number in numbers[start : start + config.batch]:
            try:
                made.append((number, *_converse(number, config)))
            except UserError as error:  # One sentence that an engine cannot read.
                yield Dropped(f"d{config.seed}-{number:06d}", str(error))
        if not made:
            continue
        # [conversations, 2, S]: channels in the order ASSISTANT, USER.
        pcm = np.stack([np.stack((talk.assistant, talk.user)) for _, _, talk in made])
        codec = _codec(config.codec, config.device)
        codes = encode_long(codec, pcm.reshape(-1, pcm.shape[-1]), config.precision)
        for index, (number, voice, talk) in enumerate(made):
            yield from _cut(
                number, voice, talk, pcm[index], codes[2 * index : 2 * index + 2], config
            )


def _converse(number: int, config: DialoguesConfig) -> tuple[str, Dialogue]:
    """One conversation as the microphones hear it, and the user's voice. Pure, seeded by number."""
    rng = np.random.default_rng([config.seed, number])
    lines = script(rng, config.dialogue)
    voices = _user_voices(config)
    voice = voices[int(rng.integers(len(voices)))]
    voice = voice.jitter(rng) if config.jitter else voice
    dbfs = rng.uniform(*config.user_dbfs)
    assistant = Voice.parse(config.assistant)

    def synthesize(text: str, channel: int) -> Utterance:
        if channel == ASSISTANT_CHANNEL:
            return _answer(text, assistant)
        utterance = speak(text, voice)
        return Utterance(normalize_level(utterance.pcm, dbfs), SAMPLE_RATE, utterance.words)

    talk = arrange(lines, synthesize, SAMPLE_RATE)
    return str(voice), replace(talk, user=_microphone(talk, rng, config))


def _microphone(
    talk: Dialogue, rng: np.random.Generator, config: DialoguesConfig
) -> npt.NDArray[np.float32]:
    """What the user's microphone hears: the user in a room, noise, and the assistant's echo."""
    heard = talk.user
    if rng.random() < config.reverberation:
        response = augment.room(rng, rng.uniform(0.15, 0.5), rng.uniform(0.0, 10.0))
        heard = augment.reverberate(heard, response)
    for event in talk.events:
        first, last = round(event.start * SAMPLE_RATE), round(event.end * SAMPLE_RATE)
        if event.kind == "noise" and last > first:
            noise = _noise(last - first, rng, config)
            if "snr_db" in event.meta:
                heard = augment.add_noise(heard, noise, event.meta["snr_db"])
            else:
                heard = heard.copy()
                heard[first:last] += normalize_level(noise, event.meta["dbfs"])
    for event in talk.events:
        if event.kind == "echo":
            heard = augment.add_echo(
                heard, talk.assistant, event.meta["gain_db"], event.meta["delay"]
            )
    if rng.random() < config.telephone:
        heard = augment.telephone(heard)
    return augment.limit(heard)


def _noise(
    samples: int, rng: np.random.Generator, config: DialoguesConfig
) -> npt.NDArray[np.float32]:
    clips = _noises(config.noise)
    # Recorded noises, where there are any, half of the time.
    if clips and rng.random() < 0.5:
        return augment.excerpt(clips[int(rng.integers(len(clips)))], samples, rng)
    make = augment.white if rng.random() < 0.5 else augment.pink
    return augment.excerpt(make(_NOISE_SAMPLES, rng), samples, rng)


def _cut(
    number: int,
    voice: str,
    talk: Dialogue,
    pcm: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint16],
    config: DialoguesConfig,
) -> Iterator[Sample]:
    """A conversation in samples of ``sample_seconds``, cut between frames."""
    frames = round(config.sample_seconds * FRAME_RATE)
    for part, first in enumerate(range(0, codes.shape[2], frames)):
        last = min(first + frames, codes.shape[2])
        start, end = first / FRAME_RATE, last / FRAME_RATE
        yield Sample(
            id=f"d{config.seed}-{number:06d}-{part:02d}",
            text="",
            words=(
                cut_words(talk.assistant_words, start, end),
                cut_words(talk.user_words, start, end),
            ),
            voices=(config.assistant, voice),
            source="quiz",
            licence="Apache-2.0",
            synthetic=True,
            seconds=end - start,
            events=cut_events(talk.events, start, end),
            meta={"conversation": number, "start": start, "split": config.dialogue.split},
            codes=codes[:, :, first:last],
            pcm=pcm[:, first * FRAME_SIZE : last * FRAME_SIZE] if config.keep_sound else None,
        )
