"""A lease: what a stream hands out, an expert that stays in its slot while somebody works on it."""

from __future__ import annotations

import torch

from moetier.access import ExpertKey
from moetier.errors import MoetierError


class Lease:
    """An expert that stays where it is until the stream moves on. `fields` are views of its slot, not copies.

    It is in tier 0; `in_place`, in host memory although there is a device: for the CPU to compute. Only a
    `WritableLease` may change the fields.
    """

    __slots__ = ("fields", "in_place", "key", "slot")
    saved = False

    def __init__(self, key: ExpertKey, fields: dict[str, torch.Tensor], slot: int = -1, in_place: bool = False):
        self.key = key
        self.fields = fields
        self.slot = slot
        self.in_place = in_place

    @property
    def dirty(self) -> bool:
        """Whether the record was changed; setting it raises `MoetierError` where the access only reads."""
        return False

    @dirty.setter
    def dirty(self, value: bool) -> None:
        raise MoetierError(f"{self.key} was leased to be read; to change it, give its Access writes=True")


class WritableLease(Lease):
    """A lease of an access that `writes`. Who changes the fields sets `dirty`: the record is then written home before
    it loses its slot. (In place, after `cache.host.wait_unread(lease.slot)`: a copy to the device may still read it.)

    Who has made home the same as the fields by other means, or made sure that nobody reads them again (a gradient that
    was used), sets `saved`: nothing is written then, whatever was changed before.
    """

    __slots__ = ("dirty", "saved")

    def __init__(self, key: ExpertKey, fields: dict[str, torch.Tensor], slot: int = -1, in_place: bool = False):
        super().__init__(key, fields, slot, in_place)
        self.dirty = self.saved = False
