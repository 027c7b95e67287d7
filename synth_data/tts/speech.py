"""What every speech engine gives, and what it is asked by: ``Utterance``, ``Synthesizer``."""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from audio_codec.errors import UserError
from synth_data.text import Token, tokenize
from synth_data.tts.voices import Voice

# Below this level, relative to the utterance's loudest sample, an engine's output is a pause.
_PAUSE_DB = -40.0

# One utterance at a time: espeak-ng and flite are C libraries with global variables.
C_LIBRARY = threading.Lock()


@dataclass(frozen=True, slots=True)
class Word:
    """A spoken word and its time on the clock of its channel."""

    text: str
    """Lower-case, without outer punctuation."""
    start: float
    """Seconds."""
    end: float
    """Seconds; a pause after the word is not part of it."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """Synthesized speech: mono ``pcm`` float32 [S] in -1..1 and the words in it, in order."""

    pcm: npt.NDArray[np.float32]
    sample_rate: int
    words: tuple[Word, ...]
    estimated: bool = False
    """Whether the engine tells no word times, so that they are guessed from the words' lengths."""

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.pcm) / self.sample_rate


class Synthesizer(Protocol):
    """A text-to-speech engine, or one behind a guard or a cache."""

    def synthesize(self, text: str, voice: Voice) -> Utterance:
        """Speak ``text``; the engine's own sample rate; the same bytes for the same arguments.

        The words of the result are ``tokenize(text)``; give it the spoken form (``text.spell_out``)
        for one word of time an entry.

        Raises:
            UserError: the engine or voice is not installed, or the text holds nothing to speak.
            EngineFailure: the engine failed on a text that it may speak another time.
        """
        ...

    def version(self, voice: Voice) -> str:
        """Names whatever can change the bytes of ``synthesize`` besides its arguments."""
        ...


class EngineFailure(UserError):
    """An engine broke down, hung or was out of reach: another try may do."""


def tokens_of(text: str) -> list[Token]:
    """What an utterance of ``text`` has as words; UserError when there is none."""
    tokens = tokenize(text)
    if not tokens:
        raise UserError(f"text {text!r} holds no word to speak")
    return tokens


def audible(pcm: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    """Where ``pcm`` [S] is no pause, ascending."""
    loudest = float(np.abs(pcm).max(initial=0.0))
    return np.flatnonzero(np.abs(pcm) > loudest * 10 ** (_PAUSE_DB / 20))


def spread(
    tokens: Sequence[Token], pcm: npt.NDArray[np.float32], sample_rate: int
) -> tuple[Word, ...]:
    """Guess the times of words: from the first sound to the last, by length in characters."""
    sound = audible(pcm)
    start, end = (sound[0], sound[-1] + 1) if len(sound) else (0, len(pcm))
    # A space counts as a character, so that a short word has time to be heard.
    edges = np.cumsum([0, *(len(token.text) + 1 for token in tokens)])
    times = (start + (end - start) * edges / edges[-1]) / sample_rate
    return tuple(
        Word(token.text, round(float(times[i]), 4), round(float(times[i + 1]), 4))
        for i, token in enumerate(tokens)
    )


def sixteen_bit(pcm: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Round to multiples of 1/32768: what a 16-bit file, such as a cache's, gives back."""
    return np.rint(pcm * 32768).clip(-32768, 32767).astype(np.float32) / np.float32(32768)


def model_and_speaker(voice: Voice) -> tuple[str, str]:
    """The two parts of a name like ``folder/voice.onnx#12``; the second may be empty."""
    model, _, speaker = voice.name.partition("#")
    return model, speaker


def speaker_number(voice: Voice, speakers: int) -> int:
    """Which of a model's ``speakers`` a voice is; UserError when it has no such one."""
    speaker = model_and_speaker(voice)[1] or "0"
    if not speaker.isdecimal() or int(speaker) >= speakers:
        choices = "0" if speakers == 1 else f"0..{speakers - 1}"
        raise UserError(f"voice {str(voice)!r}: unknown speaker {speaker!r}; choose {choices}")
    return int(speaker)


def state_of(path: Path) -> str:
    """A hash of a file, or of all files in a folder: names the weights of a model."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
