"""How much of speech survives the codec.

Held-out sentences in the assistant's voice (the one that is heard) are coded and decoded: `stoi`
(Taal et al., 2011), `pesq` (wide band, ITU-T P.862.2, at 16 kHz), and the word error rate of an
independent recognizer on the original and on the decoded sound. `stoi_users` is the same over
voices that nothing was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from pystoi import stoi

from audio_codec.audio import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE, Pcm, resample
from audio_codec.codec import Codec
from speechlm.convert import load_codec_of
from speechlm.evaluation.report import Metric, bootstrap_mean
from speechlm.evaluation.tokenizer import heldout_speech, pooled_wer
from synth_data import quiz
from synth_data.tts import ASSISTANT, speak
from synth_data.verify import Recognizer, word_errors


def round_trip(codec: Codec, pcm: Pcm, codebooks: int | None = None) -> tuple[Pcm, Pcm]:
    """(original, decoded), both cut to whole frames [S]."""
    samples = len(pcm) // FRAME_SIZE * FRAME_SIZE
    original = np.ascontiguousarray(pcm[:samples], dtype=np.float32)
    codes = codec.encode(torch.from_numpy(original)[None, None])
    return original, codec.decode(codes[:, :codebooks])[0, 0].numpy()


def bitrate(codec: Codec) -> float:
    """Bits a second of all codebooks."""
    return FRAME_RATE * sum(math.log2(math.prod(factors)) for factors in codec.codebooks)


def pesq_of(pairs: Sequence[tuple[Pcm, Pcm]]) -> Metric:
    """Wide-band PESQ; without a value where the package is not installed."""
    try:
        from pesq import NoUtterancesError, pesq
    except ImportError:
        return Metric(None, unit="MOS", reason="the package pesq is not installed")
    scores = []
    for original, decoded in pairs:
        try:
            narrow = [resample(pcm, SAMPLE_RATE, 16_000) for pcm in (original, decoded)]
            scores.append(pesq(16_000, *narrow, "wb"))
        except NoUtterancesError:
            continue  # a sentence too short for the measure's own activity detector
    return bootstrap_mean(scores, "MOS")


@torch.inference_mode()
def evaluate(model: str = "tiny", utterances: int = 100, seed: int = 0) -> dict[str, Metric]:
    """Metrics of the codec inside a model, or of a codec's checkpoint directory."""
    codec = load_codec_of(model)
    recognizer = Recognizer()
    pairs, before, after = [], [], []
    for text in quiz.sentences("heldout", utterances, seed):
        original, decoded = round_trip(codec, speak(text, ASSISTANT).pcm)
        if len(original) < SAMPLE_RATE // 2:
            continue  # too short for STOI's window of 384 ms to say anything
        pairs.append((original, decoded))
        before.append(word_errors(text, recognizer.transcribe(original)))
        after.append(word_errors(text, recognizer.transcribe(decoded)))
    users = [
        round_trip(codec, pcm)
        for pcm, _, _ in heldout_speech(utterances, seed)
        if len(pcm) > 0.6 * SAMPLE_RATE
    ]
    return {
        "stoi": bootstrap_mean([stoi(a, b, SAMPLE_RATE) for a, b in pairs]),
        "stoi_users": bootstrap_mean([stoi(a, b, SAMPLE_RATE) for a, b in users]),
        "pesq": pesq_of(pairs),
        "wer_original": pooled_wer(before),
        "wer_decoded": pooled_wer(after),
        "bitrate_bps": Metric(bitrate(codec), unit="bit/s"),
    }
