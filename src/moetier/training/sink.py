"""What backward needs to know of those who train the experts, and gives them: versions, and gradients.

Without a sink all experts are frozen: backward gives gradients of hidden states and gate weights only.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from moetier.access import Access, ExpertKey
from moetier.lease import Lease

Gradients = dict[str, torch.Tensor]
"""An expert's gradients by field, each in the field's shape and dtype."""

Add = Callable[[ExpertKey, Gradients], None]


Batches = Generator[Sequence[Lease], None, None]

Take = Callable[[Access, int | None], Batches]
"""`ExpertCache.batches`: an access, and how many leases at most come at once."""


class Sink(Protocol):
    """Trains experts: set as `model.moetier.sink`. Called by the thread that runs forward or backward.

    A gradient is of the sum of the rows that one layer's forward gave the expert. How several of them add up (uses in
    one step, micro-batches) is the sink's business; they come in the order in which autograd runs the layers backward,
    which is fixed, and within a layer in the order in which the experts became ready, which is not.
    """

    def trains(self, layer: int) -> bool:
        """Whether the layer's experts want gradients. Asked in every forward that autograd records."""

    def version(self, key: ExpertKey) -> int:
        """How often the expert's weights were changed so far. Backward raises if it is not what forward saw."""

    def fresh(self, access: Access, lease: Take) -> Batches:
        """The leases of a forward, with or without autograd, on their way to the math. Closed in the end.

        Here experts that missed updates can have them, on leases that may be changed (`writes`) or by an access of the
        sink's own, counted in `version`. Return `lease(access, None)` where there is nothing to do. Not called for
        backward.
        """

    def collect(self, access: Access) -> AbstractContextManager[Add]:
        """Around one layer's backward: `with sink.collect(access) as add:`, then `add(key, gradients)` once a key.

        `access.keys` are all that will come, in any order, unless an error ends the block. `add` is called while the
        key's weights are leased. The tensors are the sink's to keep; they are no views of slots.
        """
