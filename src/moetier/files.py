"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetier.errors import ConfigError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A draft beside `path` that becomes it when the block ends well, and is removed when not.

    Raises `ConfigError` where the file cannot be written.
    """
    target, draft = draft_of(path)
    try:
        try:
            yield draft
            os.replace(draft, target)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise `ConfigError` for a file that could not be written, before minutes are spent on what it should hold."""
    _, draft = draft_of(path)
    try:
        draft.touch()  # asking for permission is not enough: the file system may be read-only
        draft.unlink()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error


def draft_of(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The file that is meant, and the one to write until it is whole."""
    target = Path(path).resolve()  # a link keeps leading to the file
    if target.is_dir():
        raise ConfigError(f"{path}: a folder; give the name of a file")
    return target, target.with_name(f".{target.name}.{os.getpid()}.tmp")
