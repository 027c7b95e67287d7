"""How much of what is said survives in the tokens alone.

Held-out sentences in the assistant's voice are tokenized, spoken again from nothing but the tokens,
in the same voice, and an independent recognizer writes down both:

    sound ─┬─────────────────── tokenizer ═ tokens ─ token decoder ─ recognizer   resynthesis_wer
           └─ recognizer                                            resynthesis_wer_original

`resynthesis_wer_added` is the difference, in words of a hundred (points); its interval is that of
the pairs, which differ much less than the sentences do. All intervals are bootstraps over
sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from audio_codec.audio import Pcm
from audio_codec.speech_tokenizer import SpeechTokenizer
from audio_codec.token_decoder import TokenDecoder, check_match
from speechlm.evaluation.report import Metric, bootstrap_ratio
from speechlm.training.token_decoder import tokenize
from synth_data import quiz
from synth_data.tts import Voice, speak
from synth_data.verify import WordErrors, default_recognizer, word_errors


class Listener(Protocol):
    """Whoever writes down what is said."""

    def transcribe(self, pcm: Pcm) -> str:
        """Words heard in a sound [S] at 24 kHz."""


@torch.inference_mode()
def resynthesize(
    tokenizer: SpeechTokenizer, decoder: TokenDecoder, pcm: Pcm, voice: str, seed: int = 0
) -> Pcm:
    """A sound [S] spoken again from its tokens alone, in a voice of the decoder's table: [S]."""
    size = decoder.config.token_size
    padded = torch.from_numpy(np.pad(pcm, (0, -len(pcm) % size)))[None, None]
    made = decoder.decode(
        tokenize(tokenizer, padded), voice=decoder.voice(voice)[None], seed=torch.tensor([seed])
    )
    return made[0, 0, : len(pcm)].float().numpy()


def pairs_of_errors(
    tokenizer: SpeechTokenizer,
    decoder: TokenDecoder,
    said: Sequence[tuple[Pcm, str]],
    voice: str,
    listener: Listener,
) -> list[tuple[WordErrors, WordErrors]]:
    """What a listener gets wrong of each (sound, text), before and after resynthesis."""
    found = []
    for seed, (pcm, text) in enumerate(said):
        sounds = (pcm, resynthesize(tokenizer, decoder, pcm, voice, seed))
        before, after = (word_errors(text, listener.transcribe(sound)) for sound in sounds)
        found.append((before, after))
    return found


def pooled(pairs: Sequence[tuple[WordErrors, WordErrors]]) -> dict[str, Metric]:
    """The three rates, each with a percentile bootstrap over sentences."""
    words = [before.words for before, _ in pairs]
    before, after = ([errors[i].errors for errors in pairs] for i in (0, 1))
    added = [100 * (b - a) for a, b in zip(before, after, strict=True)]
    return {
        "resynthesis_wer": bootstrap_ratio(after, words),
        "resynthesis_wer_original": bootstrap_ratio(before, words),
        "resynthesis_wer_added": bootstrap_ratio(added, words, "points"),
    }


def resynthesis_wer(
    tokenizer: SpeechTokenizer, decoder: TokenDecoder, utterances: int = 100, seed: int = 0
) -> dict[str, Metric]:
    """Word errors before and after, of held-out sentences in the decoder's first voice.

    Raises UserError when the decoder is not the tokenizer's, or its first voice cannot be
    synthesized.
    """
    check_match(tokenizer, decoder)
    voice = decoder.config.voices[0]
    speaker = Voice.parse(voice)
    said = [(speak(t, speaker).pcm, t) for t in quiz.sentences("heldout", utterances, seed)]
    return pooled(pairs_of_errors(tokenizer, decoder, said, voice, default_recognizer()))
