"""One model over many processes: FSDP2, made sharded, saved sharded, read back by any number.

Every parameter is cut along its first axis, a piece a rank (`torch.distributed.fsdp.fully_shard`;
ZeRO-3, arXiv 1910.02054). Nothing is ever whole on a rank but what is being used: a constructor
that runs inside `scattered` keeps of each parameter this rank's rows alone, and has drawn the very
numbers that it would have drawn on a single process.

A sharded checkpoint is a folder of `torch.distributed.checkpoint`:

    checkpoint-500/__0_0.distcp   what rank 0 held      ┐ any number of ranks, one process as well,
    checkpoint-500/__1_0.distcp   what rank 1 held      ┘ takes from these what it needs
    checkpoint-500/.metadata      which is where; written last, so that a folder with it is whole
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor import empty as empty_shards
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

Item = TypeVar("Item")

_REST = "rest"
_SHARD = "sharded tensor"


def split(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's rows of a tensor that every rank has; nothing is sent."""
    return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)


def collect(item: Item) -> list[Item]:
    """What each rank has, in the order of ranks; on one process a list of one."""
    if not dist.is_initialized():
        return [item]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, item)
    return found


class RowsOfRank(np.random.Generator):
    """Draws the numbers of all rows, as a single process would, and gives those of this rank."""

    def __init__(self, bits: np.random.BitGenerator, rank: int, world: int) -> None:
        super().__init__(bits)
        self.rank, self.world = rank, world

    def random(self, size: Any = None, *rest: Any, **options: Any) -> Any:
        """Uniform numbers; the first axis of `size` is this rank's rows."""
        if size is None:
            return super().random(None, *rest, **options)
        rows, *shape = (size,) if isinstance(size, int) else size
        drawn: npt.NDArray[Any] = super().random((rows * self.world, *shape), *rest, **options)
        return drawn[rows * self.rank : rows * (self.rank + 1)]


# ----------------------------------------------------------------------------------------- models


class _Whole(TorchFunctionMode):
    """Lets a function that changes a sharded tensor in place see it whole, for a moment.

    A constructor fills its parameters so. Were each rank to fill its piece by itself, the pieces
    would not be those of one draw.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        target = kwargs.get("tensor", args[0] if args else None)
        fills = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if not (fills and isinstance(target, DTensor)) or name == "requires_grad_":
            return func(*args, **kwargs)
        whole = target.full_tensor().detach().cpu()

        def seen(value: Any) -> Any:
            if value is target:
                return whole
            return value.full_tensor().cpu() if isinstance(value, DTensor) else value

        with torch.no_grad():
            func(*tree_map(seen, tuple(args)), **tree_map(seen, kwargs))
            target.to_local().copy_(split(whole, target.device_mesh).to_local())
        return target


@contextmanager
def scattered(mesh: DeviceMesh | None) -> Iterator[None]:
    """Modules that are made in here have sharded parameters; without a mesh, whole ones."""
    if mesh is None:
        yield
        return

    def cut(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or isinstance(parameter, DTensor):
            return None
        return nn.Parameter(split(parameter.detach(), mesh), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(cut)  # type: ignore[arg-type]
    try:
        with _Whole():
            yield
    finally:
        handle.remove()


def shard(module: nn.Module, units: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """FSDP2 over a module, in place; each of the `units` is gathered by itself, then the rest.

    Gradients are summed over the ranks, not averaged: each rank's loss is its part of one sum.
    """
    kept = {}
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            value = parameter if isinstance(parameter, DTensor) else split(parameter.data, mesh)
            kept[f"{path}.{name}" if path else name] = value
            bare = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            owner.register_parameter(name, nn.Parameter(bare, parameter.requires_grad))
    for part in (*units, module):
        # The outermost module too gives its parameters back after a forward pass: one without a
        # backward pass, as in an evaluation, would else leave them whole.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        sharded = cast(FSDPModule, part)
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_gradient_divide_factor(1.0)
    module.load_state_dict(kept, strict=False, assign=True)  # buffers stay as they are


def touch(module: nn.Module) -> Tensor:
    """Nothing, from every parameter that is whole at the moment: all ranks then have its gradient.

    A batch need not use all of a model, and another rank's batch may use more of it; ranks that
    bring different gradients to one exchange wait for each other for ever. For the end of the
    outermost forward: the `units` have given their parameters back by then, and are always used.
    """
    gathered = (p for p in module.parameters() if not isinstance(p, DTensor) and p.requires_grad)
    return torch.stack([p.flatten()[0] * 0 for p in gathered]).sum()


def drop_untouched(module: nn.Module) -> None:
    """Take away gradients that are nothing but zeros, on all ranks: what nothing used is to stay.

    `touch` makes them where a model is sharded, and ABSENT tokens do anywhere: to decay, or to move
    on by its momentum, a weight must have been used.
    """
    found = [(p, p.grad) for p in module.parameters() if p.grad is not None]
    if not found:
        return
    local = (grad.to_local() if isinstance(grad, DTensor) else grad for _, grad in found)
    marks = torch.stack([grad.ne(0).any() for grad in local]).to(torch.int32)
    if dist.is_initialized():
        dist.all_reduce(marks, dist.ReduceOp.MAX)
    for (parameter, _), mark in zip(found, marks.tolist(), strict=True):
        if not mark:
            parameter.grad = None


def gather(module: nn.Module) -> dict[str, Tensor]:
    """The whole weights on the CPU of rank 0, tensor by tensor; nothing elsewhere."""
    whole = {}
    for name, value in module.state_dict().items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if dist.get_rank() == 0:
            whole[name] = full.detach().cpu()
    return whole


# ------------------------------------------------------------------------------------ checkpoints


def folders(run_dir: Path) -> dict[int, Path]:
    """The whole sharded checkpoints of a run, by step."""
    found = {}
    for folder in run_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and (folder / ".metadata").exists():
            found[int(match[1])] = folder
    return found


def save(folder: Path, content: dict[str, Any]) -> None:
    """Write a tree with sharded tensors in it; every rank calls it, and fails when one does.

    What is not sharded is taken from rank 0. Raises `CheckpointException`.
    """
    tensors: dict[str, Tensor] = {}

    def pull(tree: Any, path: str) -> Any:
        if isinstance(tree, DTensor):
            tensors[path] = tree.detach()
            return {_SHARD: path}
        if isinstance(tree, dict):
            return {key: pull(value, f"{path}/{key}") for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return [pull(value, f"{path}/{place}") for place, value in enumerate(tree)]
        return tree

    buffer = io.BytesIO()
    torch.save(pull(content, ""), buffer)
    rest = [buffer.getvalue()]
    dist.broadcast_object_list(rest, src=0)
    tensors[_REST] = torch.frombuffer(bytearray(rest[0]), dtype=torch.uint8)
    state_dict_saver.save(tensors, checkpoint_id=folder)


def load(folder: Path, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Read what `save` wrote, sharded over `mesh`, or whole without one."""
    reader = FileSystemReader(folder)
    tensors: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), name
        if mesh is None or name == _REST:
            tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        else:
            tensors[name] = empty_shards(
                entry.size, dtype=entry.properties.dtype, device_mesh=mesh, placements=[Shard(0)]
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_loader.load(tensors, storage_reader=reader, no_dist=mesh is None)
    rest = torch.load(io.BytesIO(tensors.pop(_REST).numpy().tobytes()), weights_only=True)

    def put(tree: Any) -> Any:
        if isinstance(tree, dict):
            if tree.keys() == {_SHARD}:
                return tensors[tree[_SHARD]]
            return {key: put(value) for key, value in tree.items()}
        return [put(value) for value in tree] if isinstance(tree, list) else tree

    return cast("dict[str, Any]", put(rest))


def spread(tree: Any, mesh: DeviceMesh) -> Any:
    """A tree that one process saved, its tensors sharded; numbers of no axis stay whole."""
    return tree_map(
        lambda leaf: split(leaf, mesh) if isinstance(leaf, Tensor) and leaf.dim() else leaf, tree
    )
