"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from audio_codec.errors import UserError

if TYPE_CHECKING:  # It brings fsspec along, which few need.
    from upath import UPath

    AnyPath = TypeVar("AnyPath", Path, UPath)

# What only a write meets: a full disk, a spent quota, a file too large, a read-only disk.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


def check_writable(path: str | Path) -> None:
    """Raise UserError when no file can be written at `path`; touch nothing."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file.")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a pipe or a device; name a file.")
    folder = path.resolve().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"Cannot write {path}: {folder} is no folder.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"Cannot write {path}: the folder {folder} may not be written.")


@contextmanager
def replacing(path: str | Path | UPath) -> Iterator[Path]:
    """Yield a temporary path; on a clean exit what was written there takes the place of `path`.

    When the body raises, or dies, what stood at `path` before is untouched. Missing parent folders
    are made. In a store that is no local disk (a `UPath` of S3, memory, …) the file is written on
    this machine and then sent under a temporary name, so that there too it appears whole.

    Raises UserError where `check_writable` does, and when the disk is full or the store refuses.
    """
    if not isinstance(path, (str, Path)):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            _send(temporary, path)
        return
    check_writable(path)
    path = Path(path).resolve()  # the file that a link names, not the link
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in _NO_ROOM or error.filename in _names(temporary, path):
            raise UserError(f"Cannot write {path}: {error.strerror}.") from error
        raise  # of another file, which the body read
    finally:
        temporary.unlink(missing_ok=True)


def _names(temporary: Path, path: Path) -> set[str | Path]:
    """How an error may name the file that is written, or the folders made for it."""
    return {temporary, path, *path.parents, str(temporary), str(path), *map(str, path.parents)}


def temporary_pattern(name: str) -> str:
    """Glob pattern of what a killed `replacing` leaves beside files whose name matches `name`."""
    return f".{name}.*.tmp"


def _beside(path: AnyPath) -> AnyPath:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _send(file: Path, target: UPath) -> None:
    temporary = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.fs.put_file(str(file), temporary.path)
        target.fs.mv(temporary.path, target.path)
    except OSError as error:
        raise UserError(f"Cannot write {target}: {error}.") from error
