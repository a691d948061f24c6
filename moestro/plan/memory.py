"""Bytes on the fullest device, by category, for the first and the last pipeline stage.

    Case, MemoryConstants -> memory -> Memory(parts of the worse stage, total)

FORMULAS 4.3. Weights, gradients and optimiser in three buckets: cut by tensor parallelism, not cut (router), routed
experts with their own data-parallel group. Activations are the tensors that the backward pass needs, summed one by one;
2205.05198's 34 s b h follows for GPT-3's layer. The first stage holds most micro-batches and the embedding, the last
one the logits. While the backward pass runs through a layer, that layer's gradients are alive too; the logits are gone
by then, so the larger of both counts.
"""

from dataclasses import dataclass

import numpy as np

from moestro.plan.case import Case
from moestro.plan.columns import Number
from moestro.plan.schedule import DUALPIPE, in_flight

GIB = 2.0**30
ADAM_BYTES = 12.0
"""fp32 master weight and two moments."""
PARTS = (
    "weights",
    "gradients",
    "optimiser",
    "expert weights",
    "expert gradients",
    "expert optimiser",
    "activations",
    "transient",
    "logits",
    "gathered weights",
    "allocator",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConstants:
    """What counting does not tell; fitted on published peaks."""

    kept: float = 1.0
    """Activations, beside those counted."""
    transient: float = 0.6
    """Of one layer's activations, alive as gradients in the backward pass."""
    reserved: float = 0.035
    """Share by which a caching allocator's pool exceeds the tensors in it, where weights are gathered."""
    fixed_gib: float = 0.4
    """Workspaces of kernels and collectives."""
    runtime_gib: float = 2.5
    """Driver, contexts, collectives: outside the allocator; counts for fitting only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """The fullest device."""

    parts: dict[str, Number]
    """Bytes by category on the worse stage."""
    total_bytes: Number
    """What the allocator holds at its peak; the runtime's own memory not counted."""
    last_stage: Number
    """1 where the last stage is the worse one."""

    @property
    def total_gib(self) -> Number:
        """The peak in GiB."""
        return self.total_bytes / GIB


def memory(case: Case, constants: MemoryConstants | None = None) -> Memory:
    """Memory of every row of the case."""
    constants = constants or MemoryConstants()
    first, last = _stage(case, constants, last=False), _stage(case, constants, last=True)
    sums = [sum(parts.values()) for parts in (first, last)]
    worse = np.asarray(sums[1]) > np.asarray(sums[0])
    parts: dict[str, Number] = {name: np.where(worse, last[name], first[name]) for name in first}
    return Memory(parts=parts, total_bytes=np.where(worse, sums[1], sums[0]), last_stage=np.where(worse, 1.0, 0.0))


def _stage(case: Case, constants: MemoryConstants, *, last: bool) -> dict[str, Number]:
    """Bytes of one end of the pipeline; with one stage both ends are the same."""
    shape, layout = case.shape, case.layout
    alone = np.asarray(layout.pp) <= 1
    share = _layer_share(case, last=last)
    ends = np.where(alone, 2 - shape.tied, 1.0) * shape.embedding_params
    extra = shape.extra_heads * np.where(alone | last, 1.0, 0.0)
    dense_layers, sparse_layers = _layers_here(case, share, last=last)
    plain = share * shape.num_layers * shape.attention_params + dense_layers * shape.dense_ff_params
    plain = plain + sparse_layers * shape.shared_params + ends
    idle = shape.sparse * shape.experts * shape.expert_params
    plain = plain + extra * (shape.extra_head_params - idle)
    dense = plain / layout.tp + sparse_layers * shape.router_params
    experts = (sparse_layers + extra * shape.sparse) * shape.experts * shape.expert_params / (layout.ep * layout.etp)
    copies = np.where(np.asarray(layout.schedule) == DUALPIPE, 2.0, 1.0)
    parts = _states(case, dense * copies, layout.shard_ranks, "")
    parts |= _states(case, experts * copies, _expert_shards(case), "expert ")
    parts |= _activations(case, constants, share, last=last)
    logits = np.where(alone | last, case.traits.logit_bytes * case.tokens * shape.vocab / layout.tp, 0.0)
    parts["logits"] = np.maximum(logits - parts["transient"], 0.0)  # the loss is done before layers go backward
    parts["gathered weights"] = _gathered(case)
    held = sum(parts.values())
    sharded = np.asarray(layout.zero) >= 3
    parts["allocator"] = np.where(sharded, constants.reserved * held, 0.0) + constants.fixed_gib * GIB
    return parts


def _expert_shards(case: Case) -> Number:
    """Ranks over which experts' sharded state is spread."""
    group, ranks = np.asarray(case.layout.shard_group), case.layout.expert_dp
    return np.where(group > 0, np.minimum(np.maximum(group / (case.layout.ep * case.layout.etp), 1.0), ranks), ranks)


def _layer_share(case: Case, *, last: bool) -> Number:
    """Share of the layers on the first or last stage; the fuller first one where they do not divide."""
    layout, total = case.layout, case.shape.num_layers
    chunks = layout.pp * layout.virtual
    ceiling = np.ceil(total / chunks - 1e-9) * layout.virtual
    even = np.abs(total / chunks - np.round(total / chunks)) < 1e-9
    most = np.minimum(ceiling, total)
    left = np.where(even, total / layout.pp, np.maximum(total - most * (layout.pp - 1), total / layout.pp * 0.5))
    return np.where(
        np.asarray(layout.pp) <= 1, 1.0, (left if last else np.minimum(most, total / layout.pp + 1)) / total
    )


def _layers_here(case: Case, share: Number, *, last: bool) -> tuple[Number, Number]:
    """(dense, sparse) layers of the stage: dense ones come first."""
    shape, layout = case.shape, case.layout
    here = share * shape.num_layers
    dense = shape.num_dense if last is False else np.maximum(shape.num_dense - (shape.num_layers - here), 0.0)
    dense = np.where(np.asarray(layout.pp) <= 1, shape.num_dense, np.minimum(dense, here))
    mixed = np.asarray(shape.num_sparse) > 0
    dense = np.where(mixed, dense, here)
    return dense, here - dense


def _states(case: Case, params: Number, shards: Number, prefix: str) -> dict[str, Number]:
    """Weights, gradients and optimiser of one bucket under ZeRO 0 to 3."""
    zero, gradient = np.asarray(case.layout.zero), case.traits.gradient_bytes
    stored = 2.0 + 2.0 * case.precision.single
    master = ADAM_BYTES - 4 * case.precision.single
    fully = zero >= 3
    return {
        f"{prefix}weights": params * np.where(fully, 0.0, stored),
        f"{prefix}gradients": params
        * np.where(fully, gradient / shards, np.where(zero >= 2, gradient / shards, gradient)),
        f"{prefix}optimiser": params * master / np.where(zero >= 1, shards, 1.0),
    }


def _gathered(case: Case) -> Number:
    """ZeRO-3: two layers' whole weights (fewer where a layer is gathered in parts), and the embedding or head."""
    shape, layout = case.shape, case.layout
    ff = np.maximum(
        np.where(np.asarray(shape.num_dense) > 0, shape.dense_ff_params, 0.0),
        shape.shared_params + shape.router_params + shape.experts * shape.expert_params / (layout.ep * layout.etp),
    )
    layer = (shape.attention_params + ff) / layout.tp
    fully = np.asarray(layout.zero) >= 3
    alive = 2 / np.asarray(case.traits.collectives_per_layer)
    return np.where(fully, case.precision.gathered_bytes * (alive * layer + shape.embedding_params / layout.tp), 0.0)


def _activations(case: Case, constants: MemoryConstants, share: Number, *, last: bool) -> dict[str, Number]:
    """Kept for the backward pass over all micro-batches in flight, and what one layer's backward pass needs besides."""
    layout, shape = case.layout, case.shape
    attention, dense, sparse = (case.tokens * bytes_ for bytes_ in layer_bytes(case))
    dense_layers, sparse_layers = _layers_here(case, share, last=last)
    held = in_flight(layout, layout.pp - 1 if last else 0.0 * layout.pp)
    held = np.where(np.asarray(layout.pp) <= 1, 1.0, held)
    boundary = 2 * case.tokens * shape.width / case.stream_cut
    kept = (dense_layers + sparse_layers) * attention + dense_layers * dense + sparse_layers * sparse
    again = boundary * (dense_layers + sparse_layers)
    whole = attention + np.maximum(np.where(dense_layers > 0, dense, 0.0), np.where(sparse_layers > 0, sparse, 0.0))
    per_micro_batch = layout.full * again + (1 - layout.full) * kept
    transient = whole * (constants.transient + np.where(np.asarray(layout.full) > 0, 1.0, 0.0))
    return {"activations": constants.kept * held * per_micro_batch, "transient": transient}


def layer_bytes(case: Case) -> tuple[Number, Number, Number]:
    """Per token kept by (attention half, dense feed-forward half, sparse feed-forward half) of a layer."""
    shape, layout, traits = case.shape, case.layout, case.traits
    two = 2.0 + 2.0 * case.precision.single
    cut = case.stream_cut
    unfused = np.asarray(traits.unfused) > 0
    kept = np.where(np.asarray(traits.narrow_kept) > 0, case.precision.stored_bytes, two)  # of a product's input
    norm = (two + kept) * shape.width / cut
    masks = np.where(unfused, shape.width / cut, 0.0)
    q = shape.heads * shape.qk_dim
    kv = np.where(shape.latent > 0, shape.heads, shape.kv_heads) * (shape.qk_dim + shape.v_dim)
    latents = shape.latent * (shape.q_rank + shape.kv_rank + shape.rope_dim)
    projected = two * (q + kv) * (1 - layout.again_up) / layout.tp
    scores = np.where(unfused, 5 * shape.heads * case.length * (1 - layout.again_attention), 4 * shape.heads)
    attention = norm + masks + projected + two * latents + (scores + kept * shape.heads * shape.v_dim) / layout.tp
    cheap = 1 - 0.55 * np.asarray(layout.again_cheap)
    activated = 1 - np.asarray(layout.again_activation)
    dense_inner = (two * (1 + shape.gates) + kept * activated) * shape.dense_width / layout.tp
    dense = norm + masks + dense_inner * (1 - layout.again_dense)
    rows = np.maximum(case.imbalance, 1.0) * shape.experts_per_token * layout.etp / layout.tp
    copies = (kept + two) * shape.width
    inner = (two * (1 + shape.gates) + kept * activated) * shape.expert_width / layout.etp
    shared = (two * (1 + shape.gates) + kept * activated) * shape.shared_width / layout.tp
    routed = rows * (copies + inner) * (1 - layout.again_experts)
    sparse = norm + shared * (1 - layout.again_dense * (1 - layout.again_experts)) + routed + 8 * shape.experts / cut
    return attention * cheap, dense * cheap, sparse * cheap
