"""What a run of the language model will take, before it begins.

    speechlm train plan configs/lm/shipped.yaml [--device H100] [--mfu 0.45] [--price 2]

It reads config and data as the run would, so that their mistakes show now, and draws a few batches
to learn what they hold. Memory is an estimate: weights, gradients and optimizer are counted, the
activations are those that a gated block keeps for its backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from audio_codec.audio import FRAME_RATE
from audio_codec.errors import UserError
from audio_codec.precision import has_bf16
from audio_codec.transformer import TransformerConfig
from speechlm.evaluation.report import Metric
from speechlm.scaling import TEXT, Law
from speechlm.sources import Exposure
from speechlm.training.lm import TrainConfig, check, held_out_of, masked, mixture_of, planned
from speechlm.training.work import DENSE_BF16, Counts, body_parameters, peak_flops, work

_PROBE = 4
"""Batches that are drawn to see what one holds."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What there is to know."""

    metrics: dict[str, Metric]
    exposures: list[Exposure]


def peak_of(device: str | None, precision: str = "bf16") -> float:
    """FLOP/s of a device by name, or of this machine. Raises UserError for an unknown name."""
    if device is None:
        return peak_flops(_here(), precision)
    if device not in DENSE_BF16:
        raise UserError(f"device '{device}' is unknown; choices: {', '.join(DENSE_BF16)}.")
    return DENSE_BF16[device] * 1e12


def _here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plan(
    config: TrainConfig,
    *,
    device: str | None = None,
    processes: int = 1,
    utilization: float = 0.4,
    price: float | None = None,
    budget: float | None = None,
    law: Law = TEXT,
) -> Plan:
    """Parameters, memory, FLOPs, tokens, time and cost of a run.

    `price` is that of an hour of one device; `budget` (FLOPs; this run's without one) is what the
    compute-optimal size is of, by `law`. Raises UserError where the run itself would.
    """
    check(config, processes)
    with planned(config) as (model, tokenizer):
        mixture = mixture_of(config, model.streams, tokenizer)
        if config.validation:
            held_out_of(config, model.streams, tokenizer)
    steps = config.run.steps
    exposures = mixture.exposures(steps)
    seen, rng = Counts(), np.random.default_rng(config.run.seed)
    for _ in range(_PROBE):
        batches = masked(config, model.streams, mixture.next(), rng)
        seen = sum((Counts.of(batch, model.streams) for _, batch in batches), seen)
    columns, frames, tokens, audio = (
        steps * count / _PROBE for count in (seen.columns, seen.frames, seen.tokens, seen.audio)
    )
    flops = work(model, config.length).training(columns, frames)
    parameters = sum(p.numel() for p in model.parameters())
    rows = max(-(-source.rows // processes) for source in config.sources)
    piece = -(-rows // config.accumulate) * config.length
    precision = config.run.precision
    if precision == "auto":  # every device that has a name here has the units
        precision = "bf16" if device is not None or has_bf16(_here()) else "no"
    half = 2 if precision == "bf16" else 4
    share = seen.frames / max(1, seen.columns)
    kept = piece * _kept(model.config.temporal, half, config.recompute)
    kept += piece * share * model.streams.k * _kept(model.config.depth, half, recompute=False)
    copies = 4 + (config.ema > 0 or config.average_from is not None)  # weight, gradient, 2 moments
    copies += 2 * config.separate_states
    held = 4 * parameters * copies / processes
    seconds = flops / (peak_of(device, precision) * utilization * processes)
    spent = flops if budget is None else budget
    best = law.optimum(spent)
    giga = 2**30
    found = {
        "parameters": Metric(parameters),
        "parameters_temporal": Metric(sum(p.numel() for p in model.temporal.parameters())),
        "parameters_depth": Metric(sum(p.numel() for p in model.depth.parameters())),
        "parameters_body": Metric(body_parameters(model), unit="without tables of embeddings"),
        "columns": Metric(columns),
        "tokens": Metric(tokens, unit="learned predictions"),
        "audio": Metric(audio / FRAME_RATE / 3600, unit="h"),
        "flops": Metric(flops, unit="FLOP"),
        "flops_step": Metric(flops / steps, unit="FLOP"),
        "memory_state": Metric(held / giga, unit="GiB a process"),
        "memory_activations": Metric(kept / giga, unit="GiB a process, about"),
        "duration": Metric(seconds / 3600, unit=f"h at {utilization:.0%} of the peak"),
        "device_hours": Metric(seconds / 3600 * processes, unit="h"),
        "optimal_parameters": Metric(best[0], unit=f"for {spent:.3g} FLOP"),
        "optimal_columns": Metric(best[1], unit=f"for {spent:.3g} FLOP"),
    }
    if price is not None:
        found["cost"] = Metric(seconds / 3600 * processes * price)
    if config.optimizer.lr is None or config.optimizer.weight_decay is None:
        proposed = config.optimizer.proposed(body_parameters(model))
        found |= {"lr": Metric(proposed.lr), "weight_decay": Metric(proposed.weight_decay)}
    return Plan(found, exposures)


def _kept(config: TransformerConfig, half: int, recompute: bool) -> float:
    """Bytes that a position leaves for the backward pass; `half` is the size of a product's number.

    A block keeps its two inputs and what the norms make of them, queries, keys and values before
    and after rotation, the attention's output, and of the MLP both branches, their product and the
    gate's activation.
    """
    if recompute:
        return 4.0 * config.dim * config.layers
    wide = 4 * config.dim * 4  # residual stream and norms, float32
    attention = half * (2 * 3 * config.dim + 2 * config.dim)
    mlp = half * config.mlp_hidden * (4 if config.gated else 2)
    return float(config.layers * (wide + attention + mlp))
