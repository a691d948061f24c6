"""Seconds of one training step, part by part, from layer times, schedule and traffic.

    Case, Constants -> step_time -> StepTime(parts, total_s)

    total = (m x slowest stage + bubble + exposed gradient traffic + optimiser + fixed) x jitter x software effect

FORMULAS 4.6. A part says where time goes on the average stage; what the slowest stage has beyond it is `uneven`.
"""

from dataclasses import dataclass

import numpy as np

from moestro.plan.case import Case
from moestro.plan.columns import Number, above_zero
from moestro.plan.constants import Constants
from moestro.plan.layer import Layers, layers
from moestro.plan.network import collective_s, message_s
from moestro.plan.schedule import bubble_s, slowest_stage

OPTIMIZER_BYTES = 26.0
"""Adam: reads gradient 4, master 4, m 4, v 4; writes master 4, m 4 and the bf16 weight 2."""
MEGATRON_BUCKET = 40e6
"""Parameters of a gradient bucket at least, 1e6 times the data-parallel ranks else (Megatron-Core's default)."""
WEIGHT_ROOM = 0.5
"""Of the time that hides gradients: weights are gathered under a forward pass, half as long as a backward pass."""
FACTORS = ("stragglers", "software and device")
"""Parts that are factors on all others."""
PASS_PARTS = (
    ("attention products", "attention_products_s"),
    ("attention scores", "attention_core_s"),
    ("feed-forward", "feed_forward_s"),
    ("experts", "experts_s"),
    ("between products", "between_s"),
    ("tensor exchange", "tensor_s"),
    ("context exchange", "context_s"),
    ("token exchange", "exchange_s"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """One step, or a column of them."""

    total_s: Number
    parts: dict[str, Number]
    """Seconds by name, in the order of a step; they sum to total_s."""
    stage_s: Number
    """The slowest stage, per micro-batch."""
    forward_share: Number
    """Of a stage's time."""
    weight_share: Number
    """Of a stage's time: gradients of weights, which zero-bubble schedules move."""


def step_time(case: Case, constants: Constants) -> StepTime:
    """Predict one step of every row of the case."""
    shape, layout = case.shape, case.layout
    per_kind = layers(case, constants)
    parts = {name: value * layout.micro_batches for name, value in _stage_parts(case, per_kind).items()}
    layer_s = _mean(case, per_kind.dense.total_s, per_kind.sparse.total_s)
    gather_s, slowed_s = _gather_s(case, constants, layer_s)
    layer_s = layer_s + gather_s + slowed_s
    head_s = per_kind.head_s + shape.extra_heads * (layer_s + per_kind.head_s * (1 + 2 * shape.width / shape.vocab))
    messages_s = _messages_s(case, constants)
    slowest_s = slowest_stage(layout, shape.num_layers, layer_s, head_s)
    average_s = (shape.num_layers * layer_s + head_s) / layout.pp
    parts["output head and loss"] = head_s / layout.pp * layout.micro_batches
    parts["weight gathering"] = gather_s * shape.num_layers / layout.pp * layout.micro_batches
    parts["contention"] = slowed_s * shape.num_layers / layout.pp * layout.micro_batches
    parts["uneven stages"] = (slowest_s - average_s) * layout.micro_batches
    parts["pipeline messages"] = messages_s * layout.micro_batches
    forward_share, weight_share = _shares(case, per_kind, layer_s)
    stage_s = slowest_s + messages_s
    forward_s = forward_share * stage_s
    parts["bubble"] = bubble_s(layout, forward_s, stage_s - forward_s, weight_share * stage_s)
    exposed_s, beside_s = _reduction_s(case, constants, stage_s)
    parts["contention"] = parts["contention"] + beside_s
    parts["gradient reduction"] = exposed_s
    parts["optimiser"] = _optimizer_s(case, constants)
    parts["fixed"] = constants.step_s + 0.0 * stage_s
    return _with_effects(
        case,
        constants,
        StepTime(
            total_s=sum(parts.values()),
            parts=parts,
            stage_s=stage_s,
            forward_share=forward_share,
            weight_share=weight_share,
        ),
    )


def _with_effects(case: Case, constants: Constants, step: StepTime) -> StepTime:
    """Stragglers (the slowest device sets the pace) and what the profile knows of this software and device."""
    jitter = constants.jitter * np.log2(np.maximum(case.layout.devices / 8, 1.0))
    fresh = constants.young * np.exp(-case.traits.years / constants.young_years)
    total = step.total_s * (1 + jitter) * (1 + fresh) * np.exp(case.effect)
    parts = {**step.parts, "stragglers": step.total_s * jitter}
    parts["software and device"] = total - step.total_s * (1 + jitter)
    return StepTime(
        total_s=total,
        parts=parts,
        stage_s=step.stage_s * total / step.total_s,
        forward_share=step.forward_share,
        weight_share=step.weight_share,
    )


def _mean(case: Case, dense: Number, sparse: Number) -> Number:
    """Over the layers of the model."""
    shape = case.shape
    return (shape.num_dense * dense + shape.num_sparse * sparse) / shape.num_layers


def _stage_parts(case: Case, per_kind: Layers) -> dict[str, Number]:
    """Seconds per micro-batch on the average stage, without the head."""
    count = case.shape.num_layers / case.layout.pp
    parts: dict[str, Number] = {}
    for name, field in PASS_PARTS:
        both = [
            getattr(kind.forward, field) + getattr(kind.backward, field) for kind in (per_kind.dense, per_kind.sparse)
        ]
        parts[name] = count * _mean(case, both[0], both[1])
    parts["recomputation"] = count * _mean(case, per_kind.dense.again_s, per_kind.sparse.again_s)
    waiting = [kind.total_s - kind.device_s for kind in (per_kind.dense, per_kind.sparse)]
    parts["waiting for the host"] = count * _mean(case, waiting[0], waiting[1])
    return parts


def _shares(case: Case, per_kind: Layers, layer_s: Number) -> tuple[Number, Number]:
    """Shares of a stage's time that are forward, and that make gradients of weights."""
    forward = _mean(case, per_kind.dense.forward.total_s, per_kind.sparse.forward.total_s)
    device = _mean(case, per_kind.dense.device_s, per_kind.sparse.device_s)
    fields = ("attention_products_s", "feed_forward_s", "experts_s")
    products = [sum(getattr(kind.forward, name) for name in fields) for kind in (per_kind.dense, per_kind.sparse)]
    return forward / device, _mean(case, products[0], products[1]) / np.maximum(layer_s, device)


def local_params(case: Case) -> tuple[Number, Number]:
    """Weights on one device: (everything but routed experts, routed experts), on the average stage."""
    shape, layout = case.shape, case.layout
    layer = shape.num_layers * shape.attention_params + shape.num_dense * shape.dense_ff_params
    layer = layer + shape.num_sparse * shape.shared_params
    routers = shape.num_sparse * shape.router_params
    ends = (2 - shape.tied) * shape.embedding_params + shape.extra_heads * dense_part_of_extra_head(case)
    experts = (shape.num_sparse + shape.extra_heads * shape.sparse) * shape.experts * shape.expert_params
    dense = ((layer + ends) / layout.tp + routers) / layout.pp
    return dense, experts / (layout.pp * layout.ep * layout.etp)


def dense_part_of_extra_head(case: Case) -> Number:
    """Weights of a multi-token-prediction module that are not routed experts."""
    shape = case.shape
    return shape.extra_head_params - shape.sparse * shape.experts * shape.expert_params


def _gather_s(case: Case, constants: Constants, layer_s: Number) -> tuple[Number, Number]:
    """ZeRO-3, per layer and micro-batch: (traffic that shows, computing slowed by traffic beside it)."""
    shape, layout = case.shape, case.layout
    ff = _mean(case, shape.dense_ff_params, shape.shared_params + shape.router_params)
    dense = (shape.attention_params + ff) / layout.tp
    experts = _mean(case, 0.0, shape.experts * shape.expert_params / (layout.ep * layout.etp))
    gathered, reduced = 2 * case.precision.gathered_bytes, case.traits.gradient_bytes
    stride = layout.tp
    payload = dense * (gathered + reduced)
    sharded = np.asarray(layout.zero) >= 3
    traffic = collective_s(
        payload, layout.shard_ranks, stride, case.machine, constants, count=3 * case.traits.collectives_per_layer
    )
    traffic = traffic + np.where(
        np.asarray(experts) > 0,
        collective_s(experts * (gathered + reduced), layout.expert_dp, layout.ep * layout.etp, case.machine, constants),
        0.0,
    )
    traffic = np.where(sharded, constants.gather_cost * traffic, 0.0)
    hidden = constants.gather_hidden * layer_s * np.where(np.asarray(case.traits.overlap_gradients) > 0, 1.0, 0.0)
    exposed = np.where(sharded, above_zero(traffic - hidden, 0.1 * hidden + 1e-9), 0.0)
    return exposed, constants.contention * np.minimum(traffic, layer_s)


def _messages_s(case: Case, constants: Constants) -> Number:
    """Between pipeline stages, per micro-batch: one message each way per chunk, as far as it shows."""
    layout = case.layout
    payload = case.stream_bytes / layout.tp
    distance = layout.devices / layout.pp
    sent = 2 * layout.virtual * message_s(payload, distance, case.machine, constants)
    return np.where(np.asarray(layout.pp) > 1, constants.pipeline_exposed * sent, 0.0)


def _reduction_s(case: Case, constants: Constants, stage_s: Number) -> tuple[Number, Number]:
    """Gradient reduction and weight gathering of ZeRO 0 to 2: (what shows, computing slowed by what does not).

    ZeRO 0 all-reduces gradients. ZeRO 1 and 2 reduce-scatter them and gather weights; with a shard group smaller than
    all ranks, gradients are summed over the other groups too and weights are gathered in the group only.
    """
    layout, traits = case.layout, case.traits
    dense, experts = local_params(case)
    gradients_s: Number = 0.0
    weights_s: Number = 0.0
    for params, ranks, shards, stride in (
        (dense, layout.dp * layout.cp, layout.shard_ranks, layout.tp),
        (experts, layout.expert_dp, layout.expert_dp, layout.ep * layout.etp),
    ):
        usual = np.maximum(MEGATRON_BUCKET, 1e6 * ranks) * traits.gradient_bytes
        bucket = np.where(np.asarray(traits.bucket_bytes) > 0, traits.bucket_bytes, usual)
        count = np.ceil(params * traits.gradient_bytes / bucket)
        sharded = (np.asarray(layout.zero) >= 1) & (np.asarray(shards) >= ranks)
        there = (np.asarray(params) > 0) & (np.asarray(layout.zero) < 3)
        sent = collective_s(
            params * traits.gradient_bytes * np.where(sharded, 1.0, 2.0),
            ranks,
            stride,
            case.machine,
            constants,
            count=count * np.where(sharded, 1.0, 2.0),
            tree=np.where(sharded, 0.0, 1.0),
        )
        got = collective_s(params * case.precision.gathered_bytes, shards, stride, case.machine, constants, count=count)
        gradients_s = gradients_s + np.where(there, sent, 0.0)
        weights_s = weights_s + np.where(there & (np.asarray(layout.zero) >= 1), got, 0.0)
    grad_room = constants.reduce_hidden * stage_s * traits.overlap_gradients
    weight_room = constants.reduce_hidden * WEIGHT_ROOM * stage_s * traits.overlap_weights
    exposed, beside = 0.0 * stage_s, 0.0 * stage_s
    for sent, room in ((gradients_s, grad_room), (weights_s, weight_room)):
        exposed = exposed + above_zero(sent - room, 0.1 * room)
        beside = beside + np.minimum(sent, room)
    return exposed, constants.contention * beside


def _optimizer_s(case: Case, constants: Constants) -> Number:
    """Adam over what one device holds of the optimiser's state."""
    layout = case.layout
    dense, experts = local_params(case)
    sharded = np.asarray(layout.zero) >= 1
    own = dense / np.where(sharded, layout.shard_ranks, 1.0) + experts / np.where(sharded, layout.expert_dp, 1.0)
    bytes_per_s = case.machine.memory_bytes_per_s * constants.memory_share
    return constants.optimizer * OPTIMIZER_BYTES * own / bytes_per_s
