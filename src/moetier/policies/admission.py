"""Admission: may a missed expert displace a resident one, or does it pass through a staging slot?"""

from __future__ import annotations

from typing import Protocol

from moetier.access import Access, ExpertKey, Part, Phase


class AdmissionPolicy(Protocol):
    """Decides miss by miss. Asked only when there is no free slot, so a cold cache always fills."""

    def admit(self, incoming: ExpertKey, victim: ExpertKey, access: Access) -> bool:
        """True: `incoming` takes the slot of `victim`. False: it is staged and dropped after its use."""


class Always:
    """Every miss is admitted: plain demand caching."""

    def admit(self, incoming: ExpertKey, victim: ExpertKey, access: Access) -> bool:
        """Admit."""
        return True


class DecodeOnly:
    """Misses of a prefill are staged, so that a long prompt does not wipe out the decode working set.

    A training step is no prefill: it comes back for what it used.
    """

    def admit(self, incoming: ExpertKey, victim: ExpertKey, access: Access) -> bool:
        """Admit unless the access belongs to a prefill."""
        return access.phase is not Phase.PREFILL or access.part is not Part.SERVE


ADMISSIONS: dict[str, type[AdmissionPolicy]] = {
    "always": Always,
    "decode-only": DecodeOnly,
}
