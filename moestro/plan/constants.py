"""The few numbers behind every prediction: what each means, what was known of it beforehand, and from where.

    PRIORS -> (fit on measurements) -> Constants in a profile -> step.py, memory.py

All are positive, so they are fitted as logarithms around these priors: `spread` is the standard deviation of the
logarithm, about the relative uncertainty. They are global; what differs between devices and software beyond their
documented rates is a shrunken effect (profile.py), never a constant of one row.
"""

from dataclasses import dataclass, fields

import numpy as np

from moestro.plan.columns import Array, Number


@dataclass(frozen=True, slots=True)
class Prior:
    """What is known of a constant before fitting."""

    mean: float
    spread: float
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """Global constants; every one may be a column, so that a fit can vary many at once."""

    # matrix products
    matmul_share: Number
    """In training, of the best rate measured on large products alone."""
    fp8_share: Number
    """The same for per-tensor and block-scaled 8-bit formats, on top of matmul_share."""
    mx_share: Number
    """For MXFP8, on top of matmul_share."""
    fp4_share: Number
    """For NVFP4, on top of matmul_share: some products stay in 8 or 16 bits."""
    grouped_share: Number
    """Of grouped products over experts, beside equal dense ones."""
    depth_half: Number
    """Inner dimension at which an H100 in bf16 reaches half its rate; grows with the device's rate."""
    tail_wave: Number
    """Share of a wave of tiles by which the last wave of a product is not full, on average."""
    operand_weight: Number
    """Weight of reading and writing operands in the roofline of a product."""
    memory_share: Number
    """Of the vendor's memory bandwidth."""
    kernel_s: Number
    """Fixed device time of one kernel: launch gap, ramp-up and tail."""
    # attention
    flash1_share: Number
    """FlashAttention 1, of the achievable bf16 rate."""
    flash2_share: Number
    fused_share: Number
    """cuDNN and FlashAttention 3."""
    flash_modern: Number
    """FlashAttention 1 and 2 on Hopper and later, beside Ampere."""
    attention_half_tokens: Number
    """Sequence length at which fused attention reaches half its rate."""
    narrow_heads: Number
    """Rate with heads below 96 wide, beside 128."""
    unfused_matmul: Number
    """Batched products of unfused attention, of the dense rate."""
    unfused_traffic: Number
    """Passes over the score matrix of unfused attention, beside those counted."""
    # between the products
    elementwise: Number
    """Passes over activations between products, beside those counted."""
    elementwise_sparse: Number
    """The same for routing, permuting and expert activations."""
    eager: Number
    """Elementwise work without a compiler, beside fused."""
    quantise: Number
    """Passes to quantise operands of 8- and 4-bit products, beside those counted."""
    loss_traffic: Number
    """Passes over the logits around the loss, beside 6 of 4 bytes."""
    # host
    host_s: Number
    """Host time to launch one kernel."""
    host_arm: Number
    """The same on an Arm host, beside x86."""
    host_graphs: Number
    """Share of launches left where CUDA graphs are used."""
    kernels_attention: Number
    """Kernels of one layer's attention, forward and backward."""
    kernels_latent: Number
    """Further ones of latent attention."""
    kernels_dense: Number
    """Of a dense feed-forward layer."""
    kernels_deduplicated: Number
    """Of an expert layer behind DeepEP or HybridEP."""
    kernels_alltoall: Number
    """Of an expert layer behind a plain all-to-all, waits for counts included."""
    kernels_static: Number
    """The same where experts get fixed numbers of rows and nobody waits."""
    kernels_per_expert: Number
    kernels_tensor: Number
    """Further ones of a layer under tensor parallelism."""
    imbalance: Number
    """Busiest over mean expert load where routing is learned and no load is given."""
    # network
    inside_share: Number
    """Of the host-level bandwidth, in collectives."""
    across_share: Number
    """Of the bandwidth between hosts."""
    congestion: Number
    """Slow-down per doubling of the hosts of a collective."""
    collective_s: Number
    """Fixed time of one collective."""
    hop_inside_s: Number
    hop_across_s: Number
    """One step of a ring, inside a host and between hosts."""
    tensor_exposed: Number
    """Share of tensor-parallel exchange that shows although overlapped."""
    tensor_plain: Number
    """The same, not overlapped."""
    context_hidden: Number
    """Share of attention time that hides context-parallel exchange."""
    context_exposed: Number
    """Share of that exchange that shows in any case."""
    alltoall_inside: Number
    alltoall_across: Number
    """Of the bandwidths, for a plain all-to-all of tokens."""
    dispatch_inside: Number
    dispatch_across: Number
    """Of the bandwidths, for DeepEP and HybridEP."""
    exchange_s: Number
    """Fixed time of one exchange of tokens."""
    experts_exposed: Number
    """Share of the token exchange that shows although overlapped."""
    pipeline_exposed: Number
    """Share of messages between pipeline stages that shows."""
    gather_cost: Number
    """ZeRO-3 traffic, beside the bytes counted."""
    gather_hidden: Number
    """Share of a layer's time that hides ZeRO-3 traffic."""
    contention: Number
    """Slow-down of computation while traffic runs beside it."""
    reduce_hidden: Number
    """Micro-batches whose time hides the gradient reduction and weight gathering."""
    # rest of a step
    selective: Number
    """Share of products done again under torchtitan's `selective op`."""
    optimizer: Number
    """Optimiser traffic, beside 26 bytes a parameter."""
    step_s: Number
    """Fixed time of a step."""
    jitter: Number
    """Slow-down per doubling of the devices beyond 8: the slowest device sets the pace."""
    young: Number
    """Slow-down of software that is as old as its device."""
    young_years: Number
    """Years until that has faded to 1/e."""


PRIORS: dict[str, Prior] = {
    "matmul_share": Prior(0.93, 0.10, "products inside a training step beside mamf-finder's best shapes"),
    "fp8_share": Prior(1.0, 0.10, "mamf-finder fp8 anchors are per-tensor"),
    "mx_share": Prior(1.0, 0.10, "as fp8; block scales cost in `quantise`"),
    "fp4_share": Prior(0.62, 0.20, "a few layers and gradients stay in higher formats"),
    "grouped_share": Prior(0.95, 0.08, "TransformerEngine grouped GEMM beside cuBLAS"),
    "depth_half": Prior(150.0, 0.50, "pipeline prologue of Hopper GEMM tiles"),
    "tail_wave": Prior(0.5, 0.5, "tiles of a product over multiprocessors: half of the last wave idles"),
    "operand_weight": Prior(1.0, 0.30, "roofline"),
    "memory_share": Prior(0.85, 0.10, "STREAM-like kernels on A100, H100"),
    "kernel_s": Prior(3e-6, 0.40, "gap between kernels in a stream"),
    "flash1_share": Prior(0.42, 0.20, "FlashAttention-2 paper: FA1 100-120 TFLOP/s on A100"),
    "flash2_share": Prior(0.62, 0.20, "FlashAttention-2 paper: 170-200 TFLOP/s on A100"),
    "fused_share": Prior(0.65, 0.15, "FlashAttention-3 paper: 500-600 TFLOP/s forward and backward on H100"),
    "flash_modern": Prior(0.65, 0.20, "FlashAttention-3 paper: FA2 reaches 35-40 % on H100"),
    "attention_half_tokens": Prior(300.0, 0.70, "FlashAttention papers: rate by sequence length"),
    "narrow_heads": Prior(0.70, 0.15, "FlashAttention papers: head 64 beside 128"),
    "unfused_matmul": Prior(0.60, 0.30, "batched products with an inner dimension of a head"),
    "unfused_traffic": Prior(1.0, 0.30, "2205.05198: softmax, dropout, mask"),
    "elementwise": Prior(1.0, 0.30, "counted passes over activations"),
    "elementwise_sparse": Prior(1.2, 0.40, "counted passes over routed rows"),
    "eager": Prior(1.4, 0.20, "torchtitan with and without compile"),
    "quantise": Prior(1.0, 0.40, "read 2 bytes, write 1, twice for the transpose"),
    "loss_traffic": Prior(1.0, 0.40, "softmax cross-entropy in fp32"),
    "host_s": Prior(1.4e-5, 0.30, "PyTorch operator with its autograd node"),
    "host_arm": Prior(1.4, 0.25, "Grace beside x86 single-thread"),
    "host_graphs": Prior(0.5, 0.40, "Megatron-Core graphs cover part of a layer"),
    "kernels_attention": Prior(80.0, 0.30, "Megatron-Core layer, counted roughly"),
    "kernels_latent": Prior(80.0, 0.40, "down- and up-projections, rope on parts"),
    "kernels_dense": Prior(40.0, 0.30, "two products, activation, norms"),
    "kernels_deduplicated": Prior(400.0, 0.30, "router, permute, dispatch, grouped products, combine"),
    "kernels_alltoall": Prior(800.0, 0.30, "the same with counts copied to the host"),
    "kernels_static": Prior(300.0, 0.30, "the same without waiting"),
    "kernels_per_expert": Prior(4.0, 0.60, "multi-stream products, one per expert"),
    "kernels_tensor": Prior(80.0, 0.40, "gathers and scatters"),
    "imbalance": Prior(1.1, 0.10, "auxiliary-loss routing after warm-up"),
    "inside_share": Prior(0.75, 0.15, "nccl-tests bus bandwidth over nominal"),
    "across_share": Prior(0.80, 0.15, "nccl-tests bus bandwidth over nominal"),
    "congestion": Prior(0.03, 0.70, "fat trees with adaptive routing"),
    "collective_s": Prior(2e-5, 0.50, "nccl-tests small messages"),
    "hop_inside_s": Prior(1e-6, 0.50, "NVLink step of a ring"),
    "hop_across_s": Prior(6e-6, 0.50, "InfiniBand step of a ring"),
    "tensor_exposed": Prior(0.40, 0.40, "TransformerEngine user buffers"),
    "tensor_plain": Prior(1.0, 0.10, "nothing hides it"),
    "context_hidden": Prior(0.50, 0.50, "ring attention"),
    "context_exposed": Prior(0.20, 0.50, "first and last block"),
    "alltoall_inside": Prior(0.55, 0.25, "nccl all-to-all beside bus bandwidth"),
    "alltoall_across": Prior(0.70, 0.25, "the same between hosts"),
    "dispatch_inside": Prior(0.70, 0.20, "DeepEP: 153-158 of 200 GB/s on H800, 643-740 of 900 on B200"),
    "dispatch_across": Prior(0.80, 0.20, "DeepEP: 43-47 of 50 GB/s"),
    "exchange_s": Prior(5e-5, 0.70, "DeepEP low-latency kernels"),
    "experts_exposed": Prior(0.35, 0.40, "2603.07685: exchange overlapped with another micro-batch"),
    "pipeline_exposed": Prior(0.50, 0.50, "half of the messages hide"),
    "gather_cost": Prior(1.2, 0.30, "padding, copies in and out of flat buffers"),
    "gather_hidden": Prior(0.80, 0.20, "prefetch of the next layer"),
    "contention": Prior(0.12, 0.40, "2-20 multiprocessors serve traffic"),
    "reduce_hidden": Prior(0.70, 0.30, "backward pass of the last micro-batch"),
    "selective": Prior(0.50, 0.30, "every second product is kept"),
    "optimizer": Prior(1.0, 0.30, "Adam reads and writes fp32 states"),
    "step_s": Prior(0.02, 0.70, "data, logging, gradient norm"),
    "jitter": Prior(0.004, 0.70, "MegaScale: 0.5 % of hosts are 10 % slower"),
    "young": Prior(0.20, 0.50, "first releases on a new device"),
    "young_years": Prior(0.80, 0.30, "kernels catch up within a year"),
}
NAMES = tuple(field.name for field in fields(Constants))
"""Order of the constants in a vector."""


def prior_means() -> Array:
    """Logarithms of the prior means, in the order of NAMES."""
    return np.log([PRIORS[name].mean for name in NAMES])


def prior_spreads() -> Array:
    """Standard deviations of the logarithms."""
    return np.array([PRIORS[name].spread for name in NAMES])


def from_logs(log_P: Array) -> Constants:
    """Constants from a vector of logarithms; further axes become columns."""
    return Constants(**{name: np.exp(log_P[place]) for place, name in enumerate(NAMES)})
