"""Which rank does what: arithmetic on rank numbers alone, without torch and without processes.

    DistSpec, ranks -> fit -> Layout -> groups("ep") -> [[0, 1], [2, 3]]

Ranks are numbered with tensor parallel fastest, then shards, copies, stages:

    rank = ((stage * dp_replicate + copy) * dp_shard + shard) * tp + part

Experts fold the same ranks in their own way (Megatron's parallel folding, Liu 2025): of the dp_shard x tp ranks of one
copy, ep neighbours hold different experts and the rest (edp) hold the same, so attention and experts each have the
sharding that suits them. Gradients of dense weights are summed over `dp`, those of experts over `edp`.
"""

from dataclasses import dataclass
from itertools import product
from math import gcd

import numpy as np
from numpy.typing import NDArray

from moestro.core.errors import ConfigError
from moestro.dist.spec import DistSpec

AXES = ("pp", "dp_replicate", "dp_shard", "tp", "dp", "ep", "ep_node", "ep_rail", "edp", "edp_shard", "stage", "stage_copy", "copy", "ends", "world")
"""dp: replicate x shard. edp: ranks with the same experts; edp_shard: those of one copy. stage: all of one pp stage; stage_copy: those of one copy. copy: all with one place on dp_replicate.
ends: the first and the last rank of a pipeline, which share a tied embedding. ep_node: the part of ep on one node; ep_rail: ranks in the same place on each of ep's nodes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the axes; their product is the number of ranks."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    ep: int = 1
    node: int = 0
    """Ranks of one node; 0: all."""
    expert_tp: bool = False
    """Experts are split over tp as well, and ep is carved out of dp_shard alone."""

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp_replicate * self.dp_shard * self.tp

    @property
    def dp(self) -> int:
        """Parts a micro-batch is cut into."""
        return self.dp_replicate * self.dp_shard

    @property
    def ep_node(self) -> int:
        """Neighbouring ranks of an expert group that are on one node."""
        return gcd(self.ep, self.node // self.etp or self.ep)

    @property
    def etp(self) -> int:
        """Parts of one expert."""
        return self.tp if self.expert_tp else 1

    @property
    def edp_shard(self) -> int:
        """Ranks of one copy that hold the same experts."""
        return self.dp_shard * self.tp // (self.ep * self.etp)

    def groups(self, axis: str) -> list[list[int]]:
        """All groups of ranks that differ only along an axis, each in its order along it."""
        dense = np.arange(self.world).reshape(self.pp, self.dp_replicate, self.dp_shard, self.tp)
        expert = dense.reshape(self.pp, self.dp_replicate, self.edp_shard, self.ep, self.etp)
        noded = expert.reshape(*expert.shape[:3], self.ep // self.ep_node, self.ep_node, self.etp)
        match axis:
            case "pp":
                return _along(dense, 0)
            case "dp_replicate":
                return _along(dense, 1)
            case "dp_shard":
                return _along(dense, 2)
            case "tp":
                return _along(dense, 3)
            case "dp":
                return _along(dense, 1, 2)
            case "ep":
                return _along(expert, 3)
            case "ep_node":
                return _along(noded, 4)
            case "ep_rail":
                return _along(noded, 3)
            case "edp":
                return _along(expert, 1, 2)
            case "edp_shard":
                return _along(expert, 2)
            case "stage":
                return _along(dense, 1, 2, 3)
            case "stage_copy":
                return _along(dense, 2, 3)
            case "copy":
                return _along(dense, 0, 2, 3)
            case "ends":
                whole = _along(dense, 0)
                ends = [[group[0], group[-1]] if len(group) > 1 else group for group in whole]
                return ends + [[rank] for group in whole for rank in group[1:-1]]
        assert axis == "world"
        return [list(range(self.world))]

    def text(self) -> str:
        """For people: the axes that split anything."""
        sizes = {name: getattr(self, name) for name in ("pp", "dp_replicate", "dp_shard", "tp", "ep")}
        return " ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "one rank"


def places(layout: Layout) -> int:
    """Places of an expert group that have tokens of their own, which ranks of tp share; 0 without expert groups.

    Part p of the batch is at place p modulo this, and each place is as many neighbours of the group as fill it.
    """
    return 0 if layout.ep == 1 else max(layout.ep * layout.etp // layout.tp, 1)


def _along(grid: NDArray[np.int64], *dims: int) -> list[list[int]]:
    """Groups that differ along `dims` of a grid of ranks."""
    rest = [dim for dim in range(grid.ndim) if dim not in dims]
    size = int(np.prod([grid.shape[dim] for dim in dims]))
    groups: list[list[int]] = grid.transpose(*rest, *dims).reshape(-1, size).tolist()
    return groups


def fit(spec: DistSpec, ranks: int, ranks_here: int = 0) -> Layout:
    """The layout a recipe asks for on so many ranks; raises ConfigError that names the nearest possible ones.

    ranks_here   on each machine, where the recipe does not say what a node is; 0: all
    """
    fixed = spec.pp * spec.dp_replicate * spec.tp
    shard = spec.dp_shard or max(ranks // fixed, 1)
    wanted = Layout(spec.pp, spec.dp_replicate, shard, spec.tp, spec.ep, spec.ranks_per_node or ranks_here, spec.expert_tp)
    if wanted.world == ranks and (shard * spec.tp) % (spec.ep * wanted.etp) == 0:
        return wanted
    if wanted.world != ranks:
        asked = f"pp {spec.pp} x dp_replicate {spec.dp_replicate} x dp_shard {shard} x tp {spec.tp} = {wanted.world}"
        problem = f"dist asks for {asked} ranks, but there are {ranks}"
    else:
        room = f"dp_shard = {shard}" if spec.expert_tp else f"dp_shard x tp = {shard} x {spec.tp}"
        problem = f"dist.ep is {spec.ep}; it must divide {room}"
    shown = " or ".join(_settings(layout) for layout in nearest(wanted, ranks))
    raise ConfigError(f"{problem}; nearest possible on {ranks} ranks: {shown}")


def nearest(wanted: Layout, ranks: int, number: int = 2) -> list[Layout]:
    """Layouts on exactly so many ranks that change the wanted sizes least, by the sum of their log ratios."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    possible = [
        Layout(pp, copies, ranks // (pp * copies * tp), tp, ep, wanted.node, wanted.expert_tp)
        for pp, copies, tp, ep in product(sizes, repeat=4)
        if ranks % (pp * copies * tp) == 0 and (ranks // (pp * copies)) % (ep * (tp if wanted.expert_tp else 1)) == 0
    ]

    def distance(layout: Layout) -> float:
        pairs = [(getattr(layout, name), getattr(wanted, name)) for name in ("pp", "dp_replicate", "tp", "ep")]
        return sum(abs(float(np.log(have / want))) for have, want in pairs)

    return sorted(possible, key=distance)[:number]


def _settings(layout: Layout) -> str:
    names = ("pp", "dp_replicate", "dp_shard", "tp", "ep")
    return " ".join(f"dist.{name}={getattr(layout, name)}" for name in names if getattr(layout, name) > 1)
