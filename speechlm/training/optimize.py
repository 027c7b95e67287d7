"""The optimizer and what watches over it: rates, clipping, averages, spikes, recomputation.

wsd        ╱‾‾‾‾‾‾‾‾‾‾╲        warm-up, stable, 1 − √x over the last share `decay`
cosine     ╱‾‾╲__              warm-up, half a cosine to the end
infinite   ╱╲____╱╲____╲       warm-up, cool-down to `hold`, on for as long as there is data;
                 └ `rewarm`: up once more where other data begins
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from audio_codec.errors import UserError

Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(BaseModel):
    """AdamW and its schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float | None = Field(1e-3, ge=0)
    """Highest rate; null lets the language model's size propose one (`proposed`)."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    weight_decay: float | None = Field(0.05, ge=0)
    """On matrices only, times the rate; null is proposed likewise."""
    schedule: Literal["wsd", "cosine", "infinite"] = "wsd"
    """Warm-up, stable, decay (arXiv 2404.06395); cosine (arXiv 1608.03983); infinite with
    re-warming (arXiv 2403.08763)."""
    warmup: int = 200
    """Steps from nothing to `lr`."""
    decay: float = Field(0.3, ge=0, le=1)
    """Last share of the steps, over which the rate falls to `final` of what it was along 1 − √x
    (`wsd`, `infinite`; 0 leaves the end open, to go on from)."""
    final: float = 0.02
    cooldown: NonNegativeInt = 0
    """`infinite`: steps from `lr` to `hold`·lr along half a cosine."""
    hold: float = Field(0.5, gt=0, le=1)
    """`infinite`: share of `lr` that is held."""
    rewarm: tuple[PositiveInt, ...] = ()
    """`infinite`: steps at which warm-up, now from `hold`, and cool-down begin again."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient; inf does not clip."""

    def proposed(self, parameters: int) -> OptimizerConfig:
        """The same with what is null filled in for a model of so many non-embedding parameters.

        MM1's rule (arXiv 2403.09611): the rate η = exp(−0.4214 ln N − 0.5535), and a weight decay
        of 0.1 η. That is what a step takes off a weight; here, as in torch, it is `weight_decay`
        times the rate, so the field becomes 0.1.
        """
        lr, decay = self.lr, self.weight_decay
        if lr is None:
            lr = math.exp(-0.4214 * math.log(parameters) - 0.5535)
        return self.model_copy(update={"lr": lr, "weight_decay": 0.1 if decay is None else decay})

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step (0 … steps−1)."""
        assert self.lr is not None, "fill the rate in with `proposed` first"
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if self.schedule == "cosine":
            x = (step - self.warmup) / max(1, steps - self.warmup)
            return self.lr * warm * _half_cosine(x, self.final)
        if self.schedule == "infinite":
            warm = self._cycle(step)
        begin = steps * (1 - self.decay)
        if step < begin:
            return self.lr * warm
        x = (step - begin) / max(1.0, steps - begin)
        return self.lr * warm * max(self.final, 1 - math.sqrt(x))

    def _cycle(self, step: int) -> float:
        """Where an infinite schedule stands between its warm-ups, as a share of `lr`."""
        begin = max(at for at in (0, *self.rewarm) if at <= step)
        since, low = step - begin, self.hold if begin else 0.0
        if since < self.warmup:
            return low + (1 - low) * (since + 1) / self.warmup
        return _half_cosine((since - self.warmup + 1) / max(1, self.cooldown), self.hold)

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW over what the model trains. Raises UserError where a rate is still to be given."""
        if self.lr is None or self.weight_decay is None:
            raise UserError("optimizer: lr and weight_decay must be numbers for this trainee.")
        named = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in named if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in named if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give an optimizer the moments of a checkpoint; its settings stay those of the config.

    Raises ValueError when they are of another model.
    """
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _half_cosine(x: float, low: float) -> float:
    """From 1 at x ≤ 0 to `low` at x ≥ 1."""
    return low + (1 - low) * (1 + math.cos(math.pi * min(1.0, max(0.0, x)))) / 2


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradient down to a norm of at most `limit`; its norm before.

    A norm that is not finite leaves a gradient that must not be used.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class Average:
    """An average of the weights that a model trains: exponential over all steps, or even."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`model` must be on its device already. `decay` is that of `update`."""
        self.decay = decay
        self.weights = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step`; early on the average forgets faster."""
        self._take(model, 1 - min(self.decay, (step + 1) / (step + 10)))

    def add(self, model: nn.Module, number: int) -> None:
        """Take in the weights as number `number` (1, 2, …) of an even mean."""
        self._take(model, 1 / number)

    @torch.no_grad()
    def _take(self, model: nn.Module, share: float) -> None:
        now = [p.detach() for name, p in model.named_parameters() if name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), now, share)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and the average; a second call undoes it."""
        for name, parameter in model.named_parameters():
            if name in self.weights:
                kept = parameter.detach().clone()
                parameter.copy_(self.weights[name])
                self.weights[name].copy_(kept)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Go on from the `weights` of another average of the same model."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])


class SpikeConfig(BaseModel):
    """When a loss counts as a spike."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: PositiveInt = 100
    """Losses that a new one is held against; until there are so many, no number is a spike."""
    deviations: PositiveFloat = 6.0
    """Standard deviations above their mean that are too many."""
    limit: PositiveInt = 10
    """Batches that may be skipped before the run gives up."""


class SpikeGuard:
    """Remembers the last losses, and the steps whose batches are passed over."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.losses: list[float] = []
        self.skipped: list[int] = []

    def spiked(self, loss: float) -> bool:
        """Whether a loss is a spike, as one that is no number always is; else it is remembered."""
        if not math.isfinite(loss):
            return True
        if len(self.losses) == self.config.window:
            past = torch.tensor(self.losses, dtype=torch.float64)
            limit = past.mean() + self.config.deviations * past.std(correction=0)
            if loss > float(limit):
                return True
        self.losses = [*self.losses, loss][-self.config.window :]
        return False

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return {"losses": list(self.losses), "skipped": list(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what another remembered."""
        self.losses, self.skipped = list(state["losses"]), list(state["skipped"])


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Keep of each block only its input, and compute the rest again in the backward pass.

    About a third more time for a small part of the memory (arXiv 1604.06174).
    """
    for block in blocks:
        setattr(block, "forward", partial(checkpoint, block.forward, use_reentrant=False))  # noqa: B010
