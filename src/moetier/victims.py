"""Who may leave a tier for whom: the policy's order, without what must stay.

Part of the residency core: plain functions over its books.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from moetier.access import Access, ExpertKey, Part
from moetier.tiers import READY, Entry, Room, Tier

if TYPE_CHECKING:
    from moetier.residency import Residency


def room_in(
    core: Residency, tier: Tier, wanted: int, access: Access, above: Room | None = None, background: bool = False
) -> Room:
    """What a tier can give to a batch of misses that would displace up to `wanted` records.

    `above` is what the tier above gives to them; in the `background` nobody waits for what is asked for.
    """
    room = Room(tier, access, background)
    need = wanted - max(0, room.spare)
    if need > 0:
        exclusive = core._exclusive
        if exclusive is None or tier.index > 1:
            victims = eligible(core, tier, need, access, background)
        elif tier is core._top:
            victims = exclusive.leavers(need, access, background)
        else:
            victims = exclusive.places(need, access, above, background)
            room.doubles = exclusive.doubles
        room.victims = victims[::-1]
    return room


def eligible(core: Residency, tier: Tier, need: int, access: Access, background: bool = False) -> list[Entry]:
    """Up to `need` victims in the policy's order, the per-layer floor respected while others exist.

    In the `background` nothing goes that was just loaded.
    """
    entries, floor = tier.entries, tier.config.floor
    kept: Collection[ExpertKey] = ()
    if tier is core._top:
        kept = core._pinned
    elif core._exclusive is not None and tier.index == 1:
        kept = core._exclusive.doubles  # they go before the policy is asked
    wanted = None if tier is core._top else core._wanted
    picked: list[Entry] = []
    below_floor: list[Entry] = []
    taken: dict[int, int] = {}
    for key in tier.policy.victims(access):
        entry = entries[key]
        if entry.leases or entry.state is not READY or (kept and key in kept):
            continue
        if wanted and wanted[key]:  # an access still needs it from here
            continue
        if background and is_new(core, entry):
            continue
        if floor:
            layer = key[0]
            if layer != access.layer and tier.residents[layer] - taken.get(layer, 0) <= floor:
                below_floor.append(entry)
                continue
            taken[layer] = taken.get(layer, 0) + 1
        picked.append(entry)
        if len(picked) == need:
            return picked
    return picked + below_floor[: need - len(picked)]


def is_new(core: Residency, entry: Entry) -> bool:
    """Loaded in this round of the model; if it was prefetched and not demanded yet, in this or the last.

    In a training step the order is known, and a pass has no use for what it left behind: only what was not demanded yet
    is new, and whatever the next layer may need.
    """
    last = core._last
    if last.part is not Part.SERVE:  # updates go up through the layers, as forward does
        return entry.prefetched or entry.key.layer == last.layer + (-1 if last.part is Part.BACKWARD else 1)
    return entry.round >= core._round - entry.prefetched
