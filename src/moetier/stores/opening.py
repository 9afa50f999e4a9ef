"""Which store serves a model: the packed one that was named, the one beside the checkpoint, or the checkpoint itself.

A store that does not belong to the checkpoint is refused, found or named; it is never passed over in silence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moetier.errors import ConfigError, StoreError
from moetier.record import RecordLayout
from moetier.stores.packed_index import INDEX, RESIDENT, SHARDS, PackedIndex
from moetier.stores.shards import Shards

NONE = "none"
SUFFIX = ".moetier"


def beside(folder: Path) -> Path:
    """Where the packed store of a model folder is looked for: `model` has it in `model.moetier`."""
    resolved = folder.absolute()
    return resolved.with_name(resolved.name + SUFFIX)


def find_packed(shards: Shards, layouts: Sequence[RecordLayout], store: str | None) -> PackedIndex | None:
    """The packed store for a checkpoint whose records have these layouts; None where there is none.

    `store` is a folder, "none", or None to look inside and beside the checkpoint's folder. Raises `ConfigError` for a
    folder that is no store and for another dtype, `StoreError` for a store that is damaged or belongs to another
    checkpoint.
    """
    model = shards.files[0].parent
    own = (model / INDEX).is_file()
    if own and store is not None and (store == NONE or Path(store).resolve() != model.resolve()):
        raise ConfigError(f"store: {model} is itself a packed store, and its experts are nowhere else; leave store out")
    if store == NONE:
        return None
    if own:
        index = PackedIndex.load(model)
    elif store is not None:
        folder = Path(store).expanduser()
        if not (folder / INDEX).is_file():
            raise ConfigError(f"store: {no_store(folder)}")
        index = PackedIndex.load(folder)
    else:
        folder = beside(model)
        if not (folder / INDEX).is_file():
            return None
        index = PackedIndex.load(folder)
    check(index, shards, layouts, own)
    return index


def check(index: PackedIndex, shards: Shards, layouts: Sequence[RecordLayout], own: bool = False) -> None:
    """Raise unless the store was packed from this checkpoint, as it is now, in these layouts."""
    model = shards.files[0].parent
    out = f"pack it anew (moetier pack {model} {index.folder} --replace), or read the checkpoint itself (store none)"
    if not own and (index.fingerprint, index.witness) != (shards.fingerprint(), shards.witness()):
        raise StoreError(
            f"{index.folder}: packed from {index.model or 'another checkpoint'}, but not from {model} as it is now: "
            f"that is another checkpoint, or was changed since; {out}"
        )
    if list(index.layouts) == list(layouts):
        return
    has, asked = _dtypes(index.layouts), _dtypes(layouts)
    if has != asked:
        raise ConfigError(
            f"store: {index.folder} holds the experts in {has}, but {asked} is asked for; leave dtype out, or pack "
            f"another store (moetier pack MODEL OUT --dtype {asked})" + ("" if own else ", or use store none")
        )
    raise StoreError(f"{index.folder}: its records are laid out for another version of transformers or moetier; {out}")


def original_shards(folder: Path) -> Shards:
    """The checkpoint that a packed store was made from, known by its headers. Raises `StoreError`."""
    index = PackedIndex.load(folder)
    files = [(folder / name, folder / SHARDS / f"{name}.header", nbytes) for name, nbytes in original_files(folder)]
    return Shards.from_headers(files, index.fingerprint, index.witness)


def original_files(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes in bytes of the shards that a packed store was made from. Raises `StoreError`."""
    path = folder / SHARDS / "files.json"
    try:
        return [(Path(str(item["name"])).name, int(item["bytes"])) for item in json.loads(path.read_bytes())]
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}; restore it") from error
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path}: damaged; pack the model again") from error


def shards_of(files: Sequence[Path], known: Shards | None = None) -> Shards:
    """The shards behind the files that the loader opens: a packed folder's stand for those it was made from.

    `known` has been read and validated before; where it is of these files they are not read again.
    """
    packed = len(files) == 1 and files[0].name == RESIDENT and (files[0].parent / INDEX).is_file()
    if known is not None and (known.files[0].parent == files[0].parent if packed else known.files == tuple(files)):
        return known
    if packed:
        return original_shards(files[0].parent)
    return Shards.from_files(files)


def no_store(folder: Path) -> str:
    """Why a folder is not a finished store."""
    try:
        PackedIndex.load(folder)
    except StoreError as error:
        return str(error)
    return ""


def _dtypes(layouts: Sequence[RecordLayout]) -> str:
    found = dict.fromkeys(str(f.dtype).removeprefix("torch.") for layout in layouts for f in layout.fields)
    return " and ".join(found)
