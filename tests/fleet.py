"""Processes that a test starts: a group that computes together, or one that may be killed.

They come from a server process that has imported everything once, so that each takes a moment and
none inherits a thread. What they run must stand in a module that `tests/` has on the path.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fleet", "speechlm.training.lm"])


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def _member(
    target: Callable[..., None], rank: int, world: int, port: int, arguments: tuple[Any, ...]
) -> None:
    import torch

    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if world > 1:  # as torchrun sets them
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    target(*arguments)
    if world > 1:
        torch.distributed.destroy_process_group()


def start(target: Callable[..., None], *arguments: Any, world: int = 1) -> list[Any]:
    """Start `target` in `world` processes that make up one group; the processes."""
    port = _free_port()
    processes = [
        CONTEXT.Process(target=_member, args=(target, rank, world, port, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def run(target: Callable[..., None], *arguments: Any, world: int = 1) -> list[int]:
    """Run `target` in `world` processes to the end; their exit codes, −9 for a killed one."""
    processes = start(target, *arguments, world=world)
    for process in processes:
        process.join()
    return [int(process.exitcode) for process in processes]
