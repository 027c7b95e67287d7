"""How fast the language model trains, against the same model in another library, in turns.

    alone     ours │ ours │ ours │ …                             for tokens a second, loader_busy
    round 1   ours │ transformers │ transformers, gathered       one step of training each
    round 2   ours │ …

A step is all of it: forward in bf16 autocast where the machine has units for it (`--precision` says
otherwise), loss, backward, clipping, AdamW.
A ratio is taken within its round, so that whatever else the machine does slows all alike.

*The peer* is this model with its transformers, norms and heads written with `transformers`' Moshi
classes: `MoshiModel` over time, `MoshiDecoderLayer` over codebooks (one set of weights for all of
them, as here). Embeddings, attention kernel, optimizer, batch and losses are shared; a test holds
it to the same loss for the same weights. It goes over every column in the depth transformer, as
`MoshiForConditionalGeneration` does when there is sound to learn; "gathered", it is told which
columns have something to learn.

    speechlm bench train --against transformers

on conversations of noise; on what a recipe trains with, its shares and masks, from its shards:

    speechlm bench train --against transformers --recipe configs/lm/shipped.yaml

and of a thousand million parameters, for a GPU:

    speechlm bench train --against transformers --rows 4 --length 4096 streams.text_size=32000 \
        temporal.dim=2048 temporal.layers=16 temporal.heads=16 temporal.hidden=5632 \
        temporal.window=4096 depth.dim=1024 depth.layers=6 depth.heads=16 depth.hidden=2816

Shapes: B rows, T columns, K codebooks, N picked columns, C width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_codec.attention import attend
from audio_codec.errors import UserError
from audio_codec.memory import tune_allocator
from audio_codec.transformer import TransformerConfig
from speechlm.data import Mixture, Packer
from speechlm.documents import Dialogue, Document, WeightConfig, dialogue_document
from speechlm.evaluation.report import Metric, bootstrap_median
from speechlm.model import Batch, LMConfig, LossConfig, SpeechLM
from speechlm.streams import PAD, Streams
from speechlm.training.loader import Loader
from speechlm.training.optimize import OptimizerConfig, clip_gradients
from speechlm.training.run import Autocast, autocast_of
from speechlm.training.work import Counts, peak_flops, work

PEERS: Final = ("transformers",)
KERNEL: Final = "speechlm"
"""Name under which `transformers` finds our attention."""

Losses = Callable[[Batch], Tensor]
Step = list[tuple[float, Batch]]
"""What a step is made of: batches with their shares of its loss."""


# ------------------------------------------------------------------------------------------- data


class Talks:
    """Conversations of noise, a row long each, the assistant speaking two fifths of the time."""

    def __init__(self, streams: Streams, frames: int) -> None:
        self.streams, self.frames = streams, frames

    def document(self, lane: int, number: int) -> Document:
        """Document `number` of a lane."""
        rng = np.random.default_rng((lane, number))
        frames, streams = self.frames, self.streams
        turns = np.repeat(np.arange(-(-frames // 50)) % 5 < 2, 50)[:frames]
        codes = [rng.integers(0, size, (2, frames)) for size in streams.code_sizes]
        pieces = rng.integers(7, streams.text_size, (2, frames)).astype(np.int32)
        said = np.where(turns & (rng.random(frames) < 0.3), pieces[0], PAD)
        heard = np.where(~turns & (rng.random(frames) < 0.3), pieces[1], PAD)
        near = np.stack((turns, ~turns))
        dialogue = Dialogue(np.stack(codes, 1).astype(np.uint16), said, heard, near)
        made = dialogue_document(dialogue, streams, WeightConfig(), rng)
        return replace(made, whole=True)


class _Noise:
    """Conversations of noise, as the loader wants them."""

    def __init__(self, streams: Streams, rows: int, length: int) -> None:
        self.packer = Packer(Talks(streams, length), streams, rows, length)

    def next(self) -> Step:
        return [(1.0, self.packer.next())]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("a bench does not go back")


# ------------------------------------------------------------------------------------------- peer


def _kernel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Our attention as `transformers` calls one: [B, H, T, D] → [B, T, H, D]."""
    mask = getattr(module.config, "documents", None)
    return attend(query, key, value, mask, causal=True).transpose(1, 2), None


def _no_mask(*args: Any, **options: Any) -> None:
    """The kernel is causal, and knows of documents."""


class MoshiPeer(SpeechLM):
    """The same model, its transformers written with `transformers`' Moshi classes."""

    def __init__(self, config: LMConfig, length: int, gathered: bool = False) -> None:
        """Rows may have up to `length` columns, no more than the model's window."""
        from transformers import AttentionInterface, MoshiConfig, MoshiDepthConfig, MoshiModel
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.models.moshi.modeling_moshi import MoshiDecoderLayer, MoshiRMSNorm

        super().__init__(config)
        assert length <= (config.temporal.window or length), "the peer knows no window"
        AttentionInterface.register(KERNEL, _kernel)
        AttentionMaskInterface.register(KERNEL, _no_mask)
        self.gathered = gathered
        del self.temporal, self.depth.transformer
        shape: Any = MoshiConfig(
            vocab_size=1, max_position_embeddings=length, **_shape(config.temporal)
        )
        inner: Any = MoshiDepthConfig(**_shape(config.depth))
        shape._attn_implementation = inner._attn_implementation = KERNEL
        self.shape = shape
        self.body: Any = MoshiModel(shape)
        del self.body.embed_tokens  # nothing looks a word up there
        self.layers = nn.ModuleList(
            MoshiDecoderLayer(inner, number, use_flexible_linear=False, use_rope=False)
            for number in range(config.depth.layers)
        )
        self.norm = MoshiRMSNorm(config.depth.dim, eps=1e-6)

    def objective(self, batch: Batch, losses: LossConfig) -> Tensor:
        """The loss of `SpeechLM.loss`."""
        streams, depth = self.streams, self.depth
        self.shape.documents = None
        if batch.segments is not None:
            document = batch.segments[:, None]
            same = document[..., None] == document[..., None, :]
            self.shape.documents = same.tril()
        hidden = self.body(inputs_embeds=self.embed(batch.inputs)).last_hidden_state
        heads: list[tuple[nn.Linear, int, float]] = [
            (self.text_head, streams.text_index, losses.text)
        ]
        if self.heard_head is not None:
            heads.append((self.heard_head, streams.heard_index, losses.heard))
        total = hidden.new_zeros(())
        for head, row, share in heads:
            weight = batch.weights[:, row].flatten()
            loss = _loss(head(hidden).flatten(0, 1), batch.targets[:, row].flatten(), weight)
            total = total + share * loss / weight.sum()
        weights = batch.weights[:, streams.own].transpose(1, 2).flatten(0, 1)  # [B T, K]
        if not bool((weights > 0).any()):
            return total
        codes = batch.targets[:, streams.own].transpose(1, 2).flatten(0, 1)
        text = batch.targets[:, streams.text_index].flatten()
        hidden = hidden.flatten(0, 1)
        if self.gathered:
            index = (weights > 0).any(-1).nonzero().squeeze(1)
            weights, codes, text, hidden = (x[index] for x in (weights, codes, text, hidden))
        x = depth.inputs(hidden).view(len(hidden), depth.k, -1)
        previous = depth.text(text[:, None])[:, None]
        if depth.codes is not None:
            previous = torch.cat((previous, depth.codes.each(codes[:, :-1])), dim=1)
        x = x + previous
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        whole = weights.sum()
        for book in range(depth.k):
            loss = _loss(depth.logits(x[:, book], book), codes[:, book], weights[:, book])
            total = total + losses.audio * loss / whole
        return total


def _shape(config: TransformerConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "ffn_dim": 2 * config.mlp_hidden,  # both branches of the gate
        "rms_norm_eps": 1e-6,
        "sliding_window": config.window or 3000,
        "use_cache": False,
    }


def _loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    seen = target.masked_fill(weight == 0, 0)  # what is not learned may be no class
    return (F.cross_entropy(logits.float(), seen, reduction="none") * weight).sum()


# -------------------------------------------------------------------------------------- measuring


class Trainee:
    """A model with its optimizer, its forward in bf16 where `lower`."""

    def __init__(self, module: nn.Module, loss: Losses, lower: bool) -> None:
        self.module, self.loss, self.lower = module.train(), loss, lower
        self.config = OptimizerConfig()
        self.optimizer = self.config.build(module)

    def step(self, batches: Step) -> float:
        """One step of training; seconds."""
        began = time.perf_counter()
        kind = batches[0][1].inputs.device.type
        for share, batch in batches:
            with torch.autocast(kind, torch.bfloat16, enabled=self.lower):
                loss = share * self.loss(batch)
            loss.backward()
        clip_gradients(self.module, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def measure(
    config: LMConfig,
    against: Sequence[str] = (),
    *,
    rows: int = 3,
    length: int = 750,
    steps: int = 10,
    precision: str = "auto",
    mixture: Mixture | None = None,
    masked: Callable[[Step], Step] = list,
) -> dict[str, Metric]:
    """Train a model of this shape, fresh, for some steps, and its peers in turns.

    The data are noise, `rows` of `length` columns a step, or a `mixture`, which has its own rows;
    `masked` is what of a step is seen and learned.
    Gives `tokens_per_second` (learned predictions), `columns_per_second`, `mfu` (against the
    peak that a GPU's maker states), `loader_busy`, and against a peer `train_speedup`, how many
    times longer it takes for a step (the median of the rounds' ratios), `train_speedup_gathered`
    likewise, `tokens_per_second_transformers`, and `parameters_ratio`, the peer's parameters over
    ours. `precision` says in how many bits. Raises UserError for an unknown peer or precision, and
    for rows that are longer than the peer's window.
    """
    if precision not in get_args(Autocast):
        raise UserError(
            f"precision '{precision}' is unknown; choices: {', '.join(get_args(Autocast))}."
        )
    for peer in against:
        if peer not in PEERS:
            raise UserError(f"peer '{peer}' is unknown; choices: {', '.join(PEERS)}.")
    length = length if mixture is None else mixture.length
    window = config.temporal.window
    if against and window is not None and length > window:
        raise UserError(
            f"length is {length}, but the peer knows no window: at most temporal.window, {window}."
        )
    if against:  # Moshi's classes have no other norm
        temporal, depth = (
            c.model_copy(update={"norm": "rms"}) for c in (config.temporal, config.depth)
        )
        config = config.model_copy(update={"temporal": temporal, "depth": depth})
    tune_allocator()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lower = autocast_of(cast("Autocast", precision), device) == "bf16"
    torch.manual_seed(0)
    losses = LossConfig()
    ours = SpeechLM(config).to(device)
    trainees = {"ours": Trainee(ours, lambda batch: ours.loss(batch, losses).total, lower)}
    sizes = {"ours": sum(p.numel() for p in ours.parameters())}
    if against:
        for name, gathered in (("transformers", False), ("transformers_gathered", True)):
            rival = MoshiPeer(config, length, gathered).to(device)
            trainees[name] = Trainee(rival, _bound(rival, losses), lower)
            sizes[name] = sum(p.numel() for p in rival.parameters())
    feed = _Noise(config.streams, rows, length) if mixture is None else mixture
    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    seen, busy, spent = Counts(), 0.0, 0.0

    def there(step: Step) -> Step:
        return [(share, batch.to(device)) for share, batch in masked(step)]

    with Loader(feed) as loader:
        # Alone first: while a peer has its turn the loader could read ahead in peace.
        for number in range(steps + 1):
            here = there(loader.next())
            took = trainees["ours"].step(here)
            share = loader.busy()
            if number == 0:
                continue  # kernels are compiled, memory is taken
            seen = sum((Counts.of(batch, config.streams) for _, batch in here), seen)
            spent += took
            busy += share / steps
        for number in range(steps + 1 if against else 0):
            here = there(loader.next())
            for name, trainee in trainees.items():
                took = trainee.step(here)
                if number > 0:
                    seconds[name].append(took)
    flops = work(ours, length).training(seen.columns, seen.frames)
    mfu = Metric(None, n=steps, reason="no maker states the bf16 peak of this machine")
    if device.type == "cuda" and lower:
        mfu = Metric(flops / spent / peak_flops(device), n=steps)
    found: dict[str, Metric] = {}
    for name, metric in (
        ("transformers", "train_speedup"),
        ("transformers_gathered", "train_speedup_gathered"),
    ):
        if name in seconds:
            ratios = np.divide(seconds[name], seconds["ours"])
            found[metric] = bootstrap_median(ratios.tolist(), "×")
    if against:
        ours_pace = seen.tokens / spent
        rival_pace = ours_pace * sum(seconds["ours"]) / sum(seconds["transformers"])
        found["tokens_per_second_transformers"] = Metric(rival_pace, n=steps, unit="1/s")
        found["parameters_ratio"] = Metric(sizes["transformers"] / sizes["ours"])
    return {
        **found,
        "loader_busy": Metric(busy, n=steps),
        "mfu": mfu,
        "tokens_per_second": Metric(seen.tokens / spent, n=steps, unit="1/s"),
        "columns_per_second": Metric(seen.columns / spent, n=steps, unit="1/s"),
        "learned_frames": Metric(seen.frames / seen.columns, unit="of the columns"),
        "parameters": Metric(sizes["ours"]),
        "precision": Metric(16 if lower else 32, unit="bits"),
    }


def _bound(peer: MoshiPeer, losses: LossConfig) -> Losses:
    return lambda batch: peer.objective(batch, losses)
