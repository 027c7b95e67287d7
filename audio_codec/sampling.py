"""Drawing tokens: temperature, top-k, top-p, and a noise that belongs to the session.

The draw of a row depends on its own seed and counter alone: the same conversation with the same
seed comes out the same alone, in a full batch, or after it was moved to another machine. torch's
generators cannot give that (one stream serves the whole batch), a hash of (seed, counter) can.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from audio_codec.layers import array, few_rows

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number


class Sampling(BaseModel):
    """How one stream is drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(0.8, ge=0.0)
    """0 takes the likeliest token."""
    top_k: int = Field(0, ge=0)
    """Only the k likeliest tokens; 0 means all."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Only the likeliest tokens that together reach this probability (arXiv 1904.09751)."""


def _mix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 on int64 (shifts are made logical by a mask)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """A number in (0, 1) for each pair: int64 [B], int64 [B] → float32 [B]."""
    bits = _mix(_mix(seed + _GOLDEN) + counter * _GOLDEN)
    return (((bits >> 41) & 0x7FFFFF).float() + 0.5) / 2**23


def normal(seed: Tensor, counter: Tensor) -> Tensor:
    """A standard normal number for each pair of two int64 shapes that broadcast, in float32.

    By inversion, so that each takes one uniform number; none is beyond ±5.3.
    """
    return torch.special.ndtri(uniform(seed, counter))


def sample(
    logits: Tensor,
    seed: Tensor,
    counter: Tensor,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    most: int | None = None,
) -> Tensor:
    """Draw one token a row: logits [B, V] → int64 [B].

    `temperature`, `top_k` and `top_p` are one for all or one a row ([B]); no row has more than the
    `most` likeliest tokens. By inverse transform on the probabilities in falling order, so one
    uniform number a row is enough.
    """
    if isinstance(top_k, int) and top_k > 0:
        most = min(top_k, most or top_k)
    if most is not None and most < logits.shape[1]:
        value, index = logits.float().topk(most, dim=1)  # far cheaper than a full sort
    else:
        value, index = logits.float().sort(dim=1, descending=True)
    if few_rows(value):
        return _draw_few(value, index, seed, counter, temperature, top_k, top_p)
    row = torch.as_tensor(temperature, device=logits.device, dtype=torch.float32).expand(len(value))
    p = torch.softmax(value / row.clamp(min=1e-4).unsqueeze(1), dim=1)
    if isinstance(top_k, Tensor):
        rank = torch.arange(p.shape[1], device=p.device)
        p = p * ((rank < top_k.unsqueeze(1)) | (top_k <= 0).unsqueeze(1))
    limit = torch.as_tensor(top_p, device=logits.device, dtype=torch.float32).view(-1, 1)
    p = p * (p.cumsum(1) - p < limit * p.sum(1, keepdim=True))
    reach = p.cumsum(1)
    target = uniform(seed, counter).unsqueeze(1) * reach[:, -1:]
    pick = (reach < target).sum(1, keepdim=True).clamp(max=p.shape[1] - 1)
    pick = torch.where(row.unsqueeze(1) <= 0, torch.zeros_like(pick), pick)
    return index.gather(1, pick).squeeze(1)


def _draw_few(value: Tensor, index: Tensor, *settings: Tensor | float) -> Tensor:
    """What `sample` draws of some rows of falling logits [B, V] and their tokens [B, V]."""
    from audio_codec import kernels

    kinds = (np.int64, np.int64, np.float32, np.int64, np.float32)
    rows = [_a_row(each, len(value), kind) for each, kind in zip(settings, kinds, strict=True)]
    drawn = torch.empty(len(value), dtype=torch.int64, device="cpu")
    kernels.draw(array(value), array(index), *rows, drawn.numpy())
    return drawn


def _a_row(setting: Tensor | float, rows: int, kind: Any) -> Any:
    """A number a row, of one for all or of one each."""
    if isinstance(setting, Tensor):
        wide = setting.float() if setting.is_floating_point() else setting
        return np.array(np.broadcast_to(wide.reshape(-1).numpy(), rows), kind)
    return np.full(rows, setting, kind)
