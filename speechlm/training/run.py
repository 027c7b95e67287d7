"""One run of one trainee: its directory, its numbers, its checkpoints, its resume.

A run directory holds

    config.json      the resolved config, so that a run can be repeated
    metrics.jsonl    one line a logged step (cut back to the checkpoint on resume)
    tensorboard/     the same numbers as curves
    checkpoint.pt    everything to go on from: step, weights, optimizer, random state, data position

and a resumed run gives the numbers of one never stopped: whatever is random is drawn either from
the generators kept in the checkpoint or from `Run.rng(step)`, which needs but seed and step.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from audio_codec.errors import UserError
from audio_codec.memory import tune_allocator


class RunConfig(BaseModel):
    """What every trainee's run has in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dir: Path
    """Run directory; made when absent."""
    steps: int = Field(gt=0)
    seed: int = 0
    precision: Literal["bf16", "no"] = "bf16"
    """Autocast of the forward; weights and optimizer stay float32."""
    log_every: int = Field(20, gt=0)
    save_every: int = Field(500, gt=0)
    eval_every: int = Field(500, gt=0)
    minutes: float | None = None
    """Stop after so many minutes of this process, as if that had been the last step's time; None
    runs all steps. A schedule that decays by time is the trainee's own affair."""


class OptimizerConfig(BaseModel):
    """AdamW with warm-up, a stable phase and a decay (WSD, arXiv 2404.06395)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    """On matrices only."""
    warmup: int = 200
    """Steps from nothing to `lr`."""
    decay: float = Field(0.3, ge=0, le=1)
    """Last share of the steps, over which the rate falls to `final`·lr along 1 − √x."""
    final: float = 0.02
    clip: float = 1.0
    """Largest norm of the gradient."""

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step (0 … steps−1)."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        begin = steps * (1 - self.decay)
        if step < begin:
            return self.lr * warm
        x = (step - begin) / max(1.0, steps - begin)
        return self.lr * warm * max(self.final, 1 - math.sqrt(x))

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW over what the model trains."""
        named = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in named if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in named if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)


class Run:
    """A run directory and what a training loop needs around it.

    `for step in run.steps(): …; run.log(step, {...})`; the loop's own state goes in and out through
    `save` and `load`. On more than one process only the main one writes.
    """

    def __init__(self, name: str, run: RunConfig, config: BaseModel, resume: bool = False) -> None:
        """`config` is the trainee's whole config.

        Raises UserError when the directory holds a run and `resume` is off, is no directory, or
        holds a checkpoint that cannot be read.
        """
        self.name, self.config, self.dir = name, run, run.dir
        self.checkpoint = self.dir / "checkpoint.pt"
        if self.checkpoint.exists() and not resume:
            raise UserError(
                f"run.dir '{self.dir}' already holds a run: add --resume, or choose another folder."
            )
        if self.dir.exists() and not self.dir.is_dir():
            raise UserError(f"run.dir '{self.dir}' is a file: choose another name.")
        tune_allocator()
        # Room for the matrix kernels of every shape that a run of uneven batches meets.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
        self.dir.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(
            mixed_precision=run.precision, cpu=not torch.cuda.is_available()
        )
        self.device = self.accelerator.device
        torch.manual_seed(run.seed)
        self.first_step = 0
        self._resumed: dict[str, Any] | None = None
        if resume and self.checkpoint.exists():
            try:
                self._resumed = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
                raise UserError(
                    f"run.dir '{self.dir}': checkpoint.pt cannot be read ({error}); delete it to "
                    "start anew."
                ) from error
            self.first_step = int(self._resumed["step"])
        self.done = self.first_step
        """Steps done so far."""
        self.main = self.accelerator.is_main_process
        if self.main:
            (self.dir / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
            self._trim_metrics()
        self.tensorboard = self._open_tensorboard() if self.main else None
        self.console = Console(stderr=True)

    def _open_tensorboard(self) -> SummaryWriter:
        # What a killed run drew past its checkpoint is drawn again: hide the first version.
        again = None if self._resumed is None else self.first_step
        return SummaryWriter(str(self.dir / "tensorboard"), purge_step=again)

    def _trim_metrics(self) -> None:
        path = self.dir / "metrics.jsonl"
        kept = []
        if path.exists() and self._resumed is not None:
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # the line being written when the run was killed
                if record["step"] < self.first_step:
                    kept.append(line)
        path.write_text("".join(line + "\n" for line in kept))

    def rng(self, step: int) -> np.random.Generator:
        """A generator that depends on the seed and the step alone."""
        return np.random.default_rng((self.config.seed, step))

    def load(self) -> dict[str, Any] | None:
        """What the last `save` was given, or None when there is nothing to resume."""
        return None if self._resumed is None else self._resumed["state"]

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, part: str | None = None
    ) -> None:
        """Load `model` and `optimizer` of the last `save`, or of a part of it, if there is one.

        Raises UserError when they are of another shape than the ones given.
        """
        saved = self.load()
        if saved is not None and part is not None:
            saved = saved.get(part)
        if saved is None:
            return
        try:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"run.dir '{self.dir}' holds a run of another model; resume with its config.json "
                "or choose another folder."
            ) from error

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keep `state` (tensors, numbers, strings, containers of them) as of `step` done steps."""
        if not self.main:
            return
        content = {"step": step, "torch_rng": torch.get_rng_state(), "state": state}
        if self.device.type == "cuda":
            content["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        fresh = self.checkpoint.with_suffix(".new")
        torch.save(content, fresh)
        with open(fresh, "rb") as file:
            os.fsync(file.fileno())
        fresh.replace(self.checkpoint)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write numbers of a step to metrics.jsonl and TensorBoard."""
        if not self.main:
            return
        with open(self.dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        assert self.tensorboard is not None
        for key, value in metrics.items():
            self.tensorboard.add_scalar(key, value, step)
        self._last = " ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        if not self.console.is_terminal:
            self.console.print(
                f"{self.name} {step}/{self.config.steps} {self._last}", soft_wrap=True
            )

    def steps(
        self,
        save: Callable[[], dict[str, Any]],
        evaluate: Callable[[int], dict[str, float]] | None = None,
    ) -> Iterator[int]:
        """Yield the steps to do, under a progress bar with time left.

        After every `save_every` steps, and at the end, `save()` gives the state to keep; after
        every `eval_every`, `evaluate(step)` gives numbers to log.
        """
        config, began = self.config, time.monotonic()
        if self._resumed is not None:
            # Only now: building the model has drawn from the generator too.
            torch.set_rng_state(self._resumed["torch_rng"])
            if self.device.type == "cuda" and "cuda_rng" in self._resumed:
                torch.cuda.set_rng_state(self._resumed["cuda_rng"], self.device)
        self._last = ""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        with Progress(*columns, console=self.console, disable=not self.main) as bar:
            task = bar.add_task(
                self.name, total=config.steps, completed=self.first_step, numbers=""
            )
            for step in range(self.first_step, config.steps):
                yield step
                self.done = done = step + 1
                bar.update(task, completed=done, numbers=self._last)
                spent = (time.monotonic() - began) / 60
                late = config.minutes is not None and spent >= config.minutes
                if evaluate is not None and (
                    done % config.eval_every == 0 or done == config.steps or late
                ):
                    self.log(step, evaluate(step))
                if done % config.save_every == 0 or done == config.steps or late:
                    self.save(done, save())
                if late:
                    break
        if self.tensorboard is not None:
            self.tensorboard.flush()


class Average:
    """Exponential moving average of the weights that a model trains."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`model` must be on its device already."""
        self.decay = decay
        self.weights = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step`; early on the average forgets faster."""
        decay = min(self.decay, (step + 1) / (step + 10))
        now = [p.detach() for name, p in model.named_parameters() if name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), now, 1 - decay)

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


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradient down to a norm of at most `limit`; its norm before."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
