"""Files that commands write for people: whole or not at all, named by their flag when they cannot be."""

from __future__ import annotations

import os
from pathlib import Path

from moetier.errors import ConfigError, StoreError
from moetier.files import draft_of


def check_writable(path: str | os.PathLike[str] | None, flag: str) -> None:
    """Refuse a file that could not be written, before minutes are spent on what it should hold."""
    if path is None:
        return
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if _is_stream(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(None, "no permission")
            return
        _, draft = draft_of(path)
        draft.touch()  # asking for permission is not enough: the file system may be read-only, or no place for files
        draft.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{flag} {path}: cannot be written ({reason}); give a file in a writable folder") from None


def check_file(path: str | os.PathLike[str] | None, flag: str) -> None:
    """The same for what is written as a file only: pipes and devices are refused too."""
    check_writable(path, flag)
    if path is not None and _is_stream(path):
        raise ConfigError(f"{flag} {path}: a pipe or device; give the name of a file")


def check_folder(path: str | os.PathLike[str], flag: str) -> None:
    """Refuse a folder that could not be written to, or made. Raises `ConfigError` naming `flag`."""
    folder = Path(path).expanduser().absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    draft = folder / f".moetier.{os.getpid()}.tmp"
    try:
        if not folder.is_dir():
            raise NotADirectoryError(None, f"{folder} is a file")
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be written ({error.strerror}); give another folder") from None


def write_text(path: str | os.PathLike[str], text: str, flag: str) -> None:
    """Write a text file; pipes and devices (`/dev/stdout`) are written straight. Raises `StoreError` naming `flag`."""
    try:
        if _is_stream(path):
            Path(path).write_text(text, encoding="utf-8")
            return
        target, draft = draft_of(path)
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{flag} {path}: could not be written: {error.strerror}") from error


def _is_stream(path: str | os.PathLike[str]) -> bool:
    """A pipe or device, which cannot be replaced."""
    return Path(path).exists() and not Path(path).is_file()
