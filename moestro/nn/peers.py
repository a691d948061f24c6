"""Who else holds tokens of the same micro-batch: what a router must know to act as if it saw all of them.

Counts and means of a micro-batch are taken over every rank's tokens, so that balance, budgets and cut-offs do not
depend on how the batch is laid out. One rank alone has no peers; `dist.mesh.Axis` is one of several.

Dimension key:  T tokens   X anything
"""

from typing import Protocol

from torch import Tensor


class Peers(Protocol):
    """Collectives over the ranks that share a micro-batch; neither is differentiated."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        ...

    def gather(self, rows_TX: Tensor) -> tuple[Tensor, slice]:
        """All ranks' rows, in the order of ranks, and which of them are ours."""
        ...


class Alone:
    """All tokens are here."""

    def sum(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def gather(self, rows_TX: Tensor) -> tuple[Tensor, slice]:
        """The rows themselves."""
        return rows_TX, slice(None)
