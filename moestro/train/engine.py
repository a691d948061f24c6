"""What a step does differently on one rank and on several.

    Trainer -> Engine: which rows are ours, how gradients become whole, who writes files

`OneRank` is the plain case, `train/ranks.py` has the other. The trainer and the loop are the same for both.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from moestro.core.errors import Error
from moestro.core.tokens import Tokenizer
from moestro.dist.mesh import Axis, alone
from moestro.nn.decoder import Decoder, Output
from moestro.nn.router import RoutingRecord, merge
from moestro.train import checkpoint
from moestro.train.ledger import News
from moestro.train.optim import gradient_norm

if TYPE_CHECKING:
    from moestro.train.trainer import Trainer

T = TypeVar("T")
Done = Callable[[], None]
Learned = tuple[Tensor, list[RoutingRecord]]
"""A loss, float64 on the device, and records; nothing of it has been asked of the device yet."""


class Engine(Protocol):
    """One rank, or one of several."""

    leads: bool
    """True on the rank that writes files and speaks."""
    split: Axis
    """The ranks that share the rows of a batch."""
    layout: str
    """Sizes of the mesh's axes for people; empty on one rank."""

    def place(self, model: Decoder) -> None:
        """Leave in the model what belongs on this rank."""
        ...

    def learn(self, trainer: "Trainer", parts: Sequence[Tensor], watch: "Stopwatch") -> Learned:
        """Gradients of all micro-batches; our share of the loss, and our records, one per sparse layer."""
        ...

    def of_own_layers(self, records: Sequence[RoutingRecord]) -> Sequence[RoutingRecord]:
        """The records of layers that are here."""
        ...

    def logits(self, model: Decoder) -> Callable[..., Output]:
        """The model's forward pass, wherever its layers are."""
        ...

    def begin_micro_batch(self, last: bool) -> None:
        """Before each forward pass of a step; `last` where gradients are complete after it."""
        ...

    def settle(self) -> None:
        """After forward passes without a backward pass."""
        ...

    def own_rows(self, token_BS: Tensor) -> tuple[Tensor, float]:
        """Our rows of a micro-batch, and their share of it, 0..1."""
        ...

    def finish_gradients(self) -> Tensor:
        """Make gradients those of the whole batch; returns their norm, where it was computed."""
        ...

    def before_update(self) -> None:
        """The optimiser is about to move the weights."""
        ...

    def after_update(self, trainer: "Trainer") -> None:
        """After every step, applied or not."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """Of the last step, for the log."""
        ...

    def meet(self) -> None:
        """Make copies equal that learn apart; before checkpoints and evaluations."""
        ...

    @property
    def sent_bytes(self) -> float:
        """Bytes this rank has sent for gradients or updates so far."""
        ...

    def total(self, loss: Tensor, records: Sequence[RoutingRecord]) -> Learned:
        """Loss and records of all ranks from our shares of them."""
        ...

    def between_steps(self, stop: bool) -> tuple[bool, Error | None]:
        """True everywhere where `stop` is true on one rank; and why a checkpoint could not be written meanwhile."""
        ...

    def guard(self) -> AbstractContextManager[None]:
        """Raise RankLostError for errors that come of other ranks' absence."""
        ...

    def news(self, last: bool) -> list[News]:
        """What the ranks have to tell of the last steps, for the event log; after every step, `last` or not."""
        ...

    def first(self, work: Callable[[], T]) -> T:
        """Let the leader work, the others wait; all get its result, and what it raises is raised everywhere."""
        ...

    def save(self, folder: Path, trainer: "Trainer", tokenizer: Tokenizer, done: Done, wait: bool) -> None:
        """Write a checkpoint, at once or while training goes on; `done` is called when it is there."""
        ...

    def restore(self, folder: Path, trainer: "Trainer") -> tuple[int, str]:
        """Go back to a checkpoint; returns the steps done, and for people what could not be taken over."""
        ...


class OneRank:
    """Everything is here."""

    def __init__(self) -> None:
        self.leads = True
        self.split, self.layout = alone("dp"), ""
        self.model: Decoder | None = None

    def place(self, model: Decoder) -> None:
        """All of it."""
        self.model = model

    def learn(self, trainer: "Trainer", parts: Sequence[Tensor], watch: "Stopwatch") -> Learned:
        """One micro-batch after the other."""
        return learn_in_turn(trainer, parts, watch)

    def of_own_layers(self, records: Sequence[RoutingRecord]) -> Sequence[RoutingRecord]:
        """All of them."""
        return records

    def logits(self, model: Decoder) -> Callable[..., Output]:
        """The model."""
        return model

    def begin_micro_batch(self, last: bool) -> None:
        """Nothing to do."""

    def settle(self) -> None:
        """Nothing to do."""

    def own_rows(self, token_BS: Tensor) -> tuple[Tensor, float]:
        """All of them."""
        return token_BS, 1.0

    def finish_gradients(self) -> Tensor:
        """They are whole; their norm."""
        assert self.model is not None
        return gradient_norm(self.model.parameters())

    def before_update(self) -> None:
        """Nothing to do."""

    def after_update(self, trainer: "Trainer") -> None:
        """Nothing to do."""

    @property
    def facts(self) -> dict[str, Any]:
        """None."""
        return {}

    def meet(self) -> None:
        """Nothing to do."""

    @property
    def sent_bytes(self) -> float:
        """None."""
        return 0.0

    def total(self, loss: Tensor, records: Sequence[RoutingRecord]) -> Learned:
        """They are whole."""
        return loss, list(records)

    def between_steps(self, stop: bool) -> tuple[bool, Error | None]:
        """The flag."""
        return stop, None

    def guard(self) -> AbstractContextManager[None]:
        """There are no others."""
        return nullcontext()

    def news(self, last: bool) -> list[News]:
        """Nothing."""
        return []

    def first(self, work: Callable[[], T]) -> T:
        """Do it."""
        return work()

    def save(self, folder: Path, trainer: "Trainer", tokenizer: Tokenizer, done: Done, wait: bool) -> None:
        """One file per kind of tensor, at once."""
        state = checkpoint.capture(trainer.step, trainer.model, trainer.optimizer, trainer.memory)
        checkpoint.save_model(folder, trainer.model, tokenizer, state)
        done()

    def restore(self, folder: Path, trainer: "Trainer") -> tuple[int, str]:
        """See `Engine`; what ranks remember of each other has no place on one."""
        return checkpoint.restore(folder, trainer.model, trainer.optimizer, trainer.memory), ""


def learn_in_turn(trainer: "Trainer", parts: Sequence[Tensor], watch: "Stopwatch") -> Learned:
    """Forward and backward of one micro-batch after the other."""
    model, engine = trainer.model, trainer.engine
    total = torch.zeros((), dtype=torch.float64, device=trainer.device)
    layers: list[list[RoutingRecord]] = [[] for _ in model.routers]
    for place, part_BS in enumerate(parts):
        engine.begin_micro_batch(last=place + 1 == len(parts))
        own_BS, share = engine.own_rows(part_BS)
        with trainer.autocast():
            loss, records = model.loss(own_BS, trainer.memory[place] if trainer.memory else None)
        loss = loss * share
        router_loss = sum((record.loss for record in records), start=torch.zeros((), device=trainer.device))
        watch.lap("forward_s")
        ((loss + router_loss) / len(parts)).backward()
        total += loss.detach() / len(parts)
        for router, seen, record in zip(model.routers, layers, records, strict=True):
            router.count_micro_batch(record)
            seen.append(record)
        watch.lap("backward_s")
    return total, [merge(seen) for seen in layers]


class Stopwatch:
    """Where a step's time goes, by the host's clock, or on a GPU between events that nobody waits for."""

    def __init__(self, device: torch.device) -> None:
        self._gpu, self._laps = device.type == "cuda", [("", self._mark(device.type == "cuda"))]

    @staticmethod
    def _mark(gpu: bool) -> Any:
        if not gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        """What was done since the last lap counts as `name`."""
        self._laps.append((name, self._mark(self._gpu)))

    def read(self) -> dict[str, float]:
        """Seconds of every name; the device must have passed the last lap."""
        found: dict[str, float] = {}
        for (_, begun), (name, ended) in pairwise(self._laps):
            spent_s = begun.elapsed_time(ended) / 1e3 if self._gpu else ended - begun
            found[name] = found.get(name, 0.0) + spent_s
        return found
