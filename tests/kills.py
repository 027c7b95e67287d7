"""Processes that are killed in the middle of what they do, and gradients that are no numbers."""

import itertools
import json
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from torch import Tensor, nn


class Killed(BaseException):
    """Stands for whatever ends a process in the middle."""


def train_until(
    module: Any, config: Any, *, resume: bool = False, clips: int | None = None
) -> Path | None:
    """`module.train`; dies when a gradient is clipped for the time after `clips` times, if ever."""
    calls, real = itertools.count(), module.clip_gradients

    def clip(model: nn.Module, limit: float) -> Tensor:
        if next(calls) == clips:
            raise Killed
        found: Tensor = real(model, limit)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "clip_gradients", clip)
        try:
            ended: Path = module.train(config, resume)
        except Killed:
            return None
        finally:
            AcceleratorState._reset_state(True)
    return ended


def spoil(patch: pytest.MonkeyPatch, module: Any, clips: Container[int]) -> None:
    """Make a gradient infinite when it is about to be clipped, at these times from 0."""
    calls, real = itertools.count(), module.clip_gradients

    def clip(model: nn.Module, limit: float) -> Tensor:
        if next(calls) in clips:
            next(p.grad for p in model.parameters() if p.grad is not None).fill_(math.inf)
        found: Tensor = real(model, limit)
        return found

    patch.setattr(module, "clip_gradients", clip)


def rows(run_dir: Path) -> list[dict[str, float]]:
    """What a run logged, a row a step."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def die_at_random_moments(
    work: Callable[[], object], within: float, look: Callable[[], None], *, times: int = 20
) -> None:
    """Fork a child that does the `work`, kill it within so many seconds, `look`; and again."""
    rng = np.random.default_rng(0)
    for _ in range(times):
        with warnings.catch_warnings():
            # Python 3.12 and later warn of locks that other threads may hold; the child takes none.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            # In the child: nothing of the test may run on, whatever happens.
            try:
                work()
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.0, within))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        look()
