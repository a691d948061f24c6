"""Cut a decoder into stages by cost, and run micro-batches through them on torch's schedules.

    token_BS -> stage 0 -> stream -> stage 1 -> ... -> last stage -> loss        stage i is on rank i mod pp

Router losses travel with the stream: `_Attach` adds their gradient on the way back, so no schedule knows of them.
Names of tensors stay those of the whole model; blocks of other ranks are `Elsewhere`.

Dimension key:  B sequences   S positions   D width   T tokens   E experts
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    _PipelineSchedule,
)
from torch.nn import functional as F

from moestro.core.errors import ConfigError
from moestro.core.specs import ModelSpec
from moestro.dist.mesh import Axis
from moestro.dist.spec import DistSpec
from moestro.dist.timeline import CLOCK
from moestro.nn.decoder import Decoder, Output
from moestro.nn.moe import MoE
from moestro.nn.router import RoutingRecord

SCHEDULES = {"interleaved": ScheduleInterleaved1F1B, "zero_bubble": ScheduleInterleavedZeroBubble}


class Elsewhere(nn.Module):
    """A block that another rank holds."""

    feed_forward = None


def layer_costs(spec: ModelSpec, length: int) -> list[float]:
    """Multiply-adds per token of every layer, the output head added to the last."""
    attention, width = spec.attention, spec.width
    heads = spec.head_dim * (2 * attention.num_heads + 2 * attention.kv_heads)
    costs = []
    for layer in range(spec.num_layers):
        cost: float = width * heads + length * spec.head_dim * attention.num_heads
        if spec.moe and layer in spec.moe_layers:
            cost += width * spec.moe.num_experts + 3 * width * spec.moe.shared_width
            cost += 3 * width * spec.moe.expert_width * spec.moe.router.expected_experts
        else:
            cost += 3 * width * spec.dense_width
        costs.append(float(cost))
    costs[-1] += width * spec.vocab_size
    return costs


def cut_by_cost(costs: Sequence[float], stages: int) -> list[range]:
    """Neighbouring layers for every stage, so that the dearest stage costs as little as possible; exact."""
    layers = len(costs)
    best: list[list[tuple[float, int]]] = [[(0.0, 0)] + [(float("inf"), 0)] * layers]
    for _ in range(stages):
        row = [(float("inf"), 0)] * (layers + 1)
        for end in range(1, layers + 1):
            row[end] = min((max(best[-1][start][0], sum(costs[start:end])), start) for start in range(end))
        best.append(row)
    ranges, end = [], layers
    for row in reversed(best[1:]):
        start = row[end][1]
        ranges.append(range(start, end))
        end = start
    return ranges[::-1]


class Stage(nn.Module):
    """Some neighbouring blocks; the first stage embeds tokens."""

    def __init__(self, model: Decoder, layers: range, seen: dict[int, list[RoutingRecord]]) -> None:
        super().__init__()
        self.first, self.last = layers.start == 0, layers.stop == model.spec.num_layers
        self.layers, self.recompute = layers, model.recompute
        self.model: list[Decoder] = [model]  # in a list: not a submodule, its tensors are counted below
        self.blocks = nn.ModuleList(model.blocks[layer] for layer in layers)
        self.embedding = model.embedding if self.first or (self.last and model.head is None) else None
        self.norm = model.norm if self.last else None
        self.head = model.head if self.last else None
        self.seen, self.weight = seen, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """The stream after these blocks; x is token_BS in the first stage."""
        x_BSD: Tensor = self.embedding(x) if self.first and self.embedding is not None else x
        for layer, block in zip(self.layers, self.blocks, strict=True):
            x_BSD, record = self.model[0].run_block(block, x_BSD, None)
            if record is not None:
                self.seen[layer].append(record)
                if torch.is_grad_enabled() and isinstance(block.feed_forward, MoE):
                    block.feed_forward.router.count_micro_batch(record)
                    attached: Tensor = _Attach.apply(x_BSD, record.loss, self.weight)
                    x_BSD = attached
        return x_BSD.clone()  # zero-bubble schedules detach it in place, which a view does not allow


class _Attach(torch.autograd.Function):
    """x unchanged; backward, `loss` gets the gradient `weight`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.d_loss = torch.full_like(loss, weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        return d_outputs[0], ctx.d_loss, None


class TimedStage(PipelineStage):
    """A stage that adds up its own work: the rest of a schedule's time goes to messages between stages."""

    busy_s = 0.0

    def forward_one_chunk(self, *given: Any, **named: Any) -> Any:
        """As in torch."""
        return self._timed(super().forward_one_chunk, *given, **named)

    def backward_one_chunk(self, *given: Any, **named: Any) -> Any:
        """As in torch."""
        return self._timed(super().backward_one_chunk, *given, **named)

    def backward_weight_one_chunk(self, *given: Any, **named: Any) -> Any:
        """As in torch."""
        return self._timed(super().backward_weight_one_chunk, *given, **named)

    def _timed(self, work: Callable[..., Any], *given: Any, **named: Any) -> Any:
        begun_s = time.perf_counter()
        made = work(*given, **named)
        TimedStage.busy_s += time.perf_counter() - begun_s
        return made


class Pipeline:
    """This rank's stages."""

    def __init__(self, model: Decoder, spec: DistSpec, axis: Axis, length: int) -> None:
        self.model, self.spec, self.axis, self.length = model, spec, axis, length
        per_rank = 1 if spec.schedule == "1f1b" else spec.stages_per_rank
        stages = axis.size * per_rank
        if stages > model.spec.num_layers:
            raise ConfigError(
                f"dist.pp x stages_per_rank is {stages}; it must be at most model.num_layers = {model.spec.num_layers}"
            )
        self.ranges = cut_by_cost(layer_costs(model.spec, length), stages)
        self.seen: dict[int, list[RoutingRecord]] = {layer: [] for layer in model.spec.moe_layers}
        self.own = [stage for stage in range(stages) if stage % axis.size == axis.index]
        self.modules = {stage: Stage(model, self.ranges[stage], self.seen) for stage in self.own}
        self._strip()
        self._schedules: dict[tuple[int, int, torch.device], _PipelineSchedule] = {}

    def _strip(self) -> None:
        """Forget what other ranks hold."""
        held = {layer for stage in self.own for layer in self.ranges[stage]}
        for layer in range(self.model.spec.num_layers):
            if layer not in held:
                self.model.blocks[layer] = Elsewhere()
        if not any(module.embedding is not None for module in self.modules.values()):
            self.model.embedding = Elsewhere()  # type: ignore[assignment]
        if not self.has_last:
            self.model.norm = Elsewhere()  # type: ignore[assignment]
            self.model.head = None if self.model.head is None else Elsewhere()  # type: ignore[assignment]

    @property
    def has_last(self) -> bool:
        """True on the rank with the last stage."""
        return any(module.last for module in self.modules.values())

    @property
    def own_layers(self) -> list[int]:
        """Our sparse layers."""
        return [layer for layer in self.seen if isinstance(self.model.blocks[layer].feed_forward, MoE)]

    def learn(self, token_BS: Tensor, micro_batches: int, share: float) -> tuple[Tensor, dict[int, list[RoutingRecord]]]:
        """Gradients of all micro-batches; returns our part of the loss and our layers' records.

        token_BS   our rows of all micro-batches, equally many of each
        share      of each micro-batch that is ours
        """
        for records in self.seen.values():
            records.clear()
        for module in self.modules.values():
            module.weight = 1 / micro_batches
        scale = share / micro_batches
        schedule = self._schedule(token_BS, micro_batches, scale)
        losses: list[Tensor] = []
        TimedStage.busy_s, begun_s = 0.0, time.perf_counter()
        inputs = (token_BS[:, :-1].contiguous(),) if 0 in self.own else ()
        if self.has_last:
            schedule.step(*inputs, target=token_BS[:, 1:].contiguous(), losses=losses, return_outputs=False)
        else:
            schedule.step(*inputs, return_outputs=False)
        if token_BS.device.type == "cpu":  # elsewhere the host's clock says nothing of the stages
            CLOCK.add(self.axis, begun_s + TimedStage.busy_s, time.perf_counter())
        nothing = torch.zeros((), dtype=torch.float64, device=token_BS.device)
        total = sum((loss.detach().double() for loss in losses), start=nothing)
        return total, {layer: list(self.seen[layer]) for layer in self.own_layers}

    def _schedule(self, token_BS: Tensor, micro_batches: int, scale: float) -> _PipelineSchedule:
        """The schedule for batches of this size; made once."""
        rows, device = len(token_BS) // micro_batches, token_BS.device
        key = (rows, micro_batches, device)
        if key not in self._schedules:
            token = torch.empty(rows, self.length, dtype=torch.int64, device="meta")
            stream = torch.empty(rows, self.length, self.model.spec.width, device="meta", requires_grad=True)
            stages = [
                TimedStage(
                    module,
                    number,
                    len(self.ranges),
                    device,
                    input_args=(token if module.first else stream,),
                    output_args=(stream,),
                    group=self.axis.group,
                )
                for number, module in self.modules.items()
            ]
            settings: dict[str, Any] = {"loss_fn": self._loss(scale), "scale_grads": False}
            if self.spec.schedule == "1f1b":
                self._schedules[key] = Schedule1F1B(stages[0], micro_batches, **settings)
            else:
                self._schedules[key] = SCHEDULES[self.spec.schedule](list(stages), micro_batches, **settings)
        return self._schedules[key]

    def _loss(self, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(x_BSD: Tensor, target_BS: Tensor) -> Tensor:
            return self.model.head_loss(self.model.norm(x_BSD), target_BS) * scale

        return loss

    @torch.no_grad()
    def forward(self, token_BS: Tensor, _caches: object = None) -> Output:
        """Logits and records of the whole model, on all ranks of the pipeline; for evaluation."""
        for records in self.seen.values():
            records.clear()
        shape = (*token_BS.shape, self.model.spec.width)
        x = token_BS
        for stage in range(len(self.ranges)):
            source, target = self._rank(stage - 1), self._rank(stage)
            if stage and source == dist.get_rank() != target:
                dist.send(x.float().contiguous(), target, group=self.axis.group)
            if target == dist.get_rank():
                if stage and source != target:
                    x = torch.empty(shape, device=token_BS.device)
                    dist.recv(x, source, group=self.axis.group)
                x = self.modules[stage](x)
        logit_BSV = torch.empty(*token_BS.shape, self.model.spec.vocab_size, device=token_BS.device)
        if self.has_last:
            logit_BSV = F.linear(self.model.norm(x), self.model.head_weight_VD).float()
        last = self._rank(len(self.ranges) - 1)
        dist.broadcast(logit_BSV, last, group=self.axis.group)
        return Output(logit_BSV, [self._share(layer, token_BS.numel(), token_BS.device) for layer in self.seen])

    def _share(self, layer: int, tokens: int, device: torch.device) -> RoutingRecord:
        """A layer's record for everybody: counts and experts per token."""
        stage = next(number for number, layers in enumerate(self.ranges) if layer in layers)
        moe = self.model.spec.moe
        assert moe is not None
        flat = torch.empty(moe.num_experts + tokens, device=device)
        if self.seen[layer]:
            flat = torch.cat([self.seen[layer][0].count_E, self.seen[layer][0].experts_T.float()])
        dist.broadcast(flat, self._rank(stage), group=self.axis.group)
        nothing = flat.new_zeros(())
        count_E, experts_T = flat[: moe.num_experts], flat[moe.num_experts :].long()
        return RoutingRecord(count_E, tokens, nothing, nothing, nothing, experts_T)

    def _rank(self, stage: int) -> int:
        return self.axis.ranks[stage % self.axis.size]

