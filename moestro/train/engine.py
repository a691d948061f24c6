"""What a step does differently on one rank and on several.

    Trainer -> Engine: which rows are ours, how gradients become whole, who writes files

`OneRank` is the plain case, `train/ranks.py` has the other. The trainer and the loop are the same for both.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from moestro.core.errors import CheckpointError
from moestro.core.tokens import Tokenizer
from moestro.dist.mesh import Axis, alone
from moestro.nn.decoder import Decoder
from moestro.nn.router import RoutingRecord
from moestro.train import checkpoint

if TYPE_CHECKING:
    from moestro.train.trainer import Trainer

T = TypeVar("T")
Done = Callable[[], None]


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
        """Make gradients those of the whole batch; returns their norm."""
        ...

    def clip(self, norm: Tensor, most: float) -> None:
        """Shrink gradients so that their norm is at most `most`."""
        ...

    def total(self, loss: float, records: Sequence[RoutingRecord]) -> tuple[float, list[RoutingRecord]]:
        """Loss and records of all ranks from our shares of them."""
        ...

    def between_steps(self, stop: bool) -> tuple[bool, CheckpointError | None]:
        """True everywhere where `stop` is true on one rank; and why a checkpoint could not be written meanwhile."""
        ...

    def guard(self) -> AbstractContextManager[None]:
        """Raise RankLostError for errors that come of other ranks' absence."""
        ...

    def first(self, work: Callable[[], T]) -> T:
        """Let the leader work, the others wait; all get its result, and what it raises is raised everywhere."""
        ...

    def save(self, folder: Path, trainer: "Trainer", tokenizer: Tokenizer, done: Done, wait: bool) -> None:
        """Write a checkpoint, at once or while training goes on; `done` is called when it is there."""
        ...

    def restore(self, folder: Path, trainer: "Trainer") -> int:
        """Go back to a checkpoint; returns the steps done."""
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
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def clip(self, norm: Tensor, most: float) -> None:
        """See `Engine`."""
        assert self.model is not None
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), most, norm)

    def total(self, loss: float, records: Sequence[RoutingRecord]) -> tuple[float, list[RoutingRecord]]:
        """They are whole."""
        return loss, list(records)

    def between_steps(self, stop: bool) -> tuple[bool, CheckpointError | None]:
        """The flag."""
        return stop, None

    def guard(self) -> AbstractContextManager[None]:
        """There are no others."""
        return nullcontext()

    def first(self, work: Callable[[], T]) -> T:
        """Do it."""
        return work()

    def save(self, folder: Path, trainer: "Trainer", tokenizer: Tokenizer, done: Done, wait: bool) -> None:
        """One file per kind of tensor, at once."""
        state = checkpoint.capture(trainer.step, trainer.model, trainer.optimizer, trainer.memory)
        checkpoint.save_model(folder, trainer.model, tokenizer, state)
        done()

    def restore(self, folder: Path, trainer: "Trainer") -> int:
        """See `Engine`."""
        return checkpoint.restore(folder, trainer.model, trainer.optimizer, trainer.memory)
