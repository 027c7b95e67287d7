"""How well words can be read off the semantic codes.

Held-out sentences of the quiz world, in voices that nothing was trained on, are synthesized,
tokenized, and read back by the tokenizer's own CTC head, greedily.

`wer_quantized` reads the codes; `wer_unquantized` the same network with its rounding left out, so
the two differ by what the bottleneck's rounding alone costs. `codebook_usage` is the share of codes
seen at least once, `codebook_entropy` the entropy of their distribution over log2 of their number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from audio_codec.audio import Pcm
from audio_codec.quantize import entropy_bits
from speechlm.convert import load_speech_tokenizer_of
from speechlm.evaluation.report import Metric
from speechlm.training.tokenizer import Utterance, collate, log_mel, transcribe
from synth_data import quiz
from synth_data.tts import Voice, speak, user_voices
from synth_data.verify import WordErrors, pooled_rate, word_errors


def heldout_speech(count: int, seed: int) -> list[tuple[Pcm, str, Voice]]:
    """Held-out quiz sentences in held-out voices: sound [S], text, voice."""
    rng = np.random.default_rng(seed)
    voices = user_voices("heldout")
    found = []
    for index, text in enumerate(quiz.sentences("heldout", count, seed)):
        voice = voices[index % len(voices)]
        found.append((speak(text, voice.jitter(rng)).pcm, text, voice))
    return found


def pooled_wer(errors: Sequence[WordErrors]) -> Metric:
    """Corpus word error rate with a percentile bootstrap over utterances."""
    value, low, high = pooled_rate(errors)
    return Metric(value, low, high, len(errors))


@torch.inference_mode()
def evaluate(model: str = "tiny", utterances: int = 300, seed: int = 0) -> dict[str, Metric]:
    """Metrics of the tokenizer inside a model, or of a tokenizer's checkpoint directory."""
    tokenizer = load_speech_tokenizer_of(model)
    found = [
        Utterance(log_mel(pcm), text, str(voice))
        for pcm, text, voice in heldout_speech(utterances, seed)
    ]
    errors: dict[bool, list[WordErrors]] = {True: [], False: []}
    counts = torch.zeros(tokenizer.quantizer.size, dtype=torch.int64)
    rng = np.random.default_rng(seed)
    for start in range(0, len(found), 16):
        chosen = found[start : start + 16]
        batch = collate(chosen, (), None, rng)
        for quantized, pool in errors.items():
            said = transcribe(tokenizer, batch.mel, batch.frames, quantized=quantized)
            pool += [word_errors(u.text, text) for u, text in zip(chosen, said, strict=True)]
        codes = tokenizer.discretize(tokenizer.features(batch.mel))
        heard = torch.arange(codes.shape[1]) < batch.frames[:, None]
        counts += torch.bincount(codes[heard], minlength=len(counts))
    frames = int(counts.sum())
    entropy = entropy_bits(counts) / float(np.log2(len(counts)))
    return {
        "wer_quantized": pooled_wer(errors[True]),
        "wer_unquantized": pooled_wer(errors[False]),
        "codebook_usage": Metric(float((counts > 0).float().mean()), n=frames),
        "codebook_entropy": Metric(entropy, n=frames),
    }
