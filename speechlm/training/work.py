"""How much work a step is: what it sees, how many FLOPs that takes, how many a device can do.

Counted as is usual for utilization (PaLM, arXiv 2204.02311): 2 FLOPs for each weight of a matrix
that a position goes through, 4·D for each key that it sees in each head, three times that for
training; what is computed again in a backward pass is not counted. Under a causal mask a position
sees but what came before it, within the window.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from audio_codec.precision import has_bf16
from audio_codec.transformer import Transformer
from speechlm.model import Batch, SpeechLM
from speechlm.streams import Streams


@dataclass(frozen=True, slots=True)
class Counts:
    """What one or more batches hold."""

    columns: int = 0
    frames: int = 0
    """Columns of which the depth transformer learns codes; twice where it learns both voices'."""
    tokens: int = 0
    """Predictions that are learned, over all streams."""
    audio: int = 0
    """Columns with sound in them, 80 ms each."""

    @classmethod
    def of(cls, batch: Batch, streams: Streams) -> Counts:
        """Counts a batch."""
        learned = batch.weights > 0
        heard = batch.targets[:, streams.own.start : streams.user.stop] >= 0
        return cls(
            columns=learned[:, 0].numel(),
            frames=sum(int(learned[:, v].any(1).sum()) for v in (streams.own, streams.user)),
            tokens=int(learned.sum()),
            audio=int(heard.any(1).sum()),
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.columns + other.columns,
            self.frames + other.frames,
            self.tokens + other.tokens,
            self.audio + other.audio,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """Forward FLOPs of a model."""

    column: float
    """Of one column: temporal transformer and text heads."""
    frame: float
    """Of the codes of one column: depth transformer and its heads."""

    def training(self, columns: float, frames: float) -> float:
        """FLOPs of forward and backward."""
        return 3 * (self.column * columns + self.frame * frames)


def work(model: SpeechLM, length: int) -> Work:
    """The work of a model on documents of so many columns, also of one on the meta device."""
    column = _transformer(model.temporal, length) + 2 * model.text_head.weight.numel()
    if model.heard_head is not None:
        column += 2 * model.heard_head.weight.numel()
    depth = model.depth
    frame = depth.k * _transformer(depth.transformer, depth.k)
    frame += 2 * _matrices(depth.inputs) + 2 * _matrices(depth.heads)
    return Work(column, frame)


def _transformer(model: Transformer, length: int) -> float:
    """FLOPs of one position, the mean over `length` of them."""
    config = model.config
    window = min(config.window or length, length)
    seen = window - window * (window - 1) / (2 * length)  # keys, the mean over positions
    head = config.dim // config.heads
    return 2 * _matrices(model.blocks) + 4 * config.layers * config.heads * head * seen


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def body_parameters(model: SpeechLM) -> int:
    """Number of parameters without the tables of embeddings."""
    tables: tuple[nn.Module | None, ...] = (
        model.text,
        model.codes,
        model.depth.text,
        model.depth.codes,
    )
    embedding = sum(p.numel() for table in tables if table for p in table.parameters())
    return sum(p.numel() for p in model.parameters()) - embedding


DENSE_BF16 = {
    # TFLOP/s by the makers' data sheets, without sparsity.
    "B200": 2250.0,
    "H200": 989.5,
    "H100 PCIe": 756.0,
    "H100": 989.5,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L4": 121.0,
    "4090": 165.2,
    "3090": 71.0,
}
"""Peaks of GPUs whose name holds these words; the first that fits counts."""


@lru_cache(maxsize=8)
def peak_flops(device: torch.device, precision: str = "bf16") -> float:
    """FLOP/s that a device could do at best: a GPU's by its maker, else measured on a product.

    In float32, and on a device that is not in the list, the largest square product that takes some
    tenths of a second is what counts; in float32 too where there are no units for bf16.
    """
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for words, tera in DENSE_BF16.items():
            if words in name:
                return tera * 1e12
    lower = precision == "bf16" and has_bf16(device)
    dtype = torch.bfloat16 if lower else torch.float32
    side = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator().manual_seed(0)  # the run's own is part of its checkpoint
    a = torch.randn(side, side, generator=generator).to(device, dtype)
    best = 0.0
    for _ in range(4):
        best = max(best, 2 * side**3 / _seconds(a))
    return best


def _seconds(a: Tensor) -> float:
    _finish(a)
    began = time.perf_counter()
    _finish(a @ a)
    return time.perf_counter() - began


def _finish(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
