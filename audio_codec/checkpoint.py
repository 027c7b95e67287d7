"""A checkpoint is a directory: `config.json`, `model.safetensors`, other files, `card.json`.

Weights are stored in float32, bfloat16, or int8 with one scale a row (matrices only). A loaded
checkpoint always gives float32 tensors, so that what was stored never matters to who computes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from audio_codec.errors import Unreachable, UserError
from audio_codec.files import check_writable

StoredType = Literal["fp32", "bf16", "int8"]
_SCALE = "::scale"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint directory holds."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    card: dict[str, Any] = field(default_factory=dict)


@functools.cache
def shipped() -> dict[str, Path]:
    """Folders of the weights that ship inside installed packages, by name.

    A package names them in its metadata (entry points of the group `speechlm.weights`, as
    `package.folder.name`), so that every process finds them, whatever it has imported.
    """
    found = {}
    for entry in importlib.metadata.entry_points(group="speechlm.weights"):
        package, *folders = entry.value.split(".")
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            found[entry.name] = Path(spec.origin).parent.joinpath(*folders)
    return found


def resolve(name_or_path: str | Path, files: Sequence[str] = ("*",)) -> Path:
    """The local directory of a shipped name or a folder in it (`tiny/codec`), a path, or
    `hf://organisation/name[/folder]`.

    From the hub come the files below the folder that fit one of the patterns `files`.
    Raises UserError when there is no such directory, Unreachable when the hub does not answer.
    """
    text = str(name_or_path)
    name, _, folder = text.partition("/")
    if name in shipped() and os.path.isdir(inside := shipped()[name] / folder):
        return inside
    if text.startswith("hf://"):
        return _from_hub(text.removeprefix("hf://"), files)
    if not os.path.isdir(text):  # never raises; Path.is_dir does when a name is too long
        names = ", ".join(sorted(shipped())) or "none"
        raise UserError(
            f"model '{text}' is neither a directory nor hf://organisation/name nor one of the "
            f"shipped names ({names})."
        )
    return Path(text)


def _from_hub(address: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
    )

    parts = address.split("/")
    if len(parts) < 2:
        raise UserError(f"model 'hf://{address}' must name organisation and model: hf://org/name.")
    inside = "".join(f"{part}/" for part in parts[2:])
    try:
        wanted = [inside + pattern for pattern in files]
        root = Path(snapshot_download("/".join(parts[:2]), allow_patterns=wanted))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UserError(f"model 'hf://{address}' is not on the hub: {error}") from error
    except Exception as error:  # Whatever the hub's own client lets through of its transport.
        raise Unreachable(f"model 'hf://{address}' could not be fetched: {error}") from error
    return root.joinpath(*parts[2:])


def _pack(tensors: Mapping[str, Tensor], dtype: StoredType) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if not value.is_floating_point() or dtype == "fp32":
            packed[name] = value.clone()
        elif dtype == "int8" and value.dim() == 2 and min(value.shape) >= 16:
            scale = value.float().abs().amax(1).clamp(min=1e-12) / 127
            packed[name] = (value.float() / scale[:, None]).round().to(torch.int8)
            packed[name + _SCALE] = scale
        else:
            # A vector costs little and a bias or a norm is worth its digits.
            packed[name] = value.to(torch.bfloat16) if value.dim() > 1 else value.clone()
    return packed


def _unpack(stored: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, value in stored.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in stored:
            continue
        scale = stored.get(name + _SCALE)
        if scale is None:
            tensors[name] = value.float() if value.is_floating_point() else value
        elif value.dim() != 2 or scale.shape != value.shape[:1] or not scale.is_floating_point():
            raise UserError(
                f"weights in '{where}': tensor '{name}{_SCALE}' is {_kind(scale)}, expected a "
                f"floating-point number for each row of '{name}', which is {_kind(value)}."
            )
        else:
            tensors[name] = value.float() * scale.float()[:, None]
    return tensors


def _kind(tensor: Tensor) -> str:
    """What a message calls a tensor: its type and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def save(
    directory: str | Path,
    config: BaseModel,
    tensors: Mapping[str, Tensor],
    *,
    dtype: StoredType = "bf16",
    files: Mapping[str, bytes] | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint directory; the old one is replaced only once the new one is whole.

    Raises UserError where `check_replaceable` does.
    """
    check_replaceable(directory)
    target = Path(directory).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh.chmod(0o755)
        (fresh / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
        # Other programs ask which framework wrote a file.
        save_file(_pack(tensors, dtype), fresh / "model.safetensors", {"format": "pt"})
        (fresh / "model.safetensors").chmod(0o644)  # safetensors writes for the owner's eyes alone
        for name, content in (files or {}).items():
            (fresh / name).write_bytes(content)
        if card is not None:
            (fresh / "card.json").write_text(json.dumps(dict(card), indent=2) + "\n")
        replace_directory(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return Path(directory)


def check_replaceable(directory: str | Path) -> None:
    """Raise UserError when `directory` holds something else than a checkpoint; touch nothing.

    A run that may not write its result should know before it begins.
    """
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise UserError(f"output '{path}' is a file; name a folder for the checkpoint.")
    if path.is_dir() and any(path.iterdir()) and not any(path.glob("*.safetensors")):
        raise UserError(
            f"output '{path}' holds something else than a checkpoint; name a new or empty folder."
        )
    check_writable(path.resolve().with_name(f".{path.name}-"))  # beside it, where it is made


def replace_directory(fresh: Path, target: Path) -> None:
    """Move `fresh` to `target`; a checkpoint that was there stays whole until the very last step.

    A process killed between the two moves leaves it beside, whole, as `.<name>-old-<number>`.
    Raises UserError where `check_replaceable` does.
    """
    check_replaceable(target)
    target = target.resolve()
    if not target.exists():
        fresh.rename(target)
        return
    # A number of its own: what a killed process left must not stand in the way.
    old = target.with_name(f".{target.name}-old-{secrets.token_hex(4)}")
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


class _Stored(Mapping[str, Tensor]):
    """The tensors of some files as `_unpack` gives them, each read when it is asked for."""

    def __init__(self, files: Sequence[Path], where: Path) -> None:
        self._where = where
        self._files = {name: file for file in files for name in tensor_names(file)}

    def __getitem__(self, name: str) -> Tensor:
        found = {name: _read_one(self._files[name], name)}
        if (scale := name + _SCALE) in self._files:
            found[scale] = _read_one(self._files[scale], scale)
        return _unpack(found, self._where)[name]

    def __iter__(self) -> Iterator[str]:
        scales = {name + _SCALE for name in self._files}
        return (name for name in self._files if name not in scales)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def load(
    name_or_path: str | Path, weights: str = "*.safetensors", lazily: bool = False
) -> Checkpoint:
    """Read a checkpoint directory. Raises UserError that names what is missing or broken.

    `weights`: pattern of the files that hold them, where there are others beside. `lazily` reads
    each tensor when it is looked up, and anew each time: for who must not hold all of them.
    """
    path = resolve(name_or_path)
    config = read_json(path / "config.json")
    files = sorted(path.glob(weights))
    if not files:
        raise UserError(f"model '{path}' has no {weights} file.")
    card = read_json(path / "card.json") if (path / "card.json").exists() else {}
    if lazily:
        return Checkpoint(path, config, _Stored(files, path), card)
    stored: dict[str, Tensor] = {}
    for file in files:
        stored.update(_read_file(file))
    return Checkpoint(path, config, _unpack(stored, path), card)


def digest(name_or_path: str | Path) -> str:
    """A name for the very weights in a checkpoint directory: SHA-256 over its files of them.

    Raises UserError where `resolve` does.
    """
    found = hashlib.sha256()
    for file in sorted(resolve(name_or_path).glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights '{file}' are truncated or corrupt: {error}") from error


def _read_one(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            tensor = opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights '{file}' are truncated or corrupt: {error}") from error
    assert isinstance(tensor, Tensor)
    return tensor


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises UserError when it is truncated or corrupt."""
    return _unpack(_read_file(file), file)


def tensor_names(file: Path) -> set[str]:
    """Names of the tensors in a file, from its header alone; UserError as `read_weights`."""
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights '{file}' are truncated or corrupt: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError when there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"file '{path}' cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"file '{path}' must hold a JSON object.")
    return value


ConfigType = TypeVar("ConfigType", bound=BaseModel)


def parse_config(model: type[ConfigType], checkpoint: Checkpoint) -> ConfigType:
    """A checkpoint's config as `model`; UserError that names the first field that does not fit."""
    try:
        return model.model_validate(checkpoint.config)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(map(str, first["loc"]))
        where = f"field '{field_name}': " if field_name else ""  # or a rule about the whole
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(f"config of '{checkpoint.path}': {where}{said}.") from error


def check(expected: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Raise UserError unless a checkpoint holds exactly the `expected` names, shapes and types.

    The message names the tensor and what was expected: missing, unknown, of another shape or type,
    or not finite. Any floating-point type will do for another; what `expected` holds is not read.
    """
    where = checkpoint.path
    for name, tensor in expected.items():
        found = checkpoint.tensors.get(name)
        if found is None:
            raise UserError(
                f"weights in '{where}': tensor '{name}' is missing, expected {_kind(tensor)}."
            )
        if found.shape != tensor.shape:
            raise UserError(
                f"weights in '{where}': tensor '{name}' has shape {tuple(found.shape)}, "
                f"expected {tuple(tensor.shape)}."
            )
        floating = tensor.is_floating_point()
        if found.is_floating_point() != floating or not (floating or found.dtype == tensor.dtype):
            raise UserError(
                f"weights in '{where}': tensor '{name}' is {_kind(found)}, "
                f"expected {_kind(tensor)}."
            )
        if floating and not bool(torch.isfinite(found).all()):
            raise UserError(
                f"weights in '{where}': tensor '{name}' holds NaN or infinity, "
                "expected finite numbers."
            )
    if unknown := sorted(checkpoint.tensors.keys() - expected.keys()):
        raise UserError(f"weights in '{where}': tensor '{unknown[0]}' has no place in this model.")


def restore(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's tensors into a module; UserError where `check` raises one."""
    own = module.state_dict()
    check(own, checkpoint)
    with torch.no_grad():
        for name, tensor in own.items():  # not load_state_dict, which would hold all of them
            tensor.copy_(checkpoint.tensors[name])
