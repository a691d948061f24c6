"""What ranks tell each other of their time every few steps: for the log, the report, and the shares of the batch.

CLOCK -> agree -> Spent of every step -> News("timeline")         -> Shares.learn -> News("shares")
"""

from dataclasses import dataclass
from typing import Any

from moestro.dist.mesh import Mesh
from moestro.dist.timeline import CLOCK, PARTS, Spent, agree
from moestro.train.shares import Shares

EVERY = 5
"""Steps between two accounts; each costs a small message per group of ranks."""


@dataclass(frozen=True, slots=True)
class News:
    """Something for the event log."""

    event: str
    step: int
    fields: dict[str, Any]
    text: str = ""
    """For people; empty where it is not worth a line."""


class Ledger:
    """The accounts of all ranks, and what follows from them."""

    def __init__(self, mesh: Mesh, shares: Shares, every: int) -> None:
        self.mesh, self.shares, self.every = mesh, shares, every

    def news(self, step: int, last: bool) -> tuple[list[Spent], list[News]]:
        """Of the steps since the last account, where one is due; all ranks call it after every step."""
        if step % self.every and not last:
            return [], []
        spent = agree(CLOCK, self.mesh)
        news = [
            News("timeline", one.step, {f"{part}_s": [round(s, 6) for s in one.of(part)] for part in PARTS})
            for one in spent
        ]
        if self.shares.learn(spent):
            row_P = self.shares.cut(self.shares.rows)
            shown = " ".join(map(str, row_P))
            text = f"step {step}  batch shares by measured speed: {shown} of {self.shares.rows} rows of a micro-batch"
            news.append(News("shares", step, {"rows": row_P}, text))
        return spent, news
