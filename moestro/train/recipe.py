"""A training run as a TOML table: the `[data]`, `[model]`, `[train]` of a recipe, checked before anything starts.

recipe.toml + key=value settings -> load_recipe -> Recipe
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moestro.core.config import STRICT, build, read_toml, with_overrides
from moestro.core.errors import ConfigError
from moestro.core.specs import ModelSpec
from moestro.core.tokens import bpe_size
from moestro.dist.spec import DistSpec
from moestro.train.balance_spec import BalanceSpec, check_balance

STDLIB = "stdlib"
"""data.source: the source code of the Python standard library on this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """Which text, cut into which tokens."""

    __pydantic_config__ = STRICT
    source: str | tuple[str, ...] = STDLIB
    """`stdlib`, or files and folders: plain text, .jsonl, .parquet."""
    heldout: str | tuple[str, ...] = ()
    """Files and folders to evaluate on; empty splits them off the source, by file."""
    heldout_share: float = 0.05
    """Share of the source's files that is held out; of the text where there is one file only."""
    text_field: str = "text"
    """The column or key that holds the text in .jsonl and .parquet."""
    tokenizer: str = "bytes"
    """bytes, bpe:N (learned from the training files), or the path of a tokenizer.json."""

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError(f"data.source is empty; give {STDLIB}, a file or a folder")
        if not 0 < self.heldout_share < 1:
            raise ConfigError(f"data.heldout_share is {self.heldout_share}; it must be between 0 and 1")
        if self.tokenizer.startswith("bpe:"):
            bpe_size(self.tokenizer)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSpec:
    """AdamW (Loshchilov 2019) with a schedule."""

    __pydantic_config__ = STRICT
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices of attention, feed-forward and experts; never on norms, biases, embeddings and routers."""
    embedding_lr_scale: float = 1.0
    expert_lr_scale: float = 1.0
    router_lr_scale: float = 1.0
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 100
    decay_share: float = 0.2
    """wsd: the last share of the steps, over which the rate falls linearly."""
    final_lr_share: float = 0.0
    """wsd, cosine: the rate at the end, as a share of lr."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.eps <= 0:
            raise ConfigError(f"optimizer.lr is {self.lr} and optimizer.eps {self.eps}; both must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas is {list(self.betas)}; both must be in 0..1, 1 excluded")
        for name in ("decay_share", "final_lr_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; it must be in 0..1")
        for name in (
            "weight_decay",
            "clip",
            "warmup_steps",
            "embedding_lr_scale",
            "expert_lr_scale",
            "router_lr_scale",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """How long, how much at a time, and what to leave behind."""

    __pydantic_config__ = STRICT
    steps: int
    length: int = 256
    """Tokens of a sequence."""
    sequences: int = 16
    """Sequences per step, over all micro-batches."""
    micro_batches: int = 1
    """Parts a step is cut into to save memory; gradients are summed."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """auto: bf16 matrix products where the machine has them, else fp32; weights and moments are always fp32. fp8: bf16,
    and experts' products in 8 bits on GPUs where that is measured to be faster."""
    recompute: Literal["none", "experts", "all"] = "none"
    """What the backward pass does again instead of keeping it: nothing; experts' products, of which only the input is
    kept; or all of every block."""
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 leaves it to torch."""
    init: str = ""
    """A run or model folder whose weights to start from."""
    evaluate_every: int = 200
    evaluate_sequences: int = 64
    """Held-out sequences of each evaluation under way; the last one reads all."""
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    log_every: int = 1
    on_nan: Literal["skip", "stop"] = "skip"
    """What to do when a loss or gradient is not finite; the step is never applied."""
    pairs_every: int = 20
    """Steps between two whose record in loads.trace says which experts were chosen together; 0 for never."""
    tensorboard: bool = True
    """Also write TensorBoard files, where tensorboard is installed."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "length",
            "sequences",
            "micro_batches",
            "evaluate_sequences",
            "keep_checkpoints",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("evaluate_every", "checkpoint_every", "pairs_every", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it must be 0 or more, 0 for never")
        if self.sequences % self.micro_batches:
            raise ConfigError(
                f"train.micro_batches is {self.micro_batches}; it must divide train.sequences = {self.sequences}"
            )

    def counts_pairs(self, step: int) -> bool:
        """Whether the record of a step, counted from 1, says which experts were chosen together."""
        return self.pairs_every > 0 and step % self.pairs_every == 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step learns from."""
        return self.sequences * self.length


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportSpec:
    """What the report shows beside curves."""

    __pydantic_config__ = STRICT
    title: str = ""
    prompts: tuple[str, ...] = ("def ", "class ", "import ")
    """Beginnings the trained model continues."""
    sample_tokens: int = 120
    temperature: float = 0.7


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything a run depends on."""

    __pydantic_config__ = STRICT
    model: ModelSpec
    train: TrainSpec
    out: Path = Path("runs/run")
    """The run's folder; a finished or running one is never overwritten."""
    seed: int = 0
    data: DataSpec = field(default_factory=DataSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    report: ReportSpec = field(default_factory=ReportSpec)
    dist: DistSpec = field(default_factory=DistSpec)
    balance: BalanceSpec = field(default_factory=BalanceSpec)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be 0 or more")
        check_balance(self.balance, self.dist, self.model)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` settings; raises ConfigError in one line."""
    return build(Recipe, with_overrides(read_toml(path), overrides), where=str(path))
