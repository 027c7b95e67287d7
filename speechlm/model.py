"""The language model: a temporal transformer over frames, a depth transformer inside a frame.

After RQ-Transformer (arXiv 2203.01941) and Moshi (arXiv 2410.00037):

    column t−1 ──sum of embeddings──▶ temporal ──▶ hidden ──▶ text t, heard t
                                                     │
                                     text t ─────────┴──▶ depth ──▶ own 0 ▶ own 1 ▶ … ▶ own K−1

`text` and `heard` come from two heads on the temporal hidden. The depth transformer then draws the
own codes of the column one codebook after the other; its input at a step is a linear map of the
temporal hidden, one a codebook, plus the embedding of the token drawn just before (text first). It
needs no positions: the map already tells the steps apart.

*Roles.* Both speakers share the code tables, so that the speech of one teaches about the other; so
do the two text streams. A role is a learned vector that *multiplies* the embedding: an added one
would leave the sum over both speakers the same when they swap what they say.

Shapes: B batch, S streams, K codebooks, T columns, N gathered columns, C width, V vocabulary,
F factors (an FSQ code is embedded as the sum over its factors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from audio_codec.layers import Linear
from audio_codec.sampling import Sampling
from audio_codec.transformer import Transformer, TransformerConfig, TransformerState
from speechlm.streams import ABSENT, EPAD, PAD, Streams


class LMSampling(BaseModel):
    """How the streams are drawn; `heard` always takes its likeliest piece."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Sampling = Sampling(temperature=0.7, top_k=25)
    audio: Sampling = Sampling(temperature=0.8, top_k=250)
    repetition_penalty: float = Field(1.0, ge=1.0)
    """Guard rail: divides the odds of each of the last 16 text pieces; 1 switches it off."""


class LMConfig(BaseModel):
    """Shape of the language model; what a checkpoint's `config.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    streams: Streams
    temporal: TransformerConfig
    """Over frames; its window is how far the model remembers (750 frames are a minute)."""
    depth: TransformerConfig
    """Over the codebooks of one frame; `rope` and `window` are set by the model."""
    codec: str
    """The codec of the codes it was trained on: a folder in the checkpoint, or a name or path."""
    predicts_user: bool = False
    """Whether it can be trained to predict the user's codes too; in a conversation they are heard,
    not drawn."""
    sampling: LMSampling = LMSampling()
    """How it is drawn unless a conversation is told otherwise."""


class LossConfig(BaseModel):
    """How the three kinds of prediction are weighed against each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: float = Field(1.0, ge=0)
    heard: float = Field(0.5, ge=0)
    audio: float = Field(1.0, ge=0)
    z: float = Field(0.0, ge=0)
    """Weight of log² Z, which keeps logits from drifting; 1e-4 in PaLM (arXiv 2204.02311)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed columns. What is seen (`inputs`) and what is learned (`weights`) are apart."""

    inputs: Tensor  # [B, S, T] int64: the column before each target, ABSENT = zero embedding
    targets: Tensor  # [B, S, T] int64
    weights: Tensor  # [B, S, T] float32, 0 = not learned
    segments: Tensor | None  # [B, T] int64: document of a column; None: one document a row

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.inputs.to(device),
            self.targets.to(device),
            self.weights.to(device),
            None if self.segments is None else self.segments.to(device),
        )


class TokenEmbedding(nn.Module):
    """Embeds the tokens of some codebooks; each code is a sum over its factors.

    Code c with factor sizes L_f has digits (c // Π_{g<f} L_g) mod L_f. An id equal to a codebook's
    size is its start id and has a row of its own; a negative id is absent and embeds as zero.
    """

    owner: Tensor
    stride: Tensor
    modulus: Tensor
    offset: Tensor
    total: Tensor
    start_row: Tensor

    def __init__(self, codebooks: Sequence[Sequence[int]], dim: int, std: float) -> None:
        super().__init__()
        self.factors = tuple(len(factors) for factors in codebooks)
        tables = sum(sum(factors) for factors in codebooks)
        self.absent_row = tables + len(codebooks)
        self.weight = nn.Parameter(torch.randn(self.absent_row + 1, dim) * std)
        with torch.no_grad():
            self.weight[self.absent_row] = 0
        columns: list[tuple[int, int, int, int, int, int]] = []
        offset = 0
        for number, factors in enumerate(codebooks):
            stride, total = 1, 1
            for factor in factors:
                total *= factor
            for place, factor in enumerate(factors):
                start = tables + number if place == 0 else self.absent_row
                columns.append((number, stride, factor, offset, total, start))
                stride, offset = stride * factor, offset + factor
        fields = zip(*columns, strict=True)
        names = ("owner", "stride", "modulus", "offset", "total", "start_row")
        for name, values in zip(names, fields, strict=True):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def rows(self, tokens: Tensor) -> Tensor:
        """Rows of the table to add up: [..., K] → [..., F]."""
        code = tokens[..., self.owner]
        row = self.offset + code.clamp(min=0) // self.stride % self.modulus
        row = torch.where(code == self.total, self.start_row, row)
        return row.masked_fill(code < 0, self.absent_row)

    def forward(self, tokens: Tensor) -> Tensor:
        """Sum over the codebooks: [..., K] → [..., C]."""
        rows = self.rows(tokens)
        flat = F.embedding_bag(
            rows.flatten(0, -2), self.weight, mode="sum", padding_idx=self.absent_row
        )
        return flat.view(*tokens.shape[:-1], -1)

    def each(self, tokens: Tensor) -> Tensor:
        """One embedding a codebook: [N, K] → [N, K, C]."""
        rows = self.rows(tokens)
        bounds = torch.tensor((0, *self.factors[:-1]), device=rows.device).cumsum(0)
        bags = torch.arange(len(rows), device=rows.device)[:, None] * rows.shape[1] + bounds
        flat = F.embedding_bag(
            rows.flatten(), self.weight, bags.flatten(), mode="sum", padding_idx=self.absent_row
        )
        return flat.view(*tokens.shape, -1)

    def one(self, tokens: Tensor, codebook: int) -> Tensor:
        """The embedding of one codebook's tokens: [N] → [N, C]."""
        first = sum(self.factors[:codebook])
        part = slice(first, first + self.factors[codebook])
        row = self.offset[part] + tokens[:, None] // self.stride[part] % self.modulus[part]
        row = torch.where(tokens[:, None] == self.total[part], self.start_row[part], row)
        return F.embedding(row, self.weight).sum(1)


# Logits held at a time: 8 MB of float32, which a processor's cache can hold.
_BLOCK = 2**21


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of a linear head, gradients and all, a block of rows at a time.

    The gradient of softmax cross entropy needs nothing but the logits, so it is taken in the
    forward pass while a block of them is at hand: the [N, V] logits never exist as a whole, and
    nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, target: Tensor, scale: Tensor, z: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        matrix = weight.to(dtype)
        nll = torch.empty_like(scale)
        penalty = torch.zeros((), dtype=scale.dtype, device=scale.device)
        hit = torch.empty_like(target, dtype=torch.bool)
        x_grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        block = max(1, _BLOCK // len(weight))
        with torch.autocast(kind, enabled=False):
            for begin in range(0, len(x), block):
                part = slice(begin, begin + block)
                rows = x[part].to(dtype)
                logits = rows @ matrix.T
                logits = logits if logits.dtype == torch.float64 else logits.float()
                top = logits.amax(1)
                right = logits.gather(1, target[part, None]).squeeze(1)
                hit[part] = right >= top
                p = (logits - top[:, None]).exp_()
                mass = p.sum(1)
                log_z = mass.log() + top
                nll[part] = log_z - right
                slope = scale[part]
                if z > 0:
                    penalty += z * (scale[part] * log_z.square()).sum()
                    slope = slope * (1 + 2 * z * log_z)
                if x_grad is not None or weight_grad is not None:
                    p *= (slope / mass)[:, None]
                    p.scatter_add_(1, target[part, None], -scale[part, None])
                    error = p.to(dtype)
                    if x_grad is not None:
                        x_grad[part] = error @ matrix
                    if weight_grad is not None:
                        weight_grad += error.T @ rows
        ctx.save_for_backward(x_grad, weight_grad)
        ctx.mark_non_differentiable(nll, hit)
        return (nll * scale).sum() + penalty, nll, hit

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if saved is None else grad * saved for saved in ctx.saved_tensors)
        return (*grads, None, None, None)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, scale: Tensor, z: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ scale·(nll + z·log² Z) of a bias-free head without ever holding its logits whole.

    x [N, C], weight [V, C], target int64 [N], scale float32 [N] → the sum (carries the gradient),
    nll [N], whether the likeliest token was right [N].
    """
    return _LinearCrossEntropy.apply(x, weight, target, scale, z)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Picked:
    """Which rows take part, filled up with the first of them to one of few sizes.

    A CPU's matrix kernels are compiled for each size anew: with every number of rows that chance
    brings, that would be done at each step.
    """

    index: Tensor  # [N] int64
    count: int
    """Rows that take part; the rest of N is filling."""

    @classmethod
    def of(cls, mask: Tensor) -> _Picked:
        """The rows where `mask` [M] holds."""
        index = mask.nonzero().squeeze(1)
        return cls(torch.cat((index, index[:1].expand(-len(index) % 256))), len(index))

    def masked(self, weights: Tensor) -> Tensor:
        """The weights [M, ...] of the rows: [N, ...], nothing for the filling."""
        picked = weights[self.index]
        picked[self.count :] = 0
        return picked


class DepthModel(nn.Module):
    """Draws the own codes of one column, one codebook after the other.

    To learn the user's codes too it is given the hidden times a role of theirs.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        streams, dim = config.streams, config.depth.dim
        self.k = streams.k
        self.inputs = Linear(config.temporal.dim, self.k * dim, bias=False)
        self.text = TokenEmbedding(((streams.text_size,),), dim, std=0.3)
        # The last codebook is fed to no step.
        self.codes = TokenEmbedding(streams.codebooks[:-1], dim, std=0.3) if self.k > 1 else None
        shape = config.depth.model_copy(update={"rope": False, "window": self.k})
        self.transformer = Transformer(shape)
        self.heads = nn.ParameterList(
            torch.randn(size, dim) * (0.5 * dim**-0.5) for size in streams.code_sizes
        )
        self.user_role: nn.Parameter | None = None
        if config.predicts_user:
            self.user_role = nn.Parameter(torch.randint(0, 2, (config.temporal.dim,)) * 2.0 - 1)

    def forward(self, hidden: Tensor, text: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced outputs, before the heads.

        hidden [N, C] of the temporal transformer, text [N], codes [N, K] of the same column
        → [N, K, depth width].
        """
        x = self.inputs(hidden).view(len(hidden), self.k, -1)
        previous = self.text(text[:, None])[:, None]
        if self.codes is not None:
            previous = torch.cat((previous, self.codes.each(codes[:, :-1])), dim=1)
        return self.transformer(x + previous)

    def logits(self, output: Tensor, codebook: int) -> Tensor:
        """[..., depth width] → [..., V of that codebook]."""
        return F.linear(output, self.heads[codebook])


@dataclass(frozen=True, slots=True)
class _Voice:
    """The columns of a batch with a code of one speaker to learn, as the depth transformer sees
    them.
    """

    hidden: Tensor  # [N, C]
    text: Tensor  # [N] the token before the codes
    codes: Tensor  # [N, K]
    weights: Tensor  # [N, K]


@dataclass(frozen=True, slots=True)
class Losses:
    """What one batch gives: the number to minimize, and what it is made of."""

    total: Tensor
    """Scalar; carries the gradient."""
    parts: dict[str, Tensor]
    """Detached means: nats a token for each kind of prediction, accuracies."""
    counts: dict[str, Tensor]
    """What each of these is the mean of, so that those of several batches can be put together."""


class SpeechLM(nn.Module):
    """Temporal and depth transformers, embeddings and heads."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        streams, dim = config.streams, config.temporal.dim
        self.config = config
        self.streams = streams
        self.text = TokenEmbedding(((streams.text_size,),), dim, std=0.1)
        self.codes = TokenEmbedding(streams.codebooks, dim, std=0.05)
        # Random signs: the two roles start orthogonal and of equal size.
        self.user_role = nn.Parameter(torch.randint(0, 2, (dim,)) * 2.0 - 1)
        self.temporal = Transformer(config.temporal)
        self.text_head = Linear(dim, streams.text_size, bias=False)
        self.heard_role: nn.Parameter | None = None
        self.heard_head: Linear | None = None
        if streams.heard:
            self.heard_role = nn.Parameter(torch.randint(0, 2, (dim,)) * 2.0 - 1)
            self.heard_head = Linear(dim, streams.text_size, bias=False)
        self.depth = DepthModel(config)

    def embed(self, columns: Tensor) -> Tensor:
        """Columns [B, S, T] → [B, T, C]."""
        tokens = columns.transpose(1, 2)
        streams = self.streams
        x = self.text(tokens[..., :1]) + self.codes(tokens[..., streams.own])
        x = torch.addcmul(x, self.codes(tokens[..., streams.user]), self.user_role)
        if self.heard_role is not None:
            heard = self.text(tokens[..., streams.heard_index :])
            x = torch.addcmul(x, heard, self.heard_role)
        return x

    def forward(
        self,
        columns: Tensor,
        state: TransformerState | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Hidden of the column after each given one: [B, S, T] → [B, T, C].

        Streaming with a state; offline, `segments` ([B, T]) keeps packed documents apart.
        """
        return self.temporal(self.embed(columns), state, segments)

    def new_state(self, batch: int, max_chunk: int = 1) -> TransformerState:
        """State of the temporal transformer at the start of `batch` conversations."""
        return self.temporal.new_state(batch, max_chunk)

    def loss(self, batch: Batch, config: LossConfig | None = None) -> Losses:
        """Weighted cross entropy of a batch.

        Each kind of prediction (text, heard, audio) is a weighted mean over what it has in the
        batch. The depth transformer runs only on columns with a code to learn; the rest of the
        columns costs nothing there.
        """
        config = config or LossConfig()
        streams = self.streams
        hidden = self(batch.inputs, segments=batch.segments)  # [B, T, C]
        parts: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        total = hidden.new_zeros((), dtype=torch.float32)
        heads = [("text", streams.text_index, self.text_head, config.text)]
        if self.heard_head is not None:
            heads.append(("heard", streams.heard_index, self.heard_head, config.heard))
        for name, stream, head, share in heads:
            weight = batch.weights[:, stream].flatten()
            picked = _Picked.of(weight > 0)
            if share == 0 or picked.count == 0:
                continue
            scale = picked.masked(weight)
            counts[name] = scale.sum()
            scale = scale / counts[name]
            target = batch.targets[:, stream].flatten()[picked.index]
            loss, nll, hit = linear_cross_entropy(
                hidden.flatten(0, 1)[picked.index], head.weight, target, scale, config.z
            )
            total = total + share * loss
            parts[name] = (nll * scale).sum()
            target, nll, hit = (x[: picked.count] for x in (target, nll, hit))
            said = (target != PAD) & (target != EPAD)
            for part, of, mask in (
                ("piece", nll, said),
                ("accuracy", hit, said),
                ("pad", nll, ~said),
            ):
                if bool(mask.any()):
                    parts[f"{name}_{part}"] = of[mask].to(nll.dtype).mean()
                    counts[f"{name}_{part}"] = mask.sum()

        voices = {"": self._voice(batch, hidden, streams.own, streams.text_index)}
        if self.depth.user_role is not None:
            before = streams.heard_index if streams.heard else None
            theirs = hidden * self.depth.user_role
            voices["user_"] = self._voice(batch, theirs, streams.user, before)
        there = {name: voice for name, voice in voices.items() if voice is not None}
        if config.audio > 0 and there:
            total = total + config.audio * self._audio_loss(there, config.z, parts, counts)
        return Losses(total, parts, counts)

    def _voice(
        self, batch: Batch, hidden: Tensor, side: slice, before: int | None
    ) -> _Voice | None:
        """The columns with a code of a `side` to learn; None where there are none.

        hidden [B, T, C]; `before`: the stream whose token comes before the codes.
        """
        own = batch.weights[:, side].transpose(1, 2).flatten(0, 1)  # [B T, K]
        picked = _Picked.of((own > 0).any(-1))
        if picked.count == 0:
            return None
        codes = batch.targets[:, side].transpose(1, 2).flatten(0, 1)[picked.index]
        if before is None:
            text = codes.new_full((len(codes),), ABSENT)
        else:
            text = batch.targets[:, before].flatten()[picked.index]
        return _Voice(hidden.flatten(0, 1)[picked.index], text, codes, picked.masked(own))

    def _audio_loss(
        self,
        voices: dict[str, _Voice],
        z: float,
        parts: dict[str, Tensor],
        counts: dict[str, Tensor],
    ) -> Tensor:
        """Weighted mean over all codes of all voices; puts the means of each into `parts`."""
        sizes = [len(voice.codes) for voice in voices.values()]
        if len(voices) == 1:
            (all_of,) = voices.values()
        else:
            fields = ("hidden", "text", "codes", "weights")
            all_of = _Voice(
                *(torch.cat([getattr(v, name) for v in voices.values()]) for name in fields)
            )
        output = self.depth(all_of.hidden, all_of.text, all_of.codes)
        weights = all_of.weights / all_of.weights.sum()
        total = output.new_zeros((), dtype=torch.float32)
        detail: dict[str, list[Tensor]] = {name: [] for name in voices}
        for codebook, head in enumerate(self.depth.heads):
            learned = weights[:, codebook] > 0
            # A code in the delay gap (start, absent) has no weight; 0 keeps it in range.
            target = all_of.codes[:, codebook].masked_fill(~learned, 0)
            loss, nll, hit = linear_cross_entropy(
                output[:, codebook], head, target, weights[:, codebook], z
            )
            total = total + loss
            for name, mask, one_nll, one_hit in zip(
                voices, learned.split(sizes), nll.split(sizes), hit.split(sizes), strict=True
            ):
                if not bool(mask.any()):
                    continue
                if codebook == 0:
                    found = {"semantic": one_nll, "semantic_accuracy": one_hit.float()}
                else:
                    found = {f"acoustic/{codebook}": one_nll}
                    detail[name].append(one_nll[mask])
                for part, of in found.items():
                    parts[name + part], counts[name + part] = of[mask].mean(), mask.sum()
        for name, each in detail.items():
            if each:
                every = torch.cat(each)
                parts[f"{name}acoustic"] = every.mean()
                counts[f"{name}acoustic"] = mask.new_tensor(len(every), dtype=torch.int64)
        return total
