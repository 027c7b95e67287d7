"""Scaled dot-product attention behind one call, whatever kernel the machine offers.

Shapes: B batch, H query heads, G key/value heads (H a multiple of G), T queries, S keys,
D head size, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 128
"""Queries that are asked together: the fewer, the less is computed of what lies ahead."""
_KEPT = 2048**2
"""Scores a head beyond which keeping them for the backward pass takes too much memory."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Softmax attention, [B, H, T, D] × [B, G, S, D] → [B, H, T, D].

    `mask` is boolean and broadcasts to [B, H, T, S]; True may be seen. `causal` (T = S) hides what
    lies ahead and lets the backend skip it; a mask beside it must hide that too. On a CPU training
    goes `by_products`; else torch picks flash attention on a GPU and its fused kernel on a CPU. A
    grouped key is never copied out to the full number of heads.
    """
    grouped = key.shape[1] != query.shape[1]
    if query.device.type == "cpu":
        small = query.shape[2] * key.shape[2] <= _KEPT
        # The fused kernel goes through the heads of a group one by one.
        if (query.requires_grad and small) or (grouped and query.dtype == torch.bfloat16):
            return by_products(query, key, value, mask, causal)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=grouped,
    )


def by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """The same as `attend`, as matrix products with a backward pass of their own.

    Torch's fused CPU kernel computes the scores once more in its backward pass, and has that slow
    in bfloat16. Here they are kept, and under `causal` a block of queries asks no key beyond its
    own: 0.7 of the time at 750 positions in float32, and at the 8 of a depth transformer as well.
    Nor does it ask one before the first that its mask lets any of it see: most of them where short
    documents are packed into a row.
    """
    with torch.autocast(query.device.type, enabled=False):  # which would widen the softmax
        return _ByProducts.apply(query, key, value, mask, causal)  # type: ignore[no-untyped-call]


class _ByProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        batch, heads, time, size = query.shape
        groups, keys = key.shape[1], key.shape[2]
        ctx.step, ctx.scale = (_BLOCK if causal else time), size**-0.5
        if mask is not None:
            mask = mask.expand(*mask.shape[:-2], time, keys)
        scaled = query * ctx.scale
        out = torch.empty_like(query)
        kept = []
        ctx.seen = []
        for begin in range(0, time, ctx.step):
            end = min(time, begin + ctx.step)
            seen = _seen(mask, begin, end) if causal else slice(0, keys)
            ctx.seen.append(seen)
            # The heads of a group ask the same keys: as one taller matrix.
            asked = scaled[:, :, begin:end].reshape(batch, groups, -1, size)
            scores = asked @ key[:, :, seen].transpose(-1, -2)  # [B, G, H / G · block, seen]
            by_head = scores.view(batch, heads, end - begin, -1)
            if mask is not None:
                by_head += _bias(mask[..., begin:end, seen], scores.dtype)
            elif causal:
                here = torch.ones(end - begin, end - begin, dtype=torch.bool, device=query.device)
                by_head[..., begin:] += _bias(here.tril_(), scores.dtype)
            shares = torch.softmax(scores, dim=-1)
            mixed = shares @ value[:, :, seen]
            out[:, :, begin:end] = mixed.view(batch, heads, end - begin, size)
            kept.append(shares)
        ctx.save_for_backward(scaled, key, value, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled, key, value, *kept = ctx.saved_tensors
        batch, heads, time, size = scaled.shape
        groups = key.shape[1]
        query_grad = torch.empty_like(scaled)
        key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
        for number, (shares, seen) in enumerate(zip(kept, ctx.seen, strict=True)):
            begin = number * ctx.step
            end = min(time, begin + ctx.step)
            asked, back = (
                x[:, :, begin:end].reshape(batch, groups, -1, size) for x in (scaled, grad)
            )
            value_grad[:, :, seen] += shares.transpose(-1, -2) @ back
            slope = back @ value[:, :, seen].transpose(-1, -2)
            slope = torch._softmax_backward_data(slope, shares, -1, shares.dtype)
            found = (slope @ key[:, :, seen]).view(batch, heads, end - begin, size)
            torch.mul(found, ctx.scale, out=query_grad[:, :, begin:end])
            key_grad[:, :, seen] += slope.transpose(-1, -2) @ asked
        return query_grad, key_grad, value_grad, None, None


def _seen(mask: Tensor | None, begin: int, end: int) -> slice:
    """The keys that a causal block of queries asks: from the first that any of them may see."""
    if mask is None:
        return slice(0, end)
    found = mask[..., begin:end, :end].flatten(0, -2).any(0).nonzero()
    return slice(int(found[0]) if len(found) else 0, end)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores that `mask` hides where it is False."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, float("-inf")
    )


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
