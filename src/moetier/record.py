"""How one expert's bytes lie in a slot: named fields, one behind the other.

Knows shapes, dtypes and offsets; knows no files, devices or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

FIELD_ALIGNMENT = 64  # bytes: a cache line, and enough for every vector load
PAGE = 4096  # bytes: slots start on a page, so that direct reads can land in them


def round_up(nbytes: int, multiple: int) -> int:
    """The smallest multiple that is not below `nbytes`."""
    return -(-nbytes // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of an expert: its shape without the experts dimension, and its byte range in the record."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """The fields of one expert in order of their offsets; `nbytes` is the whole record."""

    fields: tuple[Field, ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> RecordLayout:
        """Lay out (name, dtype, shape) tensors in the given order."""
        fields: list[Field] = []
        offset = 0
        for name, dtype, shape in tensors:
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            fields.append(Field(name, dtype, shape, offset, nbytes))
            offset = round_up(offset + nbytes, FIELD_ALIGNMENT)
        return cls(tuple(fields), fields[-1].offset + fields[-1].nbytes)

    def views(self, record: torch.Tensor) -> dict[str, torch.Tensor]:
        """Typed views of a flat uint8 tensor that holds the record; nothing is copied.

        Ordinary tensors, where this is called in inference mode too: they may be kept, and be trained afterwards.
        """
        with torch.inference_mode(False):
            return {
                field.name: record[field.offset : field.offset + field.nbytes].view(field.dtype).view(field.shape)
                for field in self.fields
            }
