"""The `[balance]` table of a recipe: where experts live, and whether they move while training goes on. No torch."""

from dataclasses import dataclass

from moestro.core.config import STRICT
from moestro.core.errors import ConfigError
from moestro.core.specs import ModelSpec
from moestro.dist.spec import DistSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceSpec:
    """Placement of experts on the ranks of dist.ep, see `train/rebalance.py`."""

    __pydantic_config__ = STRICT
    enabled: bool = False
    """Move and replicate experts when that pays back."""
    cluster: str = ""
    """cluster.toml of the ranks, or of the ranks of one expert group. Empty: the network is probed at the start, up to
    16 ranks; beyond, all links count as equal."""
    slots: int = 0
    """Experts of a layer that a rank can hold; 0: experts / ep and a quarter more, at least one more. Where `enabled`
    is false: as many as `placement` needs."""
    interval: int = 20
    """Steps between two decisions."""
    placement: str = ""
    """placement.toml to begin with (moestro place -o); where `enabled` is false it stays. Empty: experts in order."""
    budget: float = 0.15
    """Largest share of all slots that one plan may fill anew."""
    effort: float = 1.0
    """Of each search; 1 is some 30 ms a layer."""

    def __post_init__(self) -> None:
        if self.slots < 0:
            raise ConfigError(f"balance.slots is {self.slots}; it must be 0 or more")
        if self.interval < 1:
            raise ConfigError(f"balance.interval is {self.interval}; it must be 1 or more")
        if not 0 < self.budget <= 1:
            raise ConfigError(f"balance.budget is {self.budget}; it must be above 0 and at most 1")
        if not self.effort > 0:
            raise ConfigError(f"balance.effort is {self.effort}; it must be above 0")

    @property
    def slotted(self) -> bool:
        """Whether experts live in slots at all."""
        return self.enabled or bool(self.placement)


def check_balance(balance: BalanceSpec, dist: DistSpec, model: ModelSpec) -> None:
    """Raise ConfigError for what does not go together with a placement."""
    if not balance.slotted or dist.ep == 1:
        return
    what = "balance.enabled" if balance.enabled else "balance.placement"
    against = {
        f"dist.zero {dist.zero}": dist.zero > 0,
        f"dist.pp {dist.pp}": dist.pp > 1,
        f"dist.sync {dist.sync}": dist.sync != "step",
        f"dist.compression {dist.compression}": dist.compression != "none",
        "dist.expert_tp": dist.expert_tp,
        "model.moe.sharing low_rank": bool(model.moe and model.moe.sharing == "low_rank"),
        "a model without experts": model.moe is None,
    }
    for setting, there in against.items():
        if there:
            raise ConfigError(f"{what} does not go with {setting}; leave one of them out")
    assert model.moe is not None
    experts = model.moe.num_experts
    if balance.slots and balance.slots * dist.ep < experts:
        raise ConfigError(
            f"balance.slots is {balance.slots} on dist.ep = {dist.ep} ranks; together they must hold all {experts} "
            f"experts: raise it to {-(-experts // dist.ep)} or more"
        )


def default_slots(experts: int, ranks: int) -> int:
    """A quarter more than experts need, at least one more."""
    least = -(-experts // ranks)
    return min(least + max(round(least / 4), 1), experts)
