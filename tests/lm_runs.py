"""Runs of the language model that take a second, for tests that start them in other processes."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small import CODEC, small_codec
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh

from audio_codec import checkpoint
from speechlm.data import Packer
from speechlm.training import distributed, lm
from speechlm.training.lm import TrainConfig
from synth_data import shards
from synth_data.tts import Word


def make_data(path: Path) -> Path:
    """A folder with a codec and shards of its codes; returns it."""
    checkpoint.save(path / "codec", CODEC, small_codec().state_dict())
    rng = np.random.default_rng(0)
    for folder, wer in (("shards", 0.1), ("worse", 0.8)):
        samples = [
            shards.Sample(
                id=f"{folder}-{number}",
                text="one two",
                words=((Word("two", 1.0, 1.4),), (Word("one", 0.2, 0.5),)),
                voices=("assistant", "user"),
                source="test",
                licence="Apache-2.0",
                synthetic=True,
                seconds=(60 + 5 * number) / 12.5,
                wer=wer,
                codes=rng.integers(0, 9, (2, 3, 60 + 5 * number)).astype(np.uint16),
            )
            for number in range(4)
        ]
        shards.write(path / folder / "dialogue-000000.tar", samples)
    return path


def config_of(made: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    """A run of twelve steps of a model of width 16."""
    run = {"steps": 12, "log_every": 1, "save_every": 4, "eval_every": 6, "precision": "no"}
    layout: dict[str, Any] = {
        "codec": str(made / "codec"),
        "length": 40,
        "model": {
            "temporal": {"dim": 16, "layers": 2, "heads": 2, "window": 20},
            "depth": {"dim": 16, "layers": 1, "heads": 2},
        },
        "text": {"vocab": 120, "quiz": 100},
        "sources": [
            {"kind": "dialogues", "path": made / "shards", "rows": 4},
            {"kind": "quiz", "rows": 2, "turns": 1},
        ],
        "validation": [{"kind": "dialogues", "path": made / "shards", "rows": 1}],
        "validation_batches": 1,
        "optimizer": {"lr": 3e-3, "warmup": 2},
        "user_mask": 0.3,
        "dtype": "fp32",
    }
    layout |= {"run": {"dir": run_dir, **run, **changes.pop("run", {})}}
    return TrainConfig.model_validate({**layout, **changes})


def numbers(run_dir: Path) -> list[dict[str, float]]:
    """What a run logged, but for what depends on the clock."""
    clock = ("per_second", "mfu", "loader_busy")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.endswith(clock)}
        for line in lines
    ]


# What runs in processes of their own ----------------------------------------------------------


def train(
    config: dict[str, Any], resume: bool = False, double: bool = False, gradients: str = ""
) -> None:
    """Train; in float64 where asked. The first step's gradients go into a file that is named."""
    if double:
        torch.set_default_dtype(torch.float64)
    if gradients:
        lm.clip_gradients = keeps_gradients(Path(gradients))  # type: ignore[assignment]
    lm.train(TrainConfig.model_validate(config), resume)


def keeps_gradients(path: Path) -> Callable[[torch.nn.Module, float], torch.Tensor]:
    """A `clip_gradients` that writes down what it sees first."""
    real = lm.clip_gradients

    def clip(model: torch.nn.Module, limit: float) -> torch.Tensor:
        found = {
            name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        if not path.exists() and len(distributed.collect(0)) > 0:
            torch.save(found, path)
        return real(model, limit)

    return clip


def train_until(config: dict[str, Any], point: str, count: int) -> None:
    """Train or go on, and be killed at the `count`th optimizer step, checkpoint or batch.

    The `pieces` of a sharded checkpoint are written before what makes them one, so that a rank
    that dies by them leaves none.
    """

    def fatal(owner: Any, name: str, half: Callable[..., None] | None = None) -> None:
        real, calls = getattr(owner, name), iter(range(count))

        def wrapped(*args: Any, **options: Any) -> Any:
            if next(calls, None) is None:
                if half is not None:
                    half(real, *args, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(owner, name, wrapped)

    def dead_in_rank_1(save: Callable[..., None], *args: Any, **options: Any) -> None:
        if torch.distributed.get_rank() == 0:
            save(*args, **options)  # which waits for the other in vain

    def half_written(save: Callable[..., None], content: Any, path: Path) -> None:
        save(content, path)
        os.truncate(path, path.stat().st_size // 2)

    if point == "optimizer":
        fatal(torch.optim.AdamW, "step")
    elif point == "checkpoint":
        fatal(torch, "save", half_written)
    elif point == "pieces":  # of a sharded checkpoint
        fatal(FileSystemWriter, "write_data", dead_in_rank_1)
    else:
        assert point == "data", point
        fatal(Packer, "next")
    lm.train(TrainConfig.model_validate(config), resume=True)


def train_on_a_full_disk(config: dict[str, Any], room: int) -> None:
    """Go on where no file may grow beyond `room` bytes; exits with status 3 at a UserError."""
    from audio_codec.errors import UserError

    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        lm.train(TrainConfig.model_validate(config), resume=True)
    except UserError as error:
        assert "cannot be written" in str(error), error
        os._exit(3)


def build_apart(config: dict[str, Any], path: Path) -> None:
    """Build a model over all ranks; how many bytes that took at most goes into `path`-rank."""
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**16)  # what is freed is given back at once

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

    read = TrainConfig.model_validate(config)
    for _ in range(2):  # the first time much is imported
        model = None
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
        before = resident("VmRSS")
        made = lm.build(lm.resolve_shape(read), path, False, lambda: distributed.scattered(mesh))
        model, took = made[0], resident("VmHWM") - before
        del made
    assert model is not None
    here = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[operator]
    whole = sum(p.numel() for p in model.parameters())
    (path / f"rank-{rank}.json").write_text(json.dumps([took, 4 * here, 4 * whole]))
