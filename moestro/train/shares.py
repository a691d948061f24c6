"""How many rows of a batch each rank gets: an even split, a given one, or as many as it can do in the same time.

    dist.shares = "even" | "3:1" | "measured" -> Shares -> cut(rows) -> rows of every part of dp

A row is a whole sequence, so shares come in steps of one row of a micro-batch, train.sequences / train.micro_batches of
them in all; every micro-batch is cut alike. Losses are parts of the whole batch's mean (`Ranks.own_rows`), so shares
change nothing but the order of sums. Ranks of one place in dp (tensor parallel) get the same rows.

measured: the first cut is even. From the seconds that ranks spend on their own work (`dist.timeline`, waiting left
out) follows what a row costs on each; rows are dealt so that the slowest part ends as early as can be. Work that does
not depend on rows (the update, other ranks' tokens at our experts) counts as if it did, so the first correction is too
small, never too large, and repeating it leads to equal times. All ranks decide from the same numbers, after the same
step. A cut is kept unless another promises to save 5 % of the slowest part's time: noise must not move rows to and fro.

Dimension key:  P parts of dp
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from statistics import median

from moestro.core.errors import ConfigError
from moestro.dist.layout import Layout
from moestro.dist.spec import DistSpec
from moestro.dist.timeline import Spent
from moestro.train.recipe import Recipe

FIRST_STEPS = 4
"""Steps from which the first measured cut is made."""
WORTH = 0.05
"""Share of the slowest part's time that another cut must promise to save."""


class Shares:
    """The present cut."""

    def __init__(self, spec: DistSpec, layout: Layout, rows: int) -> None:
        self.rows, self.every, self.measures = rows, spec.shares_every, spec.shares == "measured"
        groups = layout.groups("dp")
        self.ranks_P = [[group[part] for group in groups] for part in range(layout.dp)]
        self.weight_P = spec.share_weights or [Fraction(1)] * layout.dp
        self._second_SP: list[list[float]] = []
        self._wait = FIRST_STEPS + 1  # of which the first is left out: it compiles and allocates

    def cut(self, rows: int) -> list[int]:
        """Rows of every part; neighbouring parts get neighbouring rows."""
        total, sum_P = sum(self.weight_P), [sum(self.weight_P[:part]) for part in range(len(self.weight_P) + 1)]
        end_P = [int(rows * share / total) for share in sum_P]
        return [stop - start for start, stop in pairwise(end_P)]

    def own(self, rows: int, part: int) -> slice:
        """Which of so many rows are a part's."""
        row_P = self.cut(rows)
        return slice(sum(row_P[:part]), sum(row_P[: part + 1]))

    def learn(self, spent: Sequence[Spent]) -> bool:
        """Take in steps that all ranks know the times of; True where rows are cut anew from now on."""
        if not self.measures:
            return False
        for one in spent:
            compute_W = one.of("compute")
            self._second_SP.append([max(compute_W[rank] for rank in ranks) for ranks in self.ranks_P])
        if len(self._second_SP) < self._wait:
            return False
        second_P = [median(seconds) for seconds in zip(*self._second_SP[1:], strict=True)]
        self._second_SP, self._wait = [], self.every
        row_P = self.cut(self.rows)
        wanted_P = deal(self.rows, [second / max(rows, 1) for second, rows in zip(second_P, row_P, strict=True)])
        promised_s = max(
            second * wanted / max(rows, 1) for second, wanted, rows in zip(second_P, wanted_P, row_P, strict=True)
        )
        if promised_s > (1 - WORTH) * max(second_P):
            return False
        self.weight_P = [Fraction(rows) for rows in wanted_P]
        return True

    def state(self) -> list[int]:
        """The measured cut, for checkpoints; empty where the recipe says it."""
        return self.cut(self.rows) if self.measures else []

    def restore(self, row_P: list[int]) -> None:
        """Go on with the cut of a checkpoint, where as many parts wrote it and it measures still."""
        if self.measures and len(row_P) == len(self.weight_P):
            self.weight_P, self._wait = [Fraction(rows) for rows in row_P], self.every


def deal(rows: int, second_P: Sequence[float]) -> list[int]:
    """Rows of every part, so that the slowest ends as early as can be; each gets one at least.

    second_P   what a row costs a part
    """
    row_P = [1] * len(second_P)
    for _ in range(rows - len(row_P)):
        end_P = [(have + 1) * second for have, second in zip(row_P, second_P, strict=True)]
        row_P[end_P.index(min(end_P))] += 1
    return row_P


def check_shares(recipe: Recipe, layout: Layout, rows: int) -> None:
    """Raise ConfigError for shares that cannot be; `rows` are those of a micro-batch."""
    spec, weights = recipe.dist, recipe.dist.share_weights
    if not weights and rows < layout.dp:
        raise ConfigError(
            f"train.sequences / train.micro_batches is {rows}; it must be {layout.dp} or more, one for each part of "
            f"the batch ({layout.text()}): raise train.sequences or lower train.micro_batches"
        )
    if spec.shares == "even":
        return
    if layout.pp > 1 or spec.sync != "step":
        raise ConfigError(
            f"dist.shares is {spec.shares} with dist.pp {layout.pp} and dist.sync {spec.sync}; a pipeline moves equal "
            "pieces and copies that learn apart count alike: choose dist.shares=even, or dist.pp=1 dist.sync=step"
        )
    if weights and len(weights) != layout.dp:
        raise ConfigError(
            f"dist.shares is {spec.shares}, {len(weights)} numbers; it must have {layout.dp}, one for each part of the "
            f"batch, dp_replicate x dp_shard = {layout.dp_replicate} x {layout.dp_shard}"
        )
