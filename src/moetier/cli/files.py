"""Files that commands write for people: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from moetier.errors import StoreError


def write_text(path: str | os.PathLike[str], text: str, flag: str) -> None:
    """Write a text file; pipes and devices (`/dev/stdout`) are written straight. Raises `StoreError` naming `flag`."""
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
            return
        real = target.resolve()
        draft = real.with_name(f".{real.name}.{os.getpid()}.tmp")
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, real)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{flag} {path}: could not be written: {error.strerror}") from error
