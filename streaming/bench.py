"""How long a frame takes, for every batch size up to the number of slots.

A model is fast enough when the p95 of its frame time, with every slot talking, stays below the
80 ms that a frame lasts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from speechlm.evaluation.report import Metric
from streaming.engine import FRAME_SECONDS, Core, FrameModel, frame_metrics
from streaming.protocol import FRAME_SIZE, SessionParams


def frame_times(model: FrameModel[Any], slots: int, frames: int = 100) -> dict[str, Metric]:
    """Measure steps of 1, 2, 4, … and `slots` conversations, all active, hearing noise.

    Gives `frame_ms_p50_bN`, `frame_ms_p95_bN`, `frame_ms_max_bN` for each batch size N, and
    `real_time_slots`: the largest measured N whose p95 is below 80 ms (0: none).
    """
    assert slots >= 1 and frames >= 1, (slots, frames)
    metrics: dict[str, Metric] = {}
    real_time = 0
    for batch in batch_sizes(slots):
        times = _measure(model, batch, frames)
        metrics |= frame_metrics(times, f"_b{batch}")
        if np.percentile(times, 95) < FRAME_SECONDS * 1000:
            real_time = batch
    return metrics | {"real_time_slots": Metric(float(real_time))}


def batch_sizes(slots: int) -> list[int]:
    """1, 2, 4, … and `slots` itself."""
    return sorted({2**k for k in range(slots.bit_length()) if 2**k <= slots} | {slots})


def _measure(model: FrameModel[Any], batch: int, frames: int) -> list[float]:
    core = Core(model, batch)
    core.warm_up()
    for slot in range(batch):
        core.begin(slot, SessionParams(seed=slot))
    noise = np.random.default_rng(0).normal(0, 0.05, (batch, FRAME_SIZE)).astype(np.float32)
    inputs = dict(enumerate(noise))
    return [core.step(inputs)[0].compute_ms for _ in range(frames)]
