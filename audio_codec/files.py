"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from audio_codec.errors import UserError


def check_writable(path: str | Path) -> None:
    """Raise UserError when no file can be written at `path`; touch nothing."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file.")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"Cannot write {path}: {folder} is no folder.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"Cannot write {path}: the folder {folder} may not be written.")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it takes the place of `path`.

    When the body raises, or dies, what stood at `path` before is untouched. Missing parent folders
    are made. Raises UserError where `check_writable` does.
    """
    path = Path(path)
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
