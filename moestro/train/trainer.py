"""Model, optimiser and data of one run, and one step of learning.

    batch -> forward -> backward (per micro-batch) -> clip -> AdamW -> routers

What several ranks do differently is in the engine (`train/engine.py`).

A step whose loss or gradient is not finite is not applied: weights, moments and routers stay as they were. Batches are
a function of the step alone; together with `checkpoint.capture` this makes a resumed run go on bit for bit.

Dimension key:  B sequences   S positions
"""

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from moestro.core.errors import ConfigError
from moestro.core.specs import ModelSpec
from moestro.nn.decoder import Decoder, parameter_counts
from moestro.nn.moe import MoE
from moestro.nn.router import RoutingRecord, read_back
from moestro.train import checkpoint
from moestro.train.data import Batches, Streams, TokenData
from moestro.train.device import keep_freed_memory, on_device, pick_device, pick_dtype
from moestro.train.engine import Done, Engine, OneRank, Stopwatch
from moestro.train.optim import clip_scale, lr_share, make_optimizer, set_lr
from moestro.train.recipe import Recipe


@dataclass(slots=True)
class StepResult:
    """What one step did."""

    loss: float = 0.0
    """Language-model loss, nats per token."""
    grad_norm: float = 0.0
    applied: bool = True
    records: list[RoutingRecord] = field(default_factory=list)
    """One per sparse layer, over all micro-batches; what is logged of them is on the host."""
    data_s: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0
    update_s: float = 0.0

    @property
    def step_s(self) -> float:
        """Wall-clock seconds."""
        return self.data_s + self.forward_s + self.backward_s + self.update_s


def sized(spec: ModelSpec, vocab_size: int) -> ModelSpec:
    """The model with the tokenizer's vocabulary; raises ConfigError where the recipe's is too small."""
    if not spec.vocab_size:
        return replace(spec, vocab_size=vocab_size)
    if spec.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size is {spec.vocab_size}; the tokenizer has {vocab_size} entries: raise it, or leave it out"
        )
    return spec


CPU = torch.device("cpu")


class Trainer:
    """Everything a step touches."""

    def __init__(
        self, recipe: Recipe, data: TokenData, engine: Engine | None = None, draw_on: torch.device = CPU
    ) -> None:
        """`draw_on`: where first weights are drawn; on the CPU they are the same on every rank and any device."""
        train = recipe.train
        self.engine = engine or OneRank()
        if train.threads:
            torch.set_num_threads(train.threads)
        keep_freed_memory()
        self.recipe, self.step = recipe, 0
        self.device = pick_device(train.device)
        self.dtype = pick_dtype(train.precision, self.device)
        torch.manual_seed(recipe.seed)
        with draw_on:
            self.model = Decoder(sized(recipe.model, data.tokenizer.vocab_size)).initialise().to(self.device)
        self.model.recompute = train.recompute == "all"
        for module in self.model.modules():
            if isinstance(module, MoE):
                module.experts.recompute = train.recompute == "experts"
                module.fp8 = train.precision == "fp8"
        if train.init:
            folder = checkpoint.find_checkpoint(Path(train.init))
            checkpoint.verify(folder)
            checkpoint.load_weights(self.model, folder)
        self.parameters, self.active_parameters = parameter_counts(self.model, self.model.spec)
        self.engine.place(self.model)
        self.optimizer = make_optimizer(self.model, recipe.optimizer)
        recurrent = self.model.spec.attention.kind == "transformer_xl"
        source = Streams if recurrent else Batches
        self.batches = source(data.train, length=train.length, sequences=train.sequences, seed=recipe.seed)
        self.memory = [self.model.empty_caches() for _ in range(train.micro_batches)] if recurrent else []

    def run_step(self) -> StepResult:
        """Learn from one batch; the step counts even where it could not be applied."""
        result, begun_s = StepResult(), time.perf_counter()
        token_BS = on_device(self.batches.at(self.step), self.device)
        result.data_s = time.perf_counter() - begun_s
        watch = Stopwatch(self.device)
        self.model.train()
        for router in self.model.routers:
            router.counts_pairs = self.recipe.train.counts_pairs(self.step + 1)
        parts = token_BS.chunk(self.recipe.train.micro_batches)
        loss, records = self.engine.total(*self.engine.learn(self, parts, watch))
        self._update(result, loss, records)
        known = watch.read()
        result.forward_s, result.backward_s = known.get("forward_s", 0.0), known.get("backward_s", 0.0)
        spent_s = time.perf_counter() - begun_s - result.data_s
        result.update_s = max(spent_s - result.forward_s - result.backward_s, 0.0)
        self.step += 1
        self.engine.after_update(self)
        return result

    def autocast(self) -> torch.autocast:
        """Matrix products in the run's type."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _update(self, result: StepResult, loss: Tensor, records: list[RoutingRecord]) -> None:
        """Clip and apply, or leave everything as it was.

        The one time in a step that the host waits for the device: whether to apply depends on what came out, and what
        is logged comes along. Thresholds and biases move on the device.
        """
        spec, steps = self.recipe.optimizer, self.recipe.train.steps
        norm = self.engine.finish_gradients()
        (result.loss, result.grad_norm), result.records = read_back([loss, norm], records)
        result.applied = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        self.engine.before_update()
        if result.applied:
            set_lr(self.optimizer, lr_share(spec, self.step, steps))
            self.optimizer.apply(clip_scale(result.grad_norm, spec.clip))
            for router, record in zip(self.model.routers, self.engine.of_own_layers(records), strict=True):
                router.update(record, (self.step + 1) / steps)
        else:
            for router in self.model.routers:
                router.forget_step()
        self.optimizer.zero_grad(set_to_none=True)

    def batch_name(self) -> str:
        """Where the current step's batch comes from, for messages."""
        starts = self.batches.starts(self.step)
        names = sorted({self.batches.tokens.document_at(start) for start in starts})
        return f"tokens {min(starts)}..{max(starts) + self.batches.length} of {', '.join(names[:4])}" + (
            f" and {len(names) - 4} more documents" if len(names) > 4 else ""
        )

    def save(self, folder: Path, data: TokenData, done: Done = lambda: None, wait: bool = True) -> None:
        """Write a checkpoint of this moment; `done` is called when it is there."""
        self.engine.save(folder, self, data.tokenizer, done, wait)

    def restore(self, folder: Path) -> str:
        """Go back to a checkpoint; returns, for people, what could not be taken over."""
        self.step, left = self.engine.restore(folder, self)
        return left
