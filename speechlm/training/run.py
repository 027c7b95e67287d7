"""One run of one trainee: its directory, its numbers, its checkpoints, its resume.

A run directory holds

    config.json         the resolved config, so that a run can be repeated
    metrics.jsonl       one line a logged step (cut back to the checkpoint on resume)
    tensorboard/        the same numbers as curves, and what was listened to
    checkpoint.pt       everything to go on from: step, weights, optimizer, random state, position
                        in the data; `checkpoint-<step>/` instead where the weights are sharded
    checkpoint-<step>.pt   those of steps 1, 2, 4, 8, … where `log_spaced` asks for them

and a resumed run gives the numbers of one never stopped: whatever is random is drawn either from
the generators kept in the checkpoint or from `Run.rng(step)`, which needs but seed and step. So
does one that was rolled back: it goes over the same steps to the same numbers, but for the batch
that it passes over.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from pydantic import BaseModel, ConfigDict, Field, field_validator
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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.tensorboard import SummaryWriter

from audio_codec.errors import UserError
from audio_codec.files import check_writable
from audio_codec.memory import tune_allocator
from audio_codec.precision import has_bf16, settle
from speechlm.training import distributed
from speechlm.training.optimize import (
    Average,
    OptimizerConfig,
    SpikeConfig,
    SpikeGuard,
    clip_gradients,
    load_optimizer,
)

__all__ = [
    "Average",
    "OptimizerConfig",
    "Run",
    "RunConfig",
    "clip_gradients",
]


Autocast = Literal["auto", "bf16", "no"]


def autocast_of(asked: Autocast, device: torch.device) -> Literal["bf16", "no"]:
    """What `auto` is on a device; warns of a choice that is slow there."""
    return "bf16" if settle("fp32" if asked == "no" else asked, device) == "bf16" else "no"


class RunConfig(BaseModel):
    """What every trainee's run has in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dir: Path
    """Run directory; made when absent."""
    steps: int = Field(gt=0)
    seed: int = Field(0, ge=0)
    precision: Autocast = "auto"
    """Autocast of the forward; weights and optimizer stay float32. `auto` is bf16 where the device
    has units for it; a run that is taken up again goes on in what it was begun with."""
    log_every: int = Field(20, gt=0)
    save_every: int = Field(500, gt=0)
    eval_every: int = Field(500, gt=0)
    log_spaced: bool = False
    """Also keep the checkpoints of steps 1, 2, 4, 8, …: how a model came to be, as Pythia shows
    (arXiv 2304.01373)."""
    minutes: float | None = None
    """Stop after so many minutes of this process, as if that had been the last step's time; None
    runs all steps. A schedule that decays by time is the trainee's own affair."""
    spikes: SpikeConfig | None = None
    """Roll back to the last checkpoint at a spike of the loss, and pass over the batch that made
    it (arXiv 2204.02311); null never does. For language models alone."""

    @field_validator("precision", mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        return "no" if value is False else value  # what YAML makes of a bare `no`


class Run:
    """A run directory and what a training loop needs around it.

    `for step in run.steps(): …; run.log(step, {...})`; the loop's own state goes in and out through
    `save` and `load`. On more than one process only the main one writes, save for the pieces of a
    sharded checkpoint.
    """

    def __init__(
        self,
        name: str,
        run: RunConfig,
        config: BaseModel,
        resume: bool = False,
        sharded: bool = False,
    ) -> None:
        """`config` is the trainee's whole config.

        With `sharded`, more than one process means FSDP2: `mesh` is then what to shard over.
        Raises UserError when the directory holds a run and `resume` is off, is no directory or
        cannot be written, or holds a checkpoint that cannot be read.
        """
        if run.spikes is not None and name != "lm":
            raise UserError(
                f"run.spikes is for a language model; the {name} watches no loss: leave it out."
            )
        self.name, self.config, self.dir = name, run, run.dir
        self.checkpoint = self.dir / "checkpoint.pt"
        if not resume and self._holds_run():
            raise UserError(
                f"run.dir '{self.dir}' already holds a run: add --resume, or choose another folder."
            )
        if self.dir.exists() and not self.dir.is_dir():
            raise UserError(f"run.dir '{self.dir}' is a file: choose another name.")
        check_writable(self.dir / "config.json")
        tune_allocator()
        # Room for the matrix kernels of every shape that a run of uneven batches meets.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
        self.dir.mkdir(parents=True, exist_ok=True)
        device = PartialState(cpu=not torch.cuda.is_available()).device
        self.precision = self._settle(run.precision, device)
        """What `auto` came to."""
        self.accelerator = Accelerator(mixed_precision=self.precision, cpu=device.type == "cpu")
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.mesh: DeviceMesh | None = None
        if sharded and self.world > 1:
            self.mesh = init_device_mesh(self.device.type, (self.world,))
        torch.manual_seed(run.seed)
        self.guard = None if run.spikes is None else SpikeGuard(run.spikes)
        self.first_step = 0
        self.bad_gradients = 0
        """Gradients so far that were not finite; see `update`."""
        self._resumed: dict[str, Any] | None = None
        self._back: int | None = None
        if resume:
            self._read_checkpoint()
        self.done = self.first_step
        """Steps done so far."""
        self._last = ""
        self._began, self._began_at = time.monotonic(), self.first_step
        if self.main:
            self.record(config)
            self._trim_metrics()
        self.tensorboard = self._open_tensorboard() if self.main else None
        self.console = Console(stderr=True)

    # -------------------------------------------------------------------------------- directory

    def _settle(self, asked: Autocast, device: torch.device) -> Literal["bf16", "no"]:
        """What `asked` comes to: the same on all ranks, and as the run was begun."""
        if asked == "auto" and self._holds_run():
            with suppress(OSError, ValueError, KeyError):
                begun = json.loads((self.dir / "config.json").read_text())["run"]["precision"]
                if begun in ("bf16", "no"):
                    asked = begun
        if asked == "auto" and not all(distributed.collect(has_bf16(device))):
            return "no"
        return autocast_of(asked, device)

    def _holds_run(self) -> bool:
        return self.checkpoint.exists() or bool(distributed.folders(self.dir))

    def record(self, config: BaseModel) -> None:
        """Write the trainee's config, as far as it is resolved."""
        if isinstance(run := getattr(config, "run", None), RunConfig):
            settled = run.model_copy(update={"precision": self.precision})
            config = config.model_copy(update={"run": settled})
        if self.main:
            (self.dir / "config.json").write_text(config.model_dump_json(indent=2) + "\n")

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

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write numbers of a step to metrics.jsonl and TensorBoard.

        The progress line leaves out what is a part of a part: names with more than one slash.
        """
        if not self.main:
            return
        with open(self.dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        assert self.tensorboard is not None
        for key, value in metrics.items():
            self.tensorboard.add_scalar(key, value, step)
        shown = [item for item in metrics.items() if item[0].count("/") < 2]
        self._last = " ".join(f"{key} {value:.4g}" for key, value in shown)
        if not self.console.is_terminal:
            left = ""
            if self.done > self._began_at:
                pace = (time.monotonic() - self._began) / (self.done - self._began_at)
                seconds = round(pace * (self.config.steps - self.done))
                left = f" ({timedelta(seconds=seconds)} left)"
            self.console.print(
                f"{self.name} {step}/{self.config.steps}{left} {self._last}", soft_wrap=True
            )

    def play(self, step: int, name: str, pcm: Tensor, sample_rate: int) -> None:
        """Keep a sound, float32 [S], for TensorBoard's listener."""
        if self.tensorboard is not None:
            self.tensorboard.add_audio(name, pcm[None], step, sample_rate)

    # ------------------------------------------------------------------------------- randomness

    def rng(self, step: int) -> np.random.Generator:
        """A generator that depends on the seed and the step alone.

        Over a mesh, `random` gives this rank's rows of what one process would have drawn.
        """
        if self.mesh is None:
            return np.random.default_rng((self.config.seed, step))
        return distributed.RowsOfRank(
            np.random.PCG64((self.config.seed, step)), self.rank, self.world
        )

    def _restore_rng(self) -> None:
        assert self._resumed is not None
        torch.set_rng_state(self._resumed["torch_rng"])
        if self.device.type == "cuda" and "cuda_rng" in self._resumed:
            torch.cuda.set_rng_state(self._resumed["cuda_rng"], self.device)

    # ------------------------------------------------------------------------------ checkpoints

    def scattered(self) -> AbstractContextManager[None]:
        """Where the model of a sharded run is made; see `distributed.scattered`."""
        return distributed.scattered(self.mesh)

    def _read_checkpoint(self) -> None:
        """Read the last whole checkpoint there is, of one process or of many."""
        sharded = distributed.folders(self.dir)
        found: dict[str, Any] | None = None
        if self.checkpoint.exists():
            try:
                # Mapped where each rank takes but its rows; read whole where it may be replaced.
                found = torch.load(
                    self.checkpoint,
                    map_location="cpu",
                    weights_only=True,
                    mmap=self.mesh is not None,
                )
            except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
                raise UserError(
                    f"run.dir '{self.dir}': checkpoint.pt cannot be read ({error}); delete it to "
                    "start anew."
                ) from error
        if sharded and (found is None or max(sharded) > int(found["step"])):
            found = distributed.load(sharded[max(sharded)], self.mesh)
        elif found is not None and self.mesh is not None:
            found = {**found, "state": distributed.spread(found["state"], self.mesh)}
        if found is None:
            return
        self._resumed = found
        self.first_step = int(found["step"])
        self.bad_gradients = int(found.get("bad_gradients", 0))
        if self.guard is not None and "guard" in found:
            self.guard.load_state_dict(found["guard"])

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
            load_optimizer(optimizer, saved["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"run.dir '{self.dir}' holds a run of another model; resume with its config.json "
                "or choose another folder."
            ) from error

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keep `state` (tensors, numbers, strings, containers of them) as of `step` done steps.

        The checkpoint before is gone only once the new one is whole. Raises UserError when it
        cannot be written, as on a full disk; the one before then stands.
        """
        content = {"step": step, "torch_rng": torch.get_rng_state(), "state": state}
        if self.device.type == "cuda":
            content["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        if self.guard is not None:
            content["guard"] = self.guard.state_dict()
        content["bad_gradients"] = self.bad_gradients
        try:
            if self.mesh is not None:
                self._save_sharded(step, content)
            elif self.main:
                self._save_whole(step, content)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise UserError(
                f"run.dir '{self.dir}': the checkpoint of step {step} cannot be written "
                f"({error}); the one before it stands."
            ) from error

    def _keeps(self, step: int) -> bool:
        return self.config.log_spaced and step > 0 and step & (step - 1) == 0

    def _save_whole(self, step: int, content: dict[str, Any]) -> None:
        fresh = self.checkpoint.with_suffix(".new")
        try:
            torch.save(content, fresh)
            with open(fresh, "rb") as file:
                os.fsync(file.fileno())
            if self._keeps(step):  # before it is the last one: whoever resumes will not come by
                kept = self.dir / f"checkpoint-{step}.pt"
                kept.unlink(missing_ok=True)
                os.link(fresh, kept)
            fresh.replace(self.checkpoint)
        except (OSError, RuntimeError):
            fresh.unlink(missing_ok=True)  # half a file is worth less than the room it takes
            raise
        self._drop_sharded(before=step)

    def _save_sharded(self, step: int, content: dict[str, Any]) -> None:
        folder = self.dir / f"checkpoint-{step}"
        if self.main:
            shutil.rmtree(folder, ignore_errors=True)  # of a process that died in writing it
        self.accelerator.wait_for_everyone()
        try:
            distributed.save(folder, content)
        except CheckpointException:
            if self.main:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if self.main:
            self._drop_sharded(before=step)
            self.checkpoint.unlink(missing_ok=True)

    def _drop_sharded(self, before: int) -> None:
        for step, folder in distributed.folders(self.dir).items():
            if step < before and not self._keeps(step):
                with suppress(FileNotFoundError):
                    (folder / ".metadata").unlink()  # from here on it is no checkpoint
                shutil.rmtree(folder)

    # ------------------------------------------------------------------------------------ steps

    def update(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> bool:
        """Let the optimizer step by its gradient, which has this norm, and forget the gradient.

        One that is not finite would spoil weights and moments for good: it is only counted. Returns
        whether a step was taken.
        """
        finite = math.isfinite(norm.item())
        if finite:
            optimizer.step()
        else:
            self.bad_gradients += 1
        optimizer.zero_grad()
        return finite

    def passes_over(self, step: int) -> bool:
        """Whether the batch of this step was seen to make the loss jump, and is to be left out."""
        return self.guard is not None and step in self.guard.skipped

    def spiked(self, step: int, loss: float) -> bool:
        """Whether the loss of a step (the same on every rank) is a spike.

        The run has then gone back to its last checkpoint: `load` and `restore` give that one, and
        `steps` goes on from there once the loop's body ends. Raises UserError at one too many.
        """
        if self.guard is None or not self.guard.spiked(loss):
            return False
        skipped = sorted({*self.guard.skipped, step})
        if len(skipped) > self.guard.config.limit:
            raise UserError(
                f"run.spikes.limit is {self.guard.config.limit}: the loss jumped to {loss:.4g} at "
                f"step {step} after as many batches were skipped; try a lower optimizer.lr."
            )
        self._read_checkpoint()
        assert self._resumed is not None
        self.guard.skipped = sorted({*self.guard.skipped, *skipped})
        self._back = self.done = self.first_step
        self._restore_rng()
        if self.main:
            self._trim_metrics()
            assert self.tensorboard is not None
            self.tensorboard.close()
            self.tensorboard = self._open_tensorboard()
            self.console.print(
                f"{self.name}: the loss jumped to {loss:.4g} at step {step}; going on from step "
                f"{self.first_step} without that batch."
            )
        return True

    def _is_late(self) -> bool:
        if self.config.minutes is None:
            return False
        spent = (time.monotonic() - self._began) / 60
        return distributed.collect(spent >= self.config.minutes)[0]  # no two clocks agree

    def steps(
        self,
        save: Callable[[], dict[str, Any]],
        evaluate: Callable[[int], dict[str, float]] | None = None,
    ) -> Iterator[int]:
        """Yield the steps to do, under a progress bar with time left.

        After every `save_every` steps, and at the end, `save()` gives the state to keep; after
        every `eval_every`, `evaluate(step)` gives numbers to log.
        """
        config = self.config
        self._began, self._began_at = time.monotonic(), self.first_step
        if self._resumed is not None:
            self._restore_rng()  # only now: building the model has drawn from it too
        elif self.guard is not None:
            self.save(0, save())  # there must be something to go back to
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
            step = self.first_step
            task = bar.add_task(self.name, total=config.steps, completed=step, numbers="")
            while step < config.steps:
                yield step
                if self._back is not None:
                    step, self._back = self._back, None
                    bar.update(task, completed=step)
                    continue
                self.done = done = step + 1
                bar.update(task, completed=done, numbers=self._last)
                late = self._is_late()
                last = done == config.steps or late
                if evaluate is not None and (done % config.eval_every == 0 or last):
                    self.log(step, evaluate(step))
                if done % config.save_every == 0 or last or self._keeps(done):
                    self.save(done, save())
                if late:
                    break
                step = done
        if self.tensorboard is not None:
            self.tensorboard.flush()
