"""Text files as blocks of tokens, all of the same length, for causal language models.

The texts are read one after the other in the order given, folders sorted by name; each is tokenised whole, ends with
the tokenizer's end token if it has one, and what is left behind the last block is dropped. Tokens are kept in memory,
four bytes each. Knows no model and no order of training.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetier.errors import CheckpointError, ConfigError, StoreError

SUFFIXES = (".txt", ".md", ".rst", ".text")  # of a folder's files that are read


@dataclass(frozen=True, slots=True)
class Blocks:
    """Tokens [N, sequence length], where they came from, and a digest of them and of their order."""

    tokens: NDArray[np.int32]
    files: int
    digest: str

    def __len__(self) -> int:
        return len(self.tokens)


def files_of(texts: Sequence[str], flag: str) -> list[Path]:
    """The files that are meant by files and folders. Raises `StoreError` naming `flag` for what is not there."""
    found: list[Path] = []
    for text in texts:
        path = Path(text).expanduser()
        if not path.is_dir():
            if not path.is_file():
                raise StoreError(f"{flag} {text}: no such file or folder")
            found.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not inside:
            raise StoreError(f"{flag} {text}: the folder has no text files ({', '.join(SUFFIXES)}); name the files")
        found += inside
    return found


def read(files: Sequence[Path], flag: str) -> Iterator[str]:
    """The texts. Raises `StoreError` naming `flag` and the file."""
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise StoreError(f"{flag} {file}: not a text in UTF-8") from None
        except OSError as error:
            raise StoreError(f"{flag} {file}: cannot be read: {error.strerror or error}") from None


def blocks_of(texts: Sequence[str], tokenizer: Any, length: int, flag: str = "texts") -> Blocks:
    """Tokenise files and folders into blocks of `length` tokens.

    Raises `StoreError` for texts that cannot be read, `ConfigError` where they do not fill one block.
    """
    files = files_of(texts, flag)
    end = tokenizer.eos_token_id
    parts: list[NDArray[np.int32]] = []
    for text in read(files, flag):
        ids = tokenizer(text, verbose=False)["input_ids"]
        if ids and end is not None and ids[-1] != end:
            ids = [*ids, end]
        parts.append(np.asarray(ids, dtype=np.int32))
    tokens = np.concatenate(parts)
    count = len(tokens) // length
    if not count:
        raise ConfigError(
            f"{flag}: {len(tokens)} tokens in {'1 file' if len(files) == 1 else f'{len(files)} files'} do not fill one "
            f"sequence of {length}; give more text, or a smaller sequence_length"
        )
    tokens = tokens[: count * length].reshape(count, length)
    return Blocks(tokens, len(files), hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest())


def check_vocabulary(blocks: Blocks, known: int) -> None:
    """Raise `CheckpointError` for tokens that the model does not know."""
    highest = int(blocks.tokens.max())
    if highest >= known:
        raise CheckpointError(
            f"the tokenizer gives token {highest} but the model knows {known} tokens: their files do not belong "
            "together"
        )


def absolute(text: str) -> str:
    """A file or folder as it is found from everywhere; anything else (a hub id) as it is."""
    path = Path(text).expanduser()
    return os.path.abspath(path) if path.exists() else text
