"""How a model is cut over devices: one layout, or a column of them.

    N = pp x cp x tp x dp          experts: N = pp x ep x etp x (expert data parallel)

Ranks are numbered as Megatron and issue 3's mesh do, fastest first: tp, cp, dp, pp; ep is carved out of tp x cp x dp.
So a group's stride tells which level of the network its messages cross.
"""

from dataclasses import dataclass, fields

import numpy as np

from moestro.plan.columns import Number

SCHEDULES = ("1f1b", "interleaved", "zero_bubble", "zero_bubble_v", "dualpipe")
"""Pipeline schedules by code: 1F1B (2104.04473), interleaved (2104.04473), ZB-H1 and ZB-V (2401.10241, 2405.15362),
DualPipe (2412.19437)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Parallel degrees, micro-batches and recomputation; every field may be a column."""

    devices: Number
    tp: Number = 1.0
    pp: Number = 1.0
    virtual: Number = 1.0
    """Model chunks per pipeline rank."""
    cp: Number = 1.0
    ep: Number = 1.0
    etp: Number = 1.0
    """Tensor parallelism of the experts."""
    zero: Number = 1.0
    """0 plain data parallel, 1 optimiser sharded, 2 gradients too, 3 weights too."""
    shard_group: Number = 0.0
    """Ranks that share one sharded copy; 0 means all data-parallel ranks."""
    micro_batch: Number = 1.0
    """Sequences of one micro-batch on one pipeline."""
    sequences: Number = 1.0
    """Sequences of one step over all ranks."""
    schedule: Number = 0.0
    """Place in SCHEDULES."""
    by_cost: Number = 0.0
    """1 where stages are cut so that the slowest is as fast as whole layers allow; else every stage has as many layers
    and the last one the output head on top, as Megatron does where layers divide evenly."""
    full: Number = 0.0
    """Share of layers whose forward pass is done again in the backward pass."""
    again_attention: Number = 0.0
    """1 where the attention core alone is done again (2205.05198)."""
    again_cheap: Number = 0.0
    """1 where norms, activations and half of the products are done again (torchtitan's `selective op`)."""
    again_up: Number = 0.0
    """1 where latent attention's up-projections are done again."""
    again_dense: Number = 0.0
    """1 where dense feed-forward layers are done again."""
    again_experts: Number = 0.0
    """1 where expert layers are done again, exchange included."""
    again_activation: Number = 0.0
    """1 where only the feed-forward's activation function is done again."""

    @property
    def dp(self) -> Number:
        """Data-parallel ranks of the dense part."""
        return self.devices / (self.tp * self.pp * self.cp)

    @property
    def expert_dp(self) -> Number:
        """Data-parallel ranks of the experts."""
        return self.devices / (self.pp * self.ep * self.etp)

    @property
    def micro_batches(self) -> Number:
        """Micro-batches of a step through one pipeline."""
        return self.sequences / (self.micro_batch * self.dp)

    @property
    def shard_ranks(self) -> Number:
        """Ranks over which the dense part's sharded state is spread."""
        ranks = self.dp * self.cp
        return np.where(np.asarray(self.shard_group) > 0, np.minimum(self.shard_group, ranks), ranks)


def text_of(layout: Layout) -> str:
    """A single layout in one line: `tp4 pp8 v4 cp2 ep16 mb1 zero1 interleaved`."""
    parts = [f"{name}{_whole(value)}" for name, value in (("tp", layout.tp), ("pp", layout.pp))]
    parts += [f"v{_whole(layout.virtual)}"] if layout.virtual != 1 else []
    for name, value in (("cp", layout.cp), ("ep", layout.ep), ("etp", layout.etp)):
        parts += [f"{name}{_whole(value)}"] if value != 1 else []
    parts += [f"dp{_whole(layout.dp)}", f"mb{_whole(layout.micro_batch)}", f"zero{_whole(layout.zero)}"]
    if layout.pp != 1:
        parts.append(SCHEDULES[int(layout.schedule)])
    return " ".join(parts) + recompute_text(layout)


def as_table(layout: Layout) -> dict[str, float | str]:
    """A single layout as plain numbers, the schedule by name."""
    numbers: dict[str, float | str] = {item.name: float(getattr(layout, item.name)) for item in fields(layout)}
    return {**numbers, "dp": float(layout.dp), "schedule": SCHEDULES[int(layout.schedule)]}


def recompute_text(layout: Layout) -> str:
    """What is done again, in words; empty where nothing is."""
    named = ("attention", "cheap", "up", "dense", "experts", "activation")
    again = [name for name in named if getattr(layout, f"again_{name}")]
    if layout.full:
        again.insert(0, "all" if layout.full >= 1 else f"{100 * float(layout.full):.0f} % of layers")
    return f" recompute {'+'.join(again)}" if again else ""


def _whole(value: Number) -> str:
    return f"{float(value):g}"
