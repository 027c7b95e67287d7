"""Piper: neural voices as ONNX files, on the CPU, from the package ``piper-tts``.

A model's noise cannot be seeded from outside, so it is left out (noise scales of 0): an utterance
is a pure function of its text and voice, at the price of some liveliness. Word times are the
model's own where it was patched to tell them (``piper.patch_voice_with_alignment``) and its
phonemizer keeps words apart; else they are estimated.
"""

import functools
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audio_codec.errors import UserError
from synth_data.text import Token
from synth_data.tts.speech import (
    Utterance,
    Word,
    model_and_speaker,
    sixteen_bit,
    speaker_number,
    spread,
    state_of,
    tokens_of,
)
from synth_data.tts.voices import Voice

# Phonemes that are no part of a word: beginning, end, padding, stops.
_NO_SOUND = frozenset("^$_ .,;:?!")


class Piper:
    """Voices ``piper:PATH.onnx``, or ``piper:PATH.onnx#SPEAKER`` of a model with several."""

    def __init__(self) -> None:
        """Find the package.

        Raises:
            UserError: it is not installed.
        """
        try:
            import piper
        except ImportError:
            raise UserError(
                "speech engine 'piper' is not installed; "
                "run: pip install piper-tts (or this package's extra 'piper')"
            ) from None
        self._package = piper
        self._load = functools.lru_cache(maxsize=4)(self._loaded)

    def synthesize(self, text: str, voice: Voice) -> Utterance:
        """See ``Synthesizer``; the model's own sample rate."""
        assert voice.engine == "piper", voice
        tokens = tokens_of(text)
        model = self._load(self._path(voice))
        settings = self._package.SynthesisConfig(
            speaker_id=speaker_number(voice, model.config.num_speakers),
            length_scale=model.config.length_scale / (voice.rate or 1.0),
            noise_scale=0.0,
            noise_w_scale=0.0,
        )
        chunks = list(model.synthesize(text, settings, include_alignments=True))
        if not sum(len(chunk.audio_float_array) for chunk in chunks):
            raise UserError(f"text {text!r} holds nothing that voice {str(voice)!r} can speak")
        rate = int(model.config.sample_rate)
        pcm = sixteen_bit(np.concatenate([np.atleast_1d(c.audio_float_array) for c in chunks]))
        words = _aligned(tokens, chunks, rate)
        return Utterance(pcm, rate, words or spread(tokens, pcm, rate), estimated=words is None)

    def version(self, voice: Voice) -> str:
        """Of the package, and hashes of the model and its settings."""
        path = self._path(voice)
        settings = path.with_name(path.name + ".json")
        return f"{importlib.metadata.version('piper-tts')} {_hash(path)} {_hash(settings)}"

    def _path(self, voice: Voice) -> Path:
        path = Path(model_and_speaker(voice)[0])
        if not path.is_file() or not path.with_name(path.name + ".json").is_file():
            raise UserError(
                f"voice {str(voice)!r}: {str(path)!r}, and the same with .json behind it, must be "
                "the files of a Piper voice"
            )
        return path

    def _loaded(self, path: Path) -> Any:
        try:
            return self._package.PiperVoice.load(path)
        except Exception as error:  # onnxruntime has exceptions of its own for a broken file.
            raise UserError(f"Piper voice {str(path)!r} cannot be loaded: {error}") from error


_hash = functools.cache(state_of)


def _aligned(tokens: Sequence[Token], chunks: Sequence[Any], rate: int) -> tuple[Word, ...] | None:
    """Words by the samples of their phonemes; None when those are not known, or not as many."""
    spans: list[tuple[int, int]] = []
    place = 0
    for chunk in chunks:
        if chunk.phoneme_alignments is None:
            return None
        inside = False
        for phoneme in chunk.phoneme_alignments:
            end = place + int(phoneme.num_samples)
            if phoneme.phoneme in _NO_SOUND:
                inside = False
            elif inside:
                spans[-1] = spans[-1][0], end
            else:
                spans.append((place, end))
                inside = True
            place = end
    if len(spans) != len(tokens):
        return None
    return tuple(
        Word(token.text, round(start / rate, 4), round(end / rate, 4))
        for token, (start, end) in zip(tokens, spans, strict=True)
    )
