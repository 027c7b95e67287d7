"""Scaled dot-product attention behind one call, whatever kernel the machine offers.

Shapes: B batch, H query heads, G key/value heads (H a multiple of G), T queries, S keys,
D head size, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Softmax attention, [B, H, T, D] × [B, G, S, D] → [B, H, T, D].

    `mask` is boolean and broadcasts to [B, H, T, S]; True may be seen. `causal` (only without a
    mask, T = S) lets the backend skip the upper triangle. Torch picks flash attention on a GPU and
    its fused CPU kernel otherwise; a grouped key is never copied out to the full number of heads.
    """
    grouped = key.shape[1] != query.shape[1]
    in_turns = query.requires_grad or grouped  # goes through the heads of a group one by one
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and in_turns:
        return by_products(query, key, value, mask, causal)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=grouped,
    )


def by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """The same as `attend`, written out as two matrix products.

    Torch's fused CPU kernel has a slow backward in bfloat16 (5 times slower than this at 100
    positions, 1.3 times at 750), while matrix products run on the processor's own bfloat16 units.
    """
    batch, heads, time, size = query.shape
    groups, keys = key.shape[1], key.shape[2]
    if causal:
        square = torch.ones(time, keys, dtype=torch.bool, device=query.device)
        mask = square.tril()
    # The heads of a group ask the same keys: as one taller matrix.
    folded = (query * size**-0.5).reshape(batch, groups, -1, size)
    scores = folded @ key.transpose(-1, -2)  # [B, G, H / G · T, S]
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device)
        scores = scores.view(batch, heads, time, keys) + bias.masked_fill_(~mask, float("-inf"))
        scores = scores.view(batch, groups, -1, keys)
    mixed = torch.softmax(scores, dim=-1, dtype=scores.dtype) @ value
    return mixed.view(batch, heads, time, size)


@dataclass(frozen=True, slots=True)
class Documents:
    """Where documents lie that stand one after the other, through all rows of a batch."""

    bounds: Tensor  # [N + 1] int32: the first position of each, counted over B·T, and B·T
    longest: int

    @classmethod
    def of(cls, fresh: Tensor) -> Documents:
        """From where documents begin: bool [B, T]; a row always begins one."""
        begins = fresh.clone()
        begins[:, 0] = True
        first = begins.flatten().nonzero().squeeze(1)
        bounds = torch.cat((first, first.new_tensor([begins.numel()]))).to(torch.int32)
        return cls(bounds, int(bounds.diff().max()))


def attend_documents(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None = None
) -> Tensor:
    """Causal attention inside each document, [B, H, T, D] × [B, G, T, D] → [B, H, T, D].

    On a GPU in half precision by torch's variable-length flash attention, which never looks at the
    blocks between documents or outside the window. Anywhere else document by document, slow and
    obvious: there `attend` with a mask is what to use, and gives the same numbers.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # [B T, H, D]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        bounds, longest = documents.bounds, documents.longest
        sides = (-1 if window is None else window - 1, 0)
        q, k, v = flat
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=sides)
        assert isinstance(out, Tensor)
    else:
        sizes = documents.bounds.diff().tolist()
        done = []
        for q, k, v in zip(*(x.split(sizes) for x in flat), strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            back = torch.arange(q.shape[2], device=q.device)
            back = back[:, None] - back
            mask = (back >= 0) & (back < (window or len(back)))
            done.append(attend(q, k, v, mask)[0].transpose(0, 1))
        out = torch.cat(done)
    return out.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)
