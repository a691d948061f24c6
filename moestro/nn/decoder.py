"""A decoder-only language model, dense or sparse, from a ModelSpec.

    token_BS -> embedding -> [norm -> attention -> +   norm -> feed-forward or MoE -> +] x layers -> norm -> head

Called by `train.loop` on batches, by `train.evaluate` on held-out text, and token by token with caches to generate.

Dimension key:  B sequences   S positions   D width   V vocabulary
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moestro.core.errors import ConfigError
from moestro.core.specs import ModelSpec
from moestro.nn.attention import Cache, GroupedQueryAttention, LatentAttention
from moestro.nn.experts import Experts, LowRankExperts
from moestro.nn.kernels import cpu
from moestro.nn.kernels.head_loss import head_loss
from moestro.nn.losses import token_loss
from moestro.nn.moe import FeedForward, MoE
from moestro.nn.norms import RMSNorm
from moestro.nn.recurrence import RecurrentAttention
from moestro.nn.router import Router, RoutingRecord

ATTENTION = {"gqa": GroupedQueryAttention, "mla": LatentAttention, "transformer_xl": RecurrentAttention}
WRITES_TO_STREAM = ("out.weight", "down.weight")
"""Endings of the linear maps whose output is added to the residual stream."""


@dataclass(slots=True)
class Output:
    """What a forward pass gives."""

    logit_BSV: Tensor
    records: list[RoutingRecord] = field(default_factory=list)
    """One per sparse layer, first layer first."""

    @property
    def router_loss(self) -> Tensor:
        """Sum of all layers' router losses; 0 for a dense model."""
        return sum((record.loss for record in self.records), start=self.logit_BSV.new_zeros(()))


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to the stream after."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.width, spec.norm_eps)
        self.attention = ATTENTION[spec.attention.kind](replace(spec, attention=spec.attention_at(layer)))
        self.feed_forward_norm = RMSNorm(spec.width, spec.norm_eps)
        sparse = spec.moe is not None and layer in spec.moe_layers
        self.feed_forward: nn.Module = (
            MoE(spec.width, spec.moe) if sparse and spec.moe else FeedForward(spec.width, spec.dense_width)
        )

    def forward(self, x_BSD: Tensor, cache: Cache | None = None) -> tuple[Tensor, RoutingRecord | None]:
        """The stream after this block, and what its router did."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cache)
        normed_BSD = self.feed_forward_norm(x_BSD)
        if isinstance(self.feed_forward, MoE):
            y_BSD, record = self.feed_forward(normed_BSD)
            return x_BSD + y_BSD, record
        return x_BSD + self.feed_forward(normed_BSD), None


class Decoder(nn.Module):
    """The model."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        if spec.vocab_size < 1:
            raise ConfigError(
                f"model.vocab_size is {spec.vocab_size}; it must be 1 or more, or come from the tokenizer"
            )
        self.spec = spec
        self.recompute = False
        """Keep only the stream between blocks and do the rest again in the backward pass."""
        self.embedding = nn.Embedding(spec.vocab_size, spec.width)
        self.blocks = nn.ModuleList(Block(spec, layer) for layer in range(spec.num_layers))
        self.norm = RMSNorm(spec.width, spec.norm_eps)
        self.head = None if spec.tied_head else nn.Linear(spec.width, spec.vocab_size, bias=False)

    def forward(self, token_BS: Tensor, caches: list[Cache] | None = None) -> Output:
        """Logits of the next token at every position.

        token_BS  int64 ids
        caches    one per layer, see `empty_caches`; they are extended in place
        """
        x_BSD, records = self.stream(token_BS, caches)
        return Output(F.linear(x_BSD, self.head_weight_VD), records)

    def loss(self, token_BS: Tensor, caches: list[Cache] | None = None) -> tuple[Tensor, list[RoutingRecord]]:
        """Mean cross-entropy in nats of every token but the first of each row, and the layers' records."""
        x_BSD, records = self.stream(token_BS[:, :-1], caches)
        return self.head_loss(x_BSD, token_BS[:, 1:]), records

    def head_loss(self, x_BSD: Tensor, target_BS: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the normalised stream's predictions; 0 where there are none."""
        x_TD, target_T = x_BSD.flatten(0, 1), target_BS.flatten()
        if not len(target_T):  # a rank without rows: 0, and zero gradients for everything
            return F.linear(x_TD, self.head_weight_VD).float().sum()
        if cpu.usable(x_TD) and torch.is_grad_enabled() and self.head_weight_VD.dtype == torch.float32:
            return head_loss(x_TD, self.head_weight_VD, target_T)
        return token_loss(F.linear(x_TD, self.head_weight_VD), target_T)

    def stream(self, token_BS: Tensor, caches: list[Cache] | None = None) -> tuple[Tensor, list[RoutingRecord]]:
        """The normalised residual stream after the last block, and the layers' records."""
        x_BSD = self.embedding(token_BS)
        records: list[RoutingRecord] = []
        for layer, block in enumerate(self.blocks):
            x_BSD, record = self.run_block(block, x_BSD, caches[layer] if caches is not None else None)
            if record is not None:
                records.append(record)
        return self.norm(x_BSD), records

    @property
    def head_weight_VD(self) -> Tensor:
        """The output head's matrix: its own, or the embedding."""
        return self.embedding.weight if self.head is None else self.head.weight

    def run_block(self, block: nn.Module, x_BSD: Tensor, cache: Cache | None) -> tuple[Tensor, RoutingRecord | None]:
        if not (self.recompute and torch.is_grad_enabled()):
            result: tuple[Tensor, RoutingRecord | None] = block(x_BSD, cache)
            return result
        parts = cache.parts if cache is not None else ()

        def again(x_BSD: Tensor) -> tuple[Tensor, RoutingRecord | None, tuple[Tensor, ...]]:
            local = Cache(parts)  # the block may run twice; only the first run's memory is kept
            return *block(x_BSD, local if cache is not None else None), local.parts

        y_BSD, record, new_parts = checkpoint(again, x_BSD, use_reentrant=False)
        if cache is not None:
            cache.parts = new_parts
        return y_BSD, record

    def empty_caches(self) -> list[Cache]:
        """Fresh caches, one per layer."""
        return [Cache() for _ in self.blocks]

    @property
    def routers(self) -> list[Router]:
        """The routers of the sparse layers, first layer first; in the order of `Output.records`."""
        return [block.feed_forward.router for block in self.blocks if isinstance(block.feed_forward, MoE)]

    @torch.no_grad()
    def initialise(self) -> "Decoder":
        """Draw fresh weights from torch's generator; returns self."""
        std, out_std = self.spec.init_std, self.spec.init_std / math.sqrt(2 * self.spec.num_layers)
        for name, module in self.named_modules():
            match module:
                case nn.Linear():
                    module.weight.normal_(0, out_std if f"{name}.weight".endswith(WRITES_TO_STREAM) else std)
                    if module.bias is not None:
                        module.bias.zero_()
                case nn.Embedding():
                    module.weight.normal_(0, std)
                case Router():
                    module.weight_ED.normal_(0, std)
                case Experts() | LowRankExperts():
                    module.initialise(std, out_std)
        return self


def parameter_counts(model: nn.Module, spec: ModelSpec) -> tuple[int, float]:
    """All parameters, and those one token uses on average (experts counted by the budget)."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if spec.moe is None:
        return total, float(total)
    used = spec.moe.router.expected_experts
    own = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3)
    return total, total - own * (1 - min(used / spec.moe.num_experts, 1.0))
