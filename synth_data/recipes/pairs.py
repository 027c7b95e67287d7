"""Shards of pairs: a text, and the semantic codes of its sound. The sound itself is thrown away.

What a text-to-token model learns from. The texts and voices are those of a speech recipe, verified
if it says so, and recordings with their transcripts; each is heard once by the tokenizer.

    speechlm synth pairs configs/synth/pairs.yaml workers=2

Shapes: S samples, T codes.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from audio_codec import checkpoint
from audio_codec.audio import SAMPLE_RATE, resample
from audio_codec.precision import Precision, lowered, settle
from audio_codec.speech_tokenizer import SpeechTokenizer, encode_whole
from synth_data.build import BuildReport, Dropped, run_shards
from synth_data.recipes.speech import (
    Line,
    SpeechConfig,
    plan_speech,
    planned_shares,
    speak_lines,
)
from synth_data.shards import Sample
from synth_data.text_to_token import kept_fingerprint, kept_tokenizer, transcribe
from synth_data.verify import wer


class PairsConfig(SpeechConfig):
    """A speech recipe of which the codes are kept."""

    tokenizer: str
    """Checkpoint of a speech tokenizer, or of a codec around one."""
    batch: int = Field(default=16, gt=0)
    """Utterances that are tokenized together."""
    device: str = "cpu"
    """Where the tokenizer runs."""
    precision: Precision = "fp32"
    """Of the tokenizer's matrix products; `auto`: bf16 where `device` has units for it."""
    drop_above: float | None = Field(default=None, gt=0)
    """Pairs whose codes the tokenizer's own CTC head reads with a larger word error rate are
    dropped, recorded ones too; the others carry theirs. None asks nobody. (``verify`` has the sound
    judged instead, of synthesized pairs, by whom it names.)"""


def build_pairs(config: PairsConfig) -> BuildReport:
    """Write samples with text, word times and codes [1, 1, T] into ``config.output/pairs-*.tar``.

    Raises:
        UserError: a source, voice, engine or tokenizer is missing, the folder holds another build,
            or too little of it is what people made.
    """
    config = config.model_copy(update={"precision": settle(config.precision, config.device)})
    kept_tokenizer(
        config.tokenizer, config.device
    )  # A broken one shows here, before hours of work.
    weights = checkpoint.digest(config.tokenizer)
    lines = plan_speech(config)
    config.guard.check(planned_shares(lines), "the planned pairs")
    parts = [
        lines[start : start + config.shard_size]
        for start in range(0, len(lines), config.shard_size)
    ]
    if config.drop_above is not None:
        transcribe(
            kept_tokenizer(config.tokenizer, config.device), ()
        )  # Likewise one that cannot read.
    judged = (config.verify, config.drop_above)
    plan = (lines, judged, config.shard_size, weights, config.batch, config.precision)
    make = functools.partial(_pairs, config=config)
    return run_shards(
        config.output,
        "pairs",
        parts,
        make,
        workers=config.workers,
        fingerprint=hashlib.sha256(repr(plan).encode()).hexdigest(),
        ray=config.ray,
        guard=config.guard,
        source=(line.text for line in lines),
    )


def tokenize(
    tokenizer: SpeechTokenizer,
    sounds: Sequence[npt.NDArray[np.float32]],
    batch: int = 16,
    precision: Precision = "fp32",
) -> list[npt.NDArray[np.uint16]]:
    """Sounds [S] at 24 kHz, of any lengths → their codes [T], the last filled up with silence."""
    device = next(tokenizer.parameters()).device
    size, rate = tokenizer.config.code_size, tokenizer.sample_rate
    heard = [resample(sound, SAMPLE_RATE, rate) for sound in sounds]
    if math.isinf(tokenizer.lookahead_ms):
        batch = 1  # Every code hears the whole row, and so what fills it up.
    found: dict[int, npt.NDArray[np.uint16]] = {}
    # Equals in length together.
    order = sorted(range(len(heard)), key=lambda at: (len(heard[at]), at))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        frames = [-(-len(heard[at]) // size) for at in chosen]
        pcm = np.zeros((len(chosen), 1, max(frames) * size), np.float32)
        for row, at in zip(pcm, chosen, strict=True):
            row[0, : len(heard[at])] = heard[at]
        with torch.inference_mode(), lowered(precision, device):
            codes = encode_whole(tokenizer, torch.from_numpy(pcm).to(device)).cpu().numpy()
        for row, at, count in zip(codes, chosen, frames, strict=True):
            found[at] = row[:count].astype(np.uint16)
    return [found[at] for at in range(len(heard))]


def _pairs(lines: Sequence[Line], config: PairsConfig) -> Iterator[Sample | Dropped]:
    heard: list[Sample] = []
    sounds: list[npt.NDArray[np.float32]] = []
    for made in speak_lines(lines, config.verify, config.synthesis):
        if isinstance(made, Dropped):
            yield made
        elif not made.text:
            yield Dropped(made.id, "nobody knows what is said in it")
        else:
            assert made.pcm is not None
            heard.append(made.model_copy(update={"pcm": None}))
            sounds.append(made.pcm[0])
    tokenizer = kept_tokenizer(config.tokenizer, config.device)
    codes = tokenize(tokenizer, sounds, config.batch, config.precision)
    read: Sequence[str | None] = [None] * len(codes)
    if config.drop_above is not None:
        read = transcribe(tokenizer, codes, precision=config.precision)
    for sample, row, text in zip(heard, codes, read, strict=True):
        update = {
            "codes": row[None, None],
            "coded_by": kept_fingerprint(config.tokenizer, config.device),
            "meta": {**sample.meta, "tokenizer": config.tokenizer},
        }
        if text is not None and config.drop_above is not None:
            update["wer"] = rate = wer(sample.text, text)
            if rate > config.drop_above:
                yield Dropped(sample.id, f"word error rate {rate:.2f} of {sample.text!r}")
                continue
        yield sample.model_copy(update=update)
