"""Shards of conversations: two channels as a codec's codes, with words and events.

What is said comes from the quiz world, or from a file of dialogues that people or programs wrote::

    {"turns": [{"speaker": "user", "text": "Is it far?"}, {"speaker": "assistant", "text": "No."}]}
    {"messages": [{"role": "user", "content": "Is it far?"}, {"role": "assistant", ...}]}
    {"turns": ["Is it far?", "No."]}

Either becomes a script, a script becomes two channels of sound (``dialogue.py``), the user's goes
through a room, noise, echo and telephone (``augment.py``), and a codec encodes both.

    speechlm synth dialogues configs/synth/dialogues.yaml workers=2

Letters: B sounds, K codebooks, T frames, S samples.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from audio_codec.audio import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE
from audio_codec.audio import normalize as normalize_level
from audio_codec.codec import Codec, coded_by, load_codec, locate
from audio_codec.errors import UserError
from audio_codec.precision import Precision, lowered, settle
from synth_data import augment
from synth_data.build import BuildReport, Dropped, run_shards
from synth_data.dialogue import ASSISTANT as ASSISTANT_CHANNEL
from synth_data.dialogue import USER as USER_CHANNEL
from synth_data.dialogue import (
    Dialogue,
    DialogueConfig,
    Exchange,
    Range,
    arrange,
    cut_events,
    cut_words,
    script,
)
from synth_data.mixture import GuardConfig, Shares
from synth_data.shards import Event, Folder, Reader, Sample
from synth_data.text import spell_out, tokenize
from synth_data.tts import Utterance, Voice, sample_voices, speak, user_voices

# Long enough that a codec's cost a call vanishes, short enough that a sliding attention window does
# not compute much outside itself.
_ENCODED_SECONDS = 8.0
# Generated noise is this long and goes round: nobody hears that, and minutes of it cost as much as
# the user's speech.
_NOISE_SAMPLES = 20 * SAMPLE_RATE
# Answers repeat from one conversation to the next, and the assistant's engine is the slowest.
_ANSWERS_KEPT = 8192


# A line of a corpus longer than this is no conversation.
_LINE_BYTES = 2**20
# Heard after the last word of a written dialogue.
_TAIL_SECONDS = 1.0


class CorpusConfig(BaseModel):
    """Dialogues of a JSON-lines file, one a line; see the top of this file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    licence: str
    human: bool = True
    """Whether people wrote it; false for what a language model wrote."""


class DialoguesConfig(BaseModel):
    """Shards of conversations: codes of two channels (assistant, user), words and events."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: Folder
    """Folder of the shards, or its URL in a store (``s3://…``)."""
    codec: str
    """Checkpoint of the codec that encodes both channels: a directory, ``hf://…``,
    ``tiny/codec`` of the shipped weights."""
    hours: float | None = Field(default=None, gt=0)
    """Conversation in all, rounded up to whole conversations. Those of a corpus end when all is
    said, so there it is the most; None takes each dialogue of the corpus once."""
    dialogue: DialogueConfig = DialogueConfig(seconds=240)
    """How conversations go, and how long each lasts."""
    corpus: CorpusConfig | None = None
    """Dialogues to speak in place of the quiz; again from the first, with other voices, when the
    hours ask for more than there are."""
    sample_seconds: float = Field(default=60.0, gt=0)
    """A conversation is encoded in one piece and cut into samples of this length."""
    voices: Literal["train", "wide", "heldout"] | PositiveInt | tuple[str, ...] = "train"
    """User voices, one a conversation: a split of ``tts.user_voices``, so many of
    ``tts.sample_voices``, or by name."""
    engines: tuple[str, ...] = ("espeak", "flite")
    """Speech engines that a split's or drawn voices may use; all must be installed."""
    assistant: str = "flite:rms"
    """The assistant's voice."""
    jitter: bool = True
    """Vary the user's rate, pitch and range from one conversation to the next."""
    user_dbfs: Range = (-36.0, -18.0)
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
    precision: Precision = "fp32"
    """Of the codec's matrix products; bf16 costs about half on a CPU that has it, and moves one
    code in twenty to a near neighbour. `auto`: bf16 where `device` has units for it."""
    keep_sound: bool = False
    """Store the sound beside the codes."""
    guard: GuardConfig = GuardConfig()
    """The least that people must have made of it."""
    seed: int = Field(default=0, ge=0)
    shard_size: int = Field(default=16, gt=0)
    """Conversations a shard."""
    workers: int = Field(default=1, gt=0)
    """Processes; 1 works in this one. The shards do not depend on it."""
    ray: str | None = None
    """Address of a Ray cluster that makes the shards in their place; ``auto`` finds one."""

    @model_validator(mode="after")
    def _amount_given(self) -> "DialoguesConfig":
        if self.hours is None and self.corpus is None:
            raise ValueError("hours is missing: without a corpus nothing else says how much")
        return self

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
        UserError: a voice, engine, codec, corpus or noise folder is missing, the folder holds
            another build, or too little of it is what people made.
    """
    config = config.model_copy(update={"precision": settle(config.precision, config.device)})
    _corpus.cache_clear()  # The file may have changed since the last build of this process.
    corpus = None if config.corpus is None else _corpus(config.corpus.path)
    human = config.corpus is not None and config.corpus.human
    config.guard.check(Shares(0.0, float(human)), "the planned dialogues")
    inputs = hashlib.sha256()
    for path in sorted(locate(config.codec).glob("*.safetensors")):
        inputs.update(path.read_bytes())
    if corpus is not None:
        inputs.update(corpus.digest)
    for folder in config.noise:
        clips = _noises((folder,))
        if not clips:
            raise UserError(f"noise {str(folder)!r}: its shards hold no sound.")
        for clip in clips:
            inputs.update(clip.tobytes())
    for voice in (*_user_voices(config), Voice.parse(config.assistant)):
        speak("one", voice)  # A missing engine or an unknown name shows here.
    if config.hours is not None:
        conversations = math.ceil(config.hours * 3600 / config.dialogue.seconds)
    else:
        assert corpus is not None
        conversations = len(corpus)
    numbers = range(conversations)
    parts = [
        numbers[start : start + config.shard_size]
        for start in range(0, conversations, config.shard_size)
    ]
    described = config.model_dump_json(exclude={"workers", "output", "ray", "guard"})
    fingerprint = hashlib.sha256((described + inputs.hexdigest()).encode()).hexdigest()[:16]
    make = functools.partial(_dialogues, config=config)
    return run_shards(
        config.output,
        "dialogues",
        parts,
        make,
        workers=config.workers,
        fingerprint=fingerprint,
        ray=config.ray,
        guard=config.guard,
        source=() if corpus is None else corpus.texts(),
    )


# --- Corpora --------------------------------------------------------------------------------------


class Corpus:
    """Dialogues of a JSON-lines file by number.

    The file may be larger than memory: what is held is where its lines are. Empty lines count for
    nothing.
    """

    def __init__(self, path: Path) -> None:
        """Find the lines. Raises UserError when the file cannot be read, or holds none."""
        self.path = path
        spans = []
        start, digest = 0, hashlib.sha256()
        try:
            with path.open("rb") as opened:
                for line in opened:
                    digest.update(line)
                    if line.strip():
                        spans.append((start, len(line)))
                    start += len(line)
        except OSError as error:
            raise UserError(f"corpus {str(path)!r} cannot be read: {error.strerror}.") from error
        if not spans:
            raise UserError(f"corpus {str(path)!r} holds no dialogue.")
        self.digest = digest.digest()
        self._spans = np.array(spans, np.int64)

    def __len__(self) -> int:
        """Number of dialogues."""
        return len(self._spans)

    def __getitem__(self, number: int) -> tuple[str | None, list[Exchange]]:
        """See ``parse_dialogue``. Raises UserError when the line is no dialogue."""
        start, length = self._spans[number]
        where = f"dialogue {number} of {self.path.name}"
        if length > _LINE_BYTES:
            raise UserError(f"{where}: its line has {length} bytes, more than {_LINE_BYTES}.")
        with self.path.open("rb") as opened:
            opened.seek(start)
            line = opened.read(length)
        try:
            return parse_dialogue(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: {error}") from error

    def texts(self) -> Iterator[str]:
        """Every turn; a line that is no dialogue is passed over."""
        for number in range(len(self)):
            try:
                opening, exchanges = self[number]
            except UserError:
                continue
            yield opening or ""
            for exchange in exchanges:
                yield exchange.text
                yield exchange.answer


@functools.cache
def _corpus(path: Path) -> Corpus:
    return Corpus(path)


def parse_dialogue(line: Any) -> tuple[str | None, list[Exchange]]:
    """What the assistant opens with, if it does, and the exchanges that follow.

    Turns of one speaker in a row are one turn; a last one that nobody answers is left out. Where
    no speaker is called "assistant", the first to speak is the user.

    Raises:
        ValueError: it is no dialogue of two.
    """
    turns = line.get("turns", line.get("messages")) if isinstance(line, dict) else None
    if not isinstance(turns, list) or not turns:
        raise ValueError("expected turns or messages, a list.")
    said: list[tuple[str, str]] = []
    for number, turn in enumerate(turns):
        speaker, text = _turn(turn, number)
        # Punctuation that stands alone is not said.
        text = " ".join(word for word in spell_out(text).split() if tokenize(word))
        if not text or speaker == "system":
            continue
        if said and said[-1][0] == speaker:
            said[-1] = (speaker, f"{said[-1][1]} {text}")
        else:
            said.append((speaker, text))
    speakers = list(dict.fromkeys(speaker for speaker, _ in said))
    if len(speakers) != 2:
        raise ValueError(f"expected two speakers who say something, found {len(speakers)}.")
    assistant = "assistant" if "assistant" in speakers else speakers[1]
    texts = [text for _, text in said]
    opening = texts.pop(0) if said[0][0] == assistant else None
    # They take turns, so every second text is the user's.
    pairs = zip(texts[::2], texts[1::2], strict=False)
    exchanges = [Exchange(question, answer) for question, answer in pairs]
    if not exchanges:
        raise ValueError("nobody answers the user.")
    return opening, exchanges


def _turn(turn: Any, number: int) -> tuple[str, str]:
    if isinstance(turn, str):
        return ("user", "assistant")[number % 2], turn
    if isinstance(turn, dict):
        speaker, text = turn.get("speaker", turn.get("role")), turn.get("text", turn.get("content"))
        if isinstance(speaker, str) and isinstance(text, str):
            return speaker.lower(), text
    raise ValueError(f"turn {number} has no speaker and text.")


# --- Sound ----------------------------------------------------------------------------------------


def encode_long(
    codec: Codec, pcm: npt.NDArray[np.float32], precision: Precision = "fp32"
) -> npt.NDArray[np.uint16]:
    """Encode long sound [B, S] (S in whole frames) piece by piece: codes uint16 [B, K, T].

    The same codes as in one piece, at a cost that grows with S and not with its square.
    """
    assert pcm.shape[1] % codec.frame_size == 0, pcm.shape
    assert max(math.prod(factors) for factors in codec.codebooks) <= 2**16, codec.codebooks
    frames = round(_ENCODED_SECONDS * codec.sample_rate / codec.frame_size)
    state = codec.new_encoder_state(len(pcm), frames)
    device = state.active.device
    with torch.inference_mode(), lowered(precision, device):
        pieces = [
            codec.encode(piece[:, None].to(device), state).cpu()
            for piece in torch.from_numpy(pcm).split(frames * codec.frame_size, dim=1)
        ]
    return torch.cat(pieces, dim=2).numpy().astype(np.uint16)


@functools.cache
def cached_codec(name: str, device: str) -> Codec:
    """A codec by name, loaded once a process.

    Raises UserError when there is none, or its frames are not those of the shards.
    """
    codec = load_codec(name)
    if (codec.sample_rate, codec.frame_size) != (SAMPLE_RATE, FRAME_SIZE):
        raise UserError(
            f"codec '{name}' has {codec.sample_rate / codec.frame_size:g} frames a second of "
            f"{codec.sample_rate} Hz; codes in shards have {FRAME_RATE:g}, of {SAMPLE_RATE} Hz."
        )
    return codec.to(device)


@functools.cache
def coder(name: str, device: str) -> tuple[float, ...] | None:
    """What `shards.Sample.coded_by` says of its codes."""
    return coded_by(cached_codec(name, device))


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
    if isinstance(config.voices, int):
        return sample_voices(config.voices, config.seed, config.engines)
    return [Voice.parse(text) for text in config.voices]


def _dialogues(numbers: Sequence[int], config: DialoguesConfig) -> Iterator[Sample | Dropped]:
    """The samples of some conversations, encoded a batch at a time."""
    for start in range(0, len(numbers), config.batch):
        made: list[tuple[int, str, Dialogue, int]] = []
        for number in numbers[start : start + config.batch]:
            try:
                made.append((number, *_converse(number, config)))
            except UserError as error:  # One sentence that an engine cannot read.
                yield Dropped(f"d{config.seed}-{number:06d}", str(error))
        if not made:
            continue
        # [conversations, 2, S]: channels in the order ASSISTANT, USER.
        pcm = np.stack([np.stack((talk.assistant, talk.user)) for _, _, talk, _ in made])
        codec = cached_codec(config.codec, config.device)
        codes = encode_long(codec, pcm.reshape(-1, pcm.shape[-1]), config.precision)
        for index, (number, voice, talk, frames) in enumerate(made):
            own = codes[2 * index : 2 * index + 2, :, :frames]
            yield from _cut(number, voice, talk, pcm[index], own, config)


def _converse(number: int, config: DialoguesConfig) -> tuple[str, Dialogue, int]:
    """One conversation as the microphones hear it. Pure, seeded by number.

    Returns the user's voice, the sound, and the frames until all is said.
    """
    rng = np.random.default_rng([config.seed, number])
    if config.corpus is None:
        lines = script(rng, config.dialogue)
    else:
        corpus = _corpus(config.corpus.path)
        opening, exchanges = corpus[number % len(corpus)]
        lines = script(rng, config.dialogue, exchanges, opening)
    voices = _user_voices(config)
    voice = voices[int(rng.integers(len(voices)))]
    voice = voice.jitter(rng) if config.jitter else voice
    dbfs = rng.uniform(*config.user_dbfs)
    assistant = Voice.parse(config.assistant)

    def synthesize(text: str, channel: int) -> Utterance:
        if channel == ASSISTANT_CHANNEL:
            return _answer(text, assistant)
        utterance = speak(text, voice)
        return replace(utterance, pcm=normalize_level(utterance.pcm, dbfs))

    talk = arrange(lines, synthesize, SAMPLE_RATE)
    frames = round(config.dialogue.seconds * FRAME_RATE)
    if config.corpus is not None:
        last = max((word.end for word in (*talk.user_words, *talk.assistant_words)), default=0.0)
        if not last:
            raise UserError(
                f"dialogue.seconds is {config.dialogue.seconds:g}: nothing is said by then."
            )
        frames = min(frames, math.ceil((last + _TAIL_SECONDS) * FRAME_RATE))
    heard, events = _microphone(talk, rng, config)
    return str(voice), replace(talk, user=heard, events=(*events, *talk.events)), frames


def _microphone(
    talk: Dialogue, rng: np.random.Generator, config: DialoguesConfig
) -> tuple[npt.NDArray[np.float32], list[Event]]:
    """What the user's microphone hears: the user in a room, noise, and the assistant's echo.

    The events are those of ``Dialogue`` that are decided here.
    """
    heard, seconds = talk.user, config.dialogue.seconds
    events: list[Event] = []
    if rng.random() < config.reverberation:
        room = {"rt60": rng.uniform(0.15, 0.5), "direct_db": rng.uniform(0.0, 10.0)}
        response = augment.room(rng, room["rt60"], room["direct_db"])
        heard = augment.reverberate(heard, response)
        events.append(Event(kind="room", channel=USER_CHANNEL, start=0, end=seconds, meta=room))
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
        events.append(Event(kind="telephone", channel=USER_CHANNEL, start=0, end=seconds))
    return augment.limit(heard), events


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
            source="quiz" if config.corpus is None else config.corpus.path.name,
            licence="Apache-2.0" if config.corpus is None else config.corpus.licence,
            synthetic=True,
            human_text=config.corpus is not None and config.corpus.human,
            seconds=end - start,
            events=cut_events(talk.events, start, end),
            meta={"conversation": number, "start": start, "split": config.dialogue.split},
            codes=codes[:, :, first:last],
            coded_by=coder(config.codec, config.device),
            pcm=pcm[:, first * FRAME_SIZE : last * FRAME_SIZE] if config.keep_sound else None,
        )
