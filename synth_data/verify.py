"""A recognizer listens to what was synthesized, and to what the model says.

pocketsphinx (its US English model lies inside its wheel) shares no data and no code with the models
trained here, so it can judge them. It runs open, with its own trigram of general English, or with a
language model over a list of possible answers, which turns it into a judge of *which* answer was
said. Both see the whole utterance at once (batch cepstral mean), so a transcript does not depend on
what was heard before.

One second of speech takes about 0.3 s of one core with the general model.

Two others can take its place (``get_recognizer``): a Whisper checkpoint, and our own tokenizer's
CTC head, which is quick but has learned from the very voices it is to judge.
"""

import functools
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pocketsphinx
import torch

from audio_codec.audio import SAMPLE_RATE, resample
from audio_codec.codec import load_tokenizer_of
from audio_codec.errors import UserError
from audio_codec.files import replacing
from audio_codec.speech_tokenizer import encode_whole
from synth_data.phones import DICTIONARY, pronunciations
from synth_data.text import normalize
from synth_data.tts import Utterance

log = logging.getLogger(__name__)

_RECOGNIZER_RATE = 16_000
_SILENCE = 10 ** (-60 / 20)
_GRAMMARS, _MODELS = (".jsgf", ".gram"), (".arpa", ".lm", ".bin", ".dmp")


# --- Word errors ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordErrors:
    """The cheapest way from a reference to a hypothesis, in words."""

    substitutions: int
    deletions: int
    insertions: int
    words: int
    """Of the reference."""

    @property
    def errors(self) -> int:
        """All three together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors a reference word; for an empty reference 0 when nothing was heard, else 1."""
        return self.errors / self.words if self.words else float(self.errors > 0)

    def __add__(self, other: "WordErrors") -> "WordErrors":
        """Pool two utterances; the rate of the sum is the corpus-level error rate."""
        return WordErrors(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.words + other.words,
        )


def word_errors(reference: str, hypothesis: str) -> WordErrors:
    """Align two texts by Levenshtein distance over normalized words.

    Among alignments of equal cost the one with most substitutions is taken.
    """
    expected, heard = normalize(reference).split(), normalize(hypothesis).split()
    # (errors, deletions + insertions, deletions): the first differs, the others break ties.
    row = [(j, j, 0) for j in range(len(heard) + 1)]
    for i, word in enumerate(expected, start=1):
        above, row = row, [(i, i, i)]
        for j, other in enumerate(heard, start=1):
            errors, gaps, deletions = above[j - 1]
            row.append(
                min(
                    (errors + (word != other), gaps, deletions),
                    (above[j][0] + 1, above[j][1] + 1, above[j][2] + 1),
                    (row[j - 1][0] + 1, row[j - 1][1] + 1, row[j - 1][2]),
                )
            )
    errors, gaps, deletions = row[-1]
    return WordErrors(errors - gaps, deletions, gaps - deletions, len(expected))


def wer(reference: str, hypothesis: str) -> float:
    """Word error rate of one utterance (may exceed 1); see ``WordErrors.rate``."""
    return word_errors(reference, hypothesis).rate


# --- A language model over possible answers -------------------------------------------------------


def arpa(texts: Iterable[str], *, order: int = 3, discount: float = 0.5) -> str:
    """A back-off n-gram model of sentences, in ARPA format.

    Absolute discounting (Ney, Essen and Kneser, 1994): every n-gram seen gives ``discount`` of its
    count to the words its history was not seen with, which are then judged by the shorter history.

    Args:
        texts: sentences; normalized here, repeats count.
        order: longest n-gram, at least 2.
        discount: 0 < discount < 1.

    Raises:
        UserError: no text holds a word.
    """
    assert order >= 2 and 0 < discount < 1, (order, discount)
    sentences = [["<s>", *words, "</s>"] for text in texts if (words := normalize(text).split())]
    if not sentences:
        raise UserError("a language model needs at least one text with a word in it")
    counts: list[Counter[tuple[str, ...]]] = [
        Counter(
            tuple(sentence[start : start + length])
            for sentence in sentences
            for start in range(len(sentence) - length + 1)
        )
        for length in range(1, order + 1)
    ]
    # "<s>" is never predicted: it is a history only.
    total = sum(counts[0].values()) - counts[0][("<s>",)]
    probability: dict[tuple[str, ...], float] = {
        gram: count / total for gram, count in counts[0].items() if gram != ("<s>",)
    }
    vocabulary = len(probability)
    backoff: dict[tuple[str, ...], float] = {}
    for length in range(2, order + 1):
        followers: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for gram in counts[length - 1]:
            followers.setdefault(gram[:-1], []).append(gram)
        for history, grams in followers.items():
            seen = sum(counts[length - 1][gram] for gram in grams)
            # A history that was seen with every word has nobody to give a discount to.
            taken = discount if len(grams) < vocabulary else 0.0
            for gram in grams:
                probability[gram] = (counts[length - 1][gram] - taken) / seen
            if taken:
                lower = sum(probability[gram[1:]] for gram in grams)
                backoff[history] = taken * len(grams) / seen / (1 - lower)
    return _write_arpa(counts, probability, backoff)


def _write_arpa(
    counts: list[Counter[tuple[str, ...]]],
    probability: Mapping[tuple[str, ...], float],
    backoff: Mapping[tuple[str, ...], float],
) -> str:
    lines = ["\\data\\"]
    lines += [f"ngram {length}={len(grams)}" for length, grams in enumerate(counts, start=1)]
    for length, grams in enumerate(counts, start=1):
        lines += ["", f"\\{length}-grams:"]
        for gram in sorted(grams):
            # -99 is ARPA's zero.
            chance = math.log10(probability[gram]) if gram in probability else -99.0
            weight = f"\t{math.log10(backoff[gram]):.5f}" if gram in backoff else ""
            lines.append(f"{chance:.5f}\t{' '.join(gram)}{weight}")
    return "\n".join([*lines, "", "\\end\\", ""])


def missing_words(texts: Iterable[str]) -> list[str]:
    """Words that the recognizer has no pronunciation for, sorted: it can never hear them."""
    words = {word for text in texts for word in normalize(text).split()}
    return sorted(words - pronunciations().keys())


# --- Recognizers ----------------------------------------------------------------------------------


class Listener(Protocol):
    """Whatever writes down what it hears."""

    def transcribe(self, pcm: npt.NDArray[np.float32]) -> str:
        """Words heard in ``pcm`` float32 [S] at 24 kHz, normalized; "" when none."""
        ...


class Recognizer:
    """pocketsphinx over the general English language model, or over a given one."""

    def __init__(
        self,
        language_model: Path | str | None = None,
        pronunciations: Mapping[str, str] | None = None,
    ) -> None:
        """Load the models: half a second, and some 5 s more to pack a model in ARPA format.

        Args:
            language_model: an n-gram model (.arpa, .lm, .bin, .dmp) or a grammar (.jsgf, .gram);
                None is general US English.
            pronunciations: for words outside its dictionary, in ARPAbet: ``{"oslo": "AA Z L OW"}``.

        Raises:
            UserError: the file is missing, of another kind, or cannot be parsed.
        """
        settings: dict[str, str] = {}
        if language_model is not None:
            path = Path(language_model)
            if not path.is_file():
                raise UserError(f"language model {str(path)!r} is not a file")
            if path.suffix not in _GRAMMARS + _MODELS:
                raise UserError(
                    f"language model {str(path)!r}: the suffix must be one of "
                    f"{', '.join(_MODELS + _GRAMMARS)}"
                )
            settings = {"jsgf" if path.suffix in _GRAMMARS else "lm": str(path)}
        with tempfile.TemporaryDirectory() as folder:
            if pronunciations:
                # A file of its own, because words added to a running decoder also get a new
                # unigram in its language model.
                dictionary = Path(folder) / "words.dict"
                added = "".join(f"{word} {phones}\n" for word, phones in pronunciations.items())
                dictionary.write_text(DICTIONARY.read_text() + added)
                settings["dict"] = str(dictionary)
            try:
                self._decoder = pocketsphinx.Decoder(
                    samprate=_RECOGNIZER_RATE, cmn="batch", loglevel="FATAL", **settings
                )
            except RuntimeError as error:
                raise UserError(f"language model {str(language_model)!r}: {error}") from error

    @classmethod
    def over(
        cls,
        texts: Iterable[str],
        pronunciations: Mapping[str, str] | None = None,
        *,
        order: int = 3,
    ) -> "Recognizer":
        """A recognizer that knows the words and their order in ``texts`` alone.

        Words without a pronunciation are named in one warning of the log.
        """
        texts = list(texts)
        if missing := sorted(set(missing_words(texts)) - set(pronunciations or {})):
            log.warning("the recognizer cannot hear %d words: %s", len(missing), ", ".join(missing))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "answers.arpa"
            path.write_text(arpa(texts, order=order))
            return cls(path, pronunciations)

    def transcribe(self, pcm: npt.NDArray[np.float32]) -> str:
        """Words heard in ``pcm`` float32 [S] at 24 kHz; "" when none.

        A recognizer whose grammar has no silence hears a short word in it: below -60 dBFS nothing
        was said.
        """
        assert pcm.ndim == 1, pcm.shape
        if np.abs(pcm).max(initial=0.0) < _SILENCE:
            return ""
        samples = resample(pcm, SAMPLE_RATE, _RECOGNIZER_RATE).clip(-1, 1)
        self._decoder.start_utt()
        self._decoder.process_raw((samples * 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return normalize(hypothesis.hypstr) if hypothesis else ""


class TokenizerRecognizer:
    """The CTC head of our own speech tokenizer, reading its codes greedily."""

    def __init__(self, name_or_path: str) -> None:
        """Load a tokenizer, or a codec around one; UserError when there is none or it is broken."""
        self._tokenizer = load_tokenizer_of(name_or_path)
        if self._tokenizer.head is None:
            raise UserError(
                f"recognizer 'tokenizer:{name_or_path}' has no CTC head, so it reads no text."
            )

    @torch.inference_mode()
    def transcribe(self, pcm: npt.NDArray[np.float32]) -> str:
        """See ``Listener``."""
        assert pcm.ndim == 1, pcm.shape
        if not len(pcm):
            return ""
        sound = resample(pcm, SAMPLE_RATE, self._tokenizer.sample_rate)
        whole = np.pad(sound, (0, -len(sound) % self._tokenizer.config.code_size))
        codes = encode_whole(self._tokenizer, torch.from_numpy(whole)[None, None])
        return normalize(self._tokenizer.transcribe(codes)[0])


class Whisper:
    """A Whisper checkpoint (arXiv 2212.04356) of ``transformers``, decoding greedily."""

    _SECONDS = 30
    """What the encoder hears at once; longer sound is cut there."""

    def __init__(self, name_or_path: str) -> None:
        """Load the model; UserError when there is none or it is broken."""
        import transformers

        pipeline: Any = transformers.pipeline  # An overload for every task there is.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._pipeline = pipeline(
                "automatic-speech-recognition", model=name_or_path, device=device
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = str(error).strip().partition("\n")[0]
            raise UserError(
                f"recognizer 'whisper:{name_or_path}': no checkpoint can be loaded: {first}"
            ) from error
        if self._pipeline.model.config.model_type != "whisper":
            kind = self._pipeline.model.config.model_type
            raise UserError(
                f"recognizer 'whisper:{name_or_path}' is of type {kind!r}, not 'whisper'"
            )

    def transcribe(self, pcm: npt.NDArray[np.float32]) -> str:
        """See ``Listener``; silence is never sent to a model that would make words of it."""
        assert pcm.ndim == 1, pcm.shape
        if np.abs(pcm).max(initial=0.0) < _SILENCE:
            return ""
        sound = resample(pcm, SAMPLE_RATE, _RECOGNIZER_RATE)
        step = self._SECONDS * _RECOGNIZER_RATE
        heard = [
            self._pipeline({"raw": sound[start : start + step], "sampling_rate": _RECOGNIZER_RATE})
            for start in range(0, len(sound), step)
        ]
        return normalize(" ".join(part["text"] for part in heard))


def save_language_model(path: Path | str, texts: Iterable[str]) -> None:
    """Write ``arpa(texts)`` to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(arpa(texts))


@functools.cache
def default_recognizer() -> Recognizer:
    """The open recognizer, loaded once a process."""
    return Recognizer()


def get_recognizer(name: str) -> Listener:
    """The process-wide recognizer of a name.

    Args:
        name: "pocketsphinx", "tokenizer:PATH" (a tokenizer's checkpoint, or a codec's around one)
            or "whisper:PATH".

    Raises:
        UserError: unknown name, not installed, or a checkpoint that cannot be loaded.
    """
    kind, _, path = name.partition(":")
    if name == "pocketsphinx":
        return default_recognizer()
    if kind not in _LOADED or not path:
        raise UserError(
            f"recognizer {name!r} is unknown; choose pocketsphinx, tokenizer:PATH or whisper:PATH"
        )
    return _loaded(kind, path)


_LOADED: Mapping[str, type[TokenizerRecognizer] | type[Whisper]] = {
    "tokenizer": TokenizerRecognizer,
    "whisper": Whisper,
}


@functools.cache
def _loaded(kind: str, path: str) -> Listener:
    return _LOADED[kind](path)


@dataclass(frozen=True)
class Verification:
    """What the recognizer made of an utterance."""

    hypothesis: str
    errors: WordErrors


def verify(utterance: Utterance, recognizer: Listener | None = None) -> Verification:
    """Transcribe an utterance and count its errors against its own words.

    Args:
        utterance: at 24 kHz, as from ``tts.speak``.
        recognizer: None is pocketsphinx with its open language model.
    """
    assert utterance.sample_rate == SAMPLE_RATE, utterance.sample_rate
    hypothesis = (recognizer or default_recognizer()).transcribe(utterance.pcm)
    reference = " ".join(word.text for word in utterance.words)
    return Verification(hypothesis, word_errors(reference, hypothesis))
