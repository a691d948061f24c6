"""Device seconds of one layer and micro-batch on one rank, forward and backward, part by part.

    Case, Constants -> LayerTime for a dense and a sparse layer, and for the output head

Products and exchange are in products.py and network.py; here is what lies between: which matrices a rank holds, how
often activations pass through memory, what is done again, and the host that must launch it all (a layer takes at
least as long as its launches). Sources: FORMULAS 4.1-4.5; 2205.05198 for unfused attention's score traffic.
"""

from dataclasses import dataclass, fields

import numpy as np

from moestro.plan.case import Case
from moestro.plan.columns import Number, above_zero, larger
from moestro.plan.constants import Constants
from moestro.plan.network import collective_s, exchange_s
from moestro.plan.products import Products, Rates, backward_s, forward_s, products, rates, wide_rates

BACKWARD_ATTENTION = 2.5
"""Operations of fused attention backward over forward: five products for two."""
HOST_POWER = 3.0
"""Sharpness of the maximum of device and host time: they overlap, but not perfectly."""
KERNELS_BETWEEN = 8.0
"""Kernels between products of half a layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Seconds of one direction, part by part; they follow each other on the device."""

    attention_products_s: Number
    attention_core_s: Number
    feed_forward_s: Number
    """Dense feed-forward, shared expert."""
    experts_s: Number
    between_s: Number
    """Norms, activations, routing, permuting."""
    tensor_s: Number
    context_s: Number
    exchange_s: Number

    @property
    def total_s(self) -> Number:
        """All parts."""
        total: Number = 0.0
        for field in fields(self):
            total = total + getattr(self, field.name)
        return total


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTime:
    """One kind of layer."""

    forward: Pass
    backward: Pass
    again_s: Number
    """What the backward pass does again."""
    host_s: Number
    """Launching all of it."""

    @property
    def device_s(self) -> Number:
        """Forward, backward and what is done again."""
        return self.forward.total_s + self.backward.total_s + self.again_s

    @property
    def total_s(self) -> Number:
        """The layer's time with the host in mind."""
        return larger(self.device_s, self.host_s, HOST_POWER)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """The kinds of layers of one model."""

    dense: LayerTime
    sparse: LayerTime
    head_s: Number
    """Output head and loss, forward and backward."""


def layers(case: Case, constants: Constants) -> Layers:
    """Time of every kind of layer."""
    narrow, wide = (make(case.machine, case.precision, constants) for make in (rates, wide_rates))
    attention = _attention(case, constants, narrow)
    return Layers(
        dense=_dense(case, constants, narrow, attention),
        sparse=_sparse(case, constants, narrow, attention),
        head_s=head_s(case, constants, wide),
    )


def attention_products(case: Case) -> Products:
    """Projections on one rank: q with k and v, output; in latent attention down and up for each."""
    shape, tp = case.shape, case.layout.tp
    latent, nope = shape.latent, shape.qk_dim - shape.rope_dim
    ranked = np.asarray(shape.q_rank) > 0
    joint = (shape.heads * shape.qk_dim + shape.kv_heads * (shape.qk_dim + shape.v_dim)) / tp
    queries = np.where(ranked, shape.q_rank, shape.heads * shape.qk_dim / tp)
    shapes = [
        (shape.width, np.where(latent > 0, queries, joint)),
        (np.where(ranked, shape.q_rank, 0.0) * latent, shape.heads * shape.qk_dim / tp),
        (shape.width * latent, shape.kv_rank + shape.rope_dim),
        (shape.kv_rank * latent, shape.heads * (nope + shape.v_dim) / tp),
        (shape.heads * shape.v_dim / tp, shape.width),
    ]
    return products(case.tokens, shapes, case.machine.tile)


def dense_products(case: Case) -> Products:
    """A dense feed-forward layer on one rank."""
    return _feed_forward(case, case.shape.dense_width)


def shared_products(case: Case) -> Products:
    """The expert every token takes."""
    return _feed_forward(case, case.shape.shared_width)


def expert_products(case: Case) -> Products:
    """Routed experts on one rank, when routing is even."""
    shape, width = case.shape, case.shape.expert_width / case.layout.etp
    shapes = [(shape.width, (1 + shape.gates) * width), (width, shape.width)]
    return products(case.routed_rows, shapes, case.machine.tile, copies=case.experts_here)


def head_s(case: Case, constants: Constants, wide: Rates) -> Number:
    """Output head and loss: products in 16 bits, six passes of 4 bytes over the logits."""
    shape, tp = case.shape, case.layout.tp
    work = products(case.tokens, [(shape.width, shape.vocab / tp)], case.machine.tile)
    loss_s = constants.loss_traffic * 6 * 4 * case.tokens * shape.vocab / tp / wide.bytes_per_s
    return forward_s(work, wide, constants) + backward_s(work, wide, constants) + loss_s


def _feed_forward(case: Case, width: Number) -> Products:
    shape, tp = case.shape, case.layout.tp
    inner = np.where(np.asarray(width) > 0, shape.width, 0.0)
    return products(case.tokens, [(inner, (1 + shape.gates) * width / tp), (width / tp, inner)], case.machine.tile)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attention:
    """What dense and sparse layers share: the attention half, and the exchange of its neighbours."""

    products_s: tuple[Number, Number]
    core_s: tuple[Number, Number]
    between_s: Number
    tensor_s: Number
    """One gather and one scatter of the stream."""
    context_s: tuple[Number, Number]
    up_s: Number
    """Latent attention's up-projections, forward."""


def _attention(case: Case, constants: Constants, at: Rates) -> _Attention:
    work, core = attention_products(case), _core_s(case, constants, at)
    forward = forward_s(work, at, constants)
    return _Attention(
        products_s=(forward, backward_s(work, at, constants)),
        core_s=core,
        between_s=_passes_s(case, constants, at, _attention_elements(case)),
        tensor_s=2 * _gather_s(case, constants),
        context_s=_context_s(case, constants, core),
        up_s=0.3 * forward * case.shape.latent,
    )


def _core_s(case: Case, constants: Constants, at: Rates) -> tuple[Number, Number]:
    """Scores, softmax, weighted values: forward and backward."""
    shape, traits, tp = case.shape, case.traits, case.layout.tp
    per_seen = 2 * case.tokens * shape.heads * (shape.qk_dim + shape.v_dim) / tp
    share = traits.flash1 * constants.flash1_share + traits.flash2 * constants.flash2_share
    older = traits.flash1 + traits.flash2
    share = share * np.where(np.asarray(traits.modern) > 0, constants.flash_modern, 1.0)
    share = share + (1 - older) * constants.fused_share
    heads = np.where(np.asarray(shape.qk_dim) < 96, constants.narrow_heads, np.where(shape.latent > 0, 0.9, 1.0))
    wide_rate = case.machine.bf16_flops_per_s * constants.matmul_share
    fused_rate = wide_rate * share * heads * case.length / (case.length + constants.attention_half_tokens)
    flash_s = per_seen * case.seen_tokens / fused_rate
    scores = case.tokens * case.length * shape.heads / tp
    bmm_s = per_seen * case.length / (wide_rate * constants.unfused_matmul)
    traffic_s = constants.unfused_traffic * scores / at.bytes_per_s
    unfused = np.asarray(traits.unfused) > 0
    forward = np.where(unfused, bmm_s + 13 * traffic_s, flash_s + 2 * constants.kernel_s)
    backward = np.where(unfused, 2 * bmm_s + 16 * traffic_s, BACKWARD_ATTENTION * flash_s + 3 * constants.kernel_s)
    return forward, backward


def _attention_elements(case: Case) -> Number:
    """Elements that pass through memory around attention: norm and residual, rope and copies of q, k and v."""
    shape, tp = case.shape, case.layout.tp
    kv = np.where(shape.latent > 0, shape.heads, shape.kv_heads)
    qkv = shape.heads * shape.qk_dim + kv * (shape.qk_dim + shape.v_dim)
    return case.tokens * (8 * shape.width / case.stream_cut + 3 * qkv / tp)


def _passes_s(case: Case, constants: Constants, at: Rates, elements: Number) -> Number:
    """Seconds to move elements, 2 bytes each (4 in fp32)."""
    eager = np.where(np.asarray(case.traits.eager) > 0, constants.eager, 1.0)
    return constants.elementwise * eager * (2 + 2 * case.precision.single) * elements / at.bytes_per_s


def _gather_s(case: Case, constants: Constants) -> Number:
    """One gather or scatter of the stream over tensor-parallel ranks, as far as it shows."""
    overlapped = np.asarray(case.traits.overlap_tensor) > 0
    shows = np.where(overlapped, constants.tensor_exposed, constants.tensor_plain)
    return collective_s(case.stream_bytes, case.layout.tp, 1.0, case.machine, constants) * shows


def _context_s(case: Case, constants: Constants, core_s: tuple[Number, Number]) -> tuple[Number, Number]:
    """Keys and values sent around the context-parallel ring, as far as attention does not hide them."""
    shape, layout = case.shape, case.layout
    kv = np.where(shape.latent > 0, shape.heads, shape.kv_heads) * (shape.qk_dim + shape.v_dim) / layout.tp
    payload = (2 + 2 * case.precision.single) * case.tokens * kv * layout.cp
    ring_s = collective_s(payload, layout.cp, layout.tp, case.machine, constants)
    shown = []
    for factor, hiding in ((1.0, core_s[0]), (2.0, core_s[1])):
        sent = factor * ring_s
        exposed = above_zero(sent - hiding * constants.context_hidden, 0.05 * sent + 1e-9)
        shown.append(np.where(np.asarray(layout.cp) > 1, exposed + constants.context_exposed * sent, 0.0))
    return shown[0], shown[1]


def _dense(case: Case, constants: Constants, at: Rates, attention: _Attention) -> LayerTime:
    shape, layout = case.shape, case.layout
    work = dense_products(case)
    activated = (1 + shape.gates + 1) * shape.dense_width / layout.tp
    activation_s = _passes_s(case, constants, at, case.tokens * activated)
    norm_s = _passes_s(case, constants, at, case.tokens * 8 * shape.width / case.stream_cut)
    between = attention.between_s + activation_s + norm_s
    kernels_s = KERNELS_BETWEEN * constants.kernel_s
    none = 0.0 * between
    forward = Pass(
        attention_products_s=attention.products_s[0],
        attention_core_s=attention.core_s[0],
        feed_forward_s=forward_s(work, at, constants),
        experts_s=none,
        between_s=between + 2 * kernels_s,
        tensor_s=2 * attention.tensor_s,
        context_s=attention.context_s[0],
        exchange_s=none,
    )
    backward = Pass(
        attention_products_s=attention.products_s[1],
        attention_core_s=attention.core_s[1],
        feed_forward_s=backward_s(work, at, constants),
        experts_s=none,
        between_s=2 * between + 3 * kernels_s,
        tensor_s=2 * 1.25 * attention.tensor_s,
        context_s=attention.context_s[1],
        exchange_s=none,
    )
    again = _again_attention_s(layout.full * forward.total_s, case, constants, attention)
    kept_products = forward.attention_products_s + forward.feed_forward_s
    again = again + layout.again_cheap * (constants.selective * kept_products + between)
    again = again + layout.again_dense * forward.feed_forward_s + layout.again_activation * activation_s
    launches = _attention_launches(case, constants) + constants.kernels_dense
    return LayerTime(forward=forward, backward=backward, again_s=again, host_s=_host_s(case, constants, launches))


def _sparse(case: Case, constants: Constants, at: Rates, attention: _Attention) -> LayerTime:
    layout = case.layout
    work, shared = expert_products(case), shared_products(case)
    slowdown = _imbalance(case, constants) / constants.grouped_share * _tile_waste(case)
    rows_s = _passes_s(case, constants, at, _sparse_elements(case)) * constants.elementwise_sparse
    between = attention.between_s + rows_s
    kernels_s = KERNELS_BETWEEN * constants.kernel_s
    exchange = 2 * _exchange_s(case, constants)
    forward = Pass(
        attention_products_s=attention.products_s[0],
        attention_core_s=attention.core_s[0],
        feed_forward_s=forward_s(shared, at, constants),
        experts_s=forward_s(work, at, constants, slowdown),
        between_s=between + 3 * kernels_s,
        tensor_s=attention.tensor_s,
        context_s=attention.context_s[0],
        exchange_s=exchange,
    )
    backward = Pass(
        attention_products_s=attention.products_s[1],
        attention_core_s=attention.core_s[1],
        feed_forward_s=backward_s(shared, at, constants),
        experts_s=backward_s(work, at, constants, slowdown),
        between_s=2 * between + 4 * kernels_s,
        tensor_s=1.25 * attention.tensor_s,
        context_s=attention.context_s[1],
        exchange_s=exchange,
    )
    again = _again_attention_s(layout.full * forward.total_s, case, constants, attention)
    sparse_s = forward.feed_forward_s + forward.experts_s + rows_s + forward.exchange_s
    again = again + layout.again_experts * sparse_s + layout.again_activation * 0.3 * rows_s
    again = again + layout.again_cheap * (constants.selective * forward.attention_products_s + between)
    launches = _attention_launches(case, constants) + _exchange_launches(case, constants)
    return LayerTime(forward=forward, backward=backward, again_s=again, host_s=_host_s(case, constants, launches))


def _again_attention_s(done: Number, case: Case, constants: Constants, attention: _Attention) -> Number:
    """Layers done again whole, plus attention's parts where only they are done again."""
    layout = case.layout
    return done + layout.again_attention * attention.core_s[0] + layout.again_up * attention.up_s


def _imbalance(case: Case, constants: Constants) -> Number:
    """Busiest over mean load: given, even by force, or what learned routing usually leaves."""
    usual = np.where(np.asarray(case.traits.balanced) > 0, 1.0, constants.imbalance)
    return np.where(np.asarray(case.imbalance) > 0, case.imbalance, usual)


def _tile_waste(case: Case) -> Number:
    """Rows computed over rows there: every expert's last tile, half as high as wide, is half empty on average."""
    rows = case.routed_rows / np.maximum(case.experts_here, 1e-9)
    return 1 + case.machine.tile / 4 / np.maximum(rows, 1.0)


def _sparse_elements(case: Case) -> Number:
    """Elements that pass through memory in an expert layer: norm, permute and combine, activations, router scores."""
    shape, layout = case.shape, case.layout
    routed = case.routed_rows
    stream = 8 * case.tokens * shape.width / case.stream_cut
    activated = (2 + shape.gates) * (
        routed * shape.expert_width / layout.etp + case.tokens * shape.shared_width / layout.tp
    )
    return stream + 6 * routed * shape.width + activated + 8 * case.tokens * shape.experts / layout.tp


def _exchange_s(case: Case, constants: Constants) -> Number:
    """One dispatch or combine, as far as it shows."""
    layout, traits = case.layout, case.traits
    payload = (2 + 2 * case.precision.single) * case.routed_rows * case.shape.width
    busiest = _imbalance(case, constants)
    sent = exchange_s(
        payload * busiest, layout.ep, case.shape.experts_per_token, case.machine, constants, traits.deduplicating
    )
    crosses = np.asarray(layout.ep) > case.machine.levels[0].devices
    hidden = np.where(crosses, traits.overlap_experts_across, traits.overlap_experts_inside)
    return sent * (1 - hidden * (1 - constants.experts_exposed))


def _attention_launches(case: Case, constants: Constants) -> Number:
    tensor = np.where(np.asarray(case.layout.tp) > 1, constants.kernels_tensor, 0.0)
    return constants.kernels_attention + case.shape.latent * constants.kernels_latent + tensor


def _exchange_launches(case: Case, constants: Constants) -> Number:
    plain = np.where(np.asarray(case.traits.static_shapes) > 0, constants.kernels_static, constants.kernels_alltoall)
    kind = np.where(np.asarray(case.traits.deduplicating) > 0, constants.kernels_deduplicated, plain)
    return kind + constants.kernels_per_expert * case.experts_here


def _host_s(case: Case, constants: Constants, launches: Number) -> Number:
    """Launching the kernels of a layer, forward, backward and a third more where all is done again."""
    arm = np.where(np.asarray(case.traits.arm) > 0, constants.host_arm, 1.0)
    graphs = np.where(np.asarray(case.traits.graphs) > 0, constants.host_graphs, 1.0)
    return constants.host_s * arm * graphs * launches * (1 + case.layout.full / 3)
