"""The `[dist]` table of a recipe: how many ranks, and what each axis of the mesh splits. No torch here."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from moestro.core.config import STRICT
from moestro.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DistSpec:
    """Axes whose product is the number of ranks; dp_shard = 0 takes what the others leave."""

    __pydantic_config__ = STRICT
    ranks: int = 0
    """Ranks that `moestro train` starts on this machine; 0: one, or as many as torchrun has started."""
    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Copies of the sharded model; gradients are summed between them."""
    dp_shard: int = 0
    """Parts of the batch within a copy; where zero > 0, of optimiser state, gradients and weights too."""
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """How micro-batches take turns in the pipeline."""
    stages_per_rank: int = 2
    """interleaved, zero_bubble: stages that each rank of the pipeline holds."""
    tp: int = 1
    """Tensor parallel: parts of each attention and dense feed-forward layer."""
    ep: int = 1
    """Expert parallel: parts of each layer's experts; carved out of dp_shard x tp."""
    expert_tp: bool = False
    """Split experts over tp by hidden columns too; ep is then carved out of dp_shard alone."""
    zero: Literal[0, 1, 2, 3] = 0
    """What the ranks of dp_shard share out, for experts those that hold the same ones: 1 optimiser state, 2 gradients
    too, 3 weights too. 0: nothing, gradients are summed in flat buckets."""
    dispatch: Literal["flat", "hierarchical"] = "flat"
    """hierarchical: a token bound for several experts of one node crosses the link between nodes once."""
    chunks: int = 1
    """Parts of a layer's tokens; a part travels to and from its experts while another is computed."""
    ranks_per_node: int = 0
    """Ranks that share a fast link; 0: as many as the launcher started on each machine."""
    shares: str = "even"
    """Rows of the batch for each part of it (dp_replicate x dp_shard), see `train/shares.py`: even, measured (in
    proportion to each part's speed), or numbers such as 3:1; 0 is possible."""
    shares_every: int = 20
    """measured: steps after which speeds are looked at again."""
    sync: Literal["step", "local", "diloco", "stale", "hybrid"] = "step"
    """How copies (dp_replicate) stay together, see `dist/synchronise.py`; step: gradients are summed in every step."""
    sync_every: int = 16
    """local, diloco: steps between two meetings. All: steps after which stops, checkpoints and evaluations may come."""
    sync_after: int = 0
    """local, diloco: steps at the beginning that are synchronous."""
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    """diloco: the outer optimiser."""
    staleness: int = 1
    """stale, hybrid: steps that no copy runs ahead of the others."""
    compression: Literal["none", "bf16", "fp16", "int8", "topk", "sign", "powersgd"] = "none"
    """How gradients are summed, see `dist/compression.py`; with zero > 0 only for sync local and diloco."""
    density: float = 0.01
    """topk: share of the numbers that are sent."""
    powersgd_rank: int = 4
    layerwise: bool = False
    """Compress only the largest tensors so, smaller ones to int8; routers, norms and biases are exact anyway."""
    timeout_s: float = 300.0
    """A rank that lets the others wait longer than this ends the run everywhere."""
    restarts: int = 0
    """Times that `moestro train` starts the ranks again, from the last checkpoint, when one is lost."""

    def __post_init__(self) -> None:
        for name in ("ranks", "dp_shard", "restarts", "ranks_per_node", "sync_after", "staleness"):
            if getattr(self, name) < 0:
                raise ConfigError(f"dist.{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("pp", "dp_replicate", "tp", "ep", "stages_per_rank", "powersgd_rank", "sync_every", "chunks", "shares_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"dist.{name} is {getattr(self, name)}; it must be 1 or more")
        if not 0 < self.density <= 1:
            raise ConfigError(f"dist.density is {self.density}; it must be above 0 and at most 1")
        if self.compression != "none" and self.zero and self.sync not in ("local", "diloco"):
            raise ConfigError(
                f"dist.compression is {self.compression} with dist.zero {self.zero}, whose sums torch makes; "
                "choose dist.zero=0, dist.compression=none, or dist.sync=local or diloco, which compress changes of weights"
            )
        if self.sync != "step" and self.dp_replicate < 2:
            raise ConfigError(f"dist.sync is {self.sync} with dp_replicate {self.dp_replicate}; it needs 2 or more copies")
        if self.sync == "hybrid" and self.dp_shard == self.tp == self.pp == 1:
            raise ConfigError("dist.sync is hybrid with dp_shard, tp and pp 1: a copy is one rank; use dist.sync=stale")
        if self.timeout_s <= 0:
            raise ConfigError(f"dist.timeout_s is {self.timeout_s}; it must be above 0")
        _ = self.share_weights

    @property
    def share_weights(self) -> list[Fraction]:
        """The numbers that `shares` gives; empty where it gives none."""
        if self.shares in ("even", "measured"):
            return []
        try:
            weights = [Fraction(part) for part in self.shares.split(":")]
        except (ValueError, ZeroDivisionError):
            weights = []
        if not weights or min(weights) < 0 or not sum(weights):
            raise ConfigError(
                f"dist.shares is {self.shares}; it must be even, measured, or numbers of 0 or more, one of them above, "
                "with colons between: 3:1"
            )
        return weights
