"""A run from its first step to its last, and what it leaves on disk.

    start(recipe) | go_on(folder) -> prepare tokens -> steps -> events, load trace, checkpoints -> final evaluation

A stop request is honoured between steps, after a checkpoint; `go_on` continues from the newest sound checkpoint, bit
for bit on one CPU rank. A checkpoint that the disk refuses is reported and tried again at the next interval; the last
one must succeed.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moestro.core.errors import CheckpointError, StorageError, TrainingError
from moestro.core.events import EventLog, read_events
from moestro.core.units import bytes_text, count_text
from moestro.nn.path_choice import why_no_fp8
from moestro.nn.router import RoutingRecord
from moestro.place.loads import LoadWriter
from moestro.train import checkpoint
from moestro.train.data import TokenData, open_data, prepare
from moestro.train.device import environment
from moestro.train.engine import Engine, OneRank
from moestro.train.evaluate import Evaluation, compressors, evaluate
from moestro.train.optim import lr_share
from moestro.train.progress import Reading, Silent, Watcher
from moestro.train.recipe import Recipe
from moestro.train.run_folder import RunFolder
from moestro.train.tensorboard import INSTALL, Board, installed, open_board
from moestro.train.trainer import StepResult, Trainer

SKIPS_IN_A_ROW = 20
"""Steps that may fail one after another before training stops although train.on_nan is skip."""
LN2 = float(np.log(2))
WatcherFor = Callable[[Recipe, int], Watcher]
Stop = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    folder: RunFolder
    step: int
    finished: bool
    seconds: float
    """Wall-clock of this call's steps, evaluations and checkpoints."""
    evaluation: Evaluation | None = None
    compressors: dict[str, float] = field(default_factory=dict)
    """Bits per byte of general compressors on the same held-out files."""


def start(
    recipe: Recipe, watcher: Watcher | None = None, stop: Stop = lambda: False, engine: Engine | None = None
) -> Outcome:
    """Begin a new run; raises ConfigError where `out` already holds one."""
    watcher, engine = watcher or Silent(), engine or OneRank()
    folder = RunFolder(recipe.out)
    engine.first(lambda: folder.create(recipe))
    try:
        watcher.say(f"reading {recipe.data.source}, tokens: {recipe.data.tokenizer}")
        engine.first(lambda: prepare(recipe.data, folder.data))
        data = open_data(folder.data)
        trainer = Trainer(recipe, data, engine)
    except BaseException:
        if engine.leads:
            folder.recipe.unlink(missing_ok=True)  # nothing has begun: leave the folder free for another try
        raise
    with _Session(folder, trainer, data, watcher) as session:
        session.begin("started")
        return session.run(stop)


def go_on(
    root: Path,
    watcher: Watcher | None = None,
    stop: Stop = lambda: False,
    engine: Engine | None = None,
    recipe: Recipe | None = None,
) -> Outcome:
    """Continue a run from its newest sound checkpoint, or from its start where it has none yet.

    recipe   the run's own with another [dist]; None: as it is
    """
    watcher, engine, folder = watcher or Silent(), engine or OneRank(), RunFolder(root)
    recipe = recipe or folder.load_recipe()
    if engine.first(folder.finished):
        raise TrainingError(f"{root} is finished ({recipe.train.steps} steps); look at it with moestro report {root}")
    if not engine.first((folder.data / "data.json").exists):
        engine.first(lambda: prepare(recipe.data, folder.data))
    data = open_data(folder.data)
    trainer = Trainer(recipe, data, engine)
    newest = engine.first(lambda: next(iter(folder.checkpoints()), None))
    if newest is not None:
        found = engine.first(lambda: checkpoint.find_checkpoint(root))
        if found != newest:
            watcher.say(f"{newest.name} is damaged; going on from {found.name}")
        if left := trainer.restore(found):
            watcher.say(left)
    with _Session(folder, trainer, data, watcher) as session:
        session.begin("resume")
        return session.run(stop)


def ended(root: Path) -> Outcome:
    """What a finished run came to, from its log."""
    events = read_events(RunFolder(root).events)
    measured = next(event for event in reversed(events) if event["event"] == "evaluation")
    last = next(event for event in reversed(events) if event["event"] == "finished")
    evaluation = Evaluation(**{fact.name: measured[fact.name] for fact in fields(Evaluation)})
    return Outcome(RunFolder(root), last["step"], True, last["seconds"], evaluation, last["compressors"])


class _Session:
    """The open files of a run, and what happens around a step."""

    def __init__(self, folder: RunFolder, trainer: Trainer, data: TokenData, watcher: Watcher) -> None:
        self.folder, self.trainer, self.data, self.watcher = folder, trainer, data, watcher
        self.recipe, self.spec = trainer.recipe, trainer.model.spec
        self.engine, layers = trainer.engine, len(self.spec.moe_layers)
        leads = self.engine.leads
        self.events = EventLog(folder.events if leads else Path(os.devnull))
        traced = leads and self.spec.moe and layers
        merges = self.recipe.dist.dispatch == "hierarchical"
        self.loads = (
            LoadWriter(folder.loads, layers, self.spec.moe.num_experts, merges) if traced and self.spec.moe else None
        )
        self.board: Board = open_board(folder.tensorboard, self.recipe.train.tensorboard and leads, trainer.step)
        self.bytes_per_token = data.train.text_bytes / len(data.train.token_N)
        self.skipped, self.begun_s = 0, time.monotonic()

    def __enter__(self) -> "_Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.events.close()
        self.board.close()
        if self.loads:
            self.loads.close()

    def begin(self, event: str) -> None:
        """Say and log what is about to run."""
        trainer = self.trainer
        total, active = trainer.parameters, trainer.active_parameters
        self.events.write(
            event,
            trainer.step,
            parameters=total,
            active_parameters=round(active),
            device=str(trainer.device),
            precision=str(trainer.dtype).removeprefix("torch."),
            train_tokens=len(self.data.train.token_N),
            train_bytes=self.data.train.text_bytes,
            heldout_bytes=self.data.heldout.text_bytes,
            environment=environment(trainer.device),
            **({"ranks": layout} if (layout := self.engine.layout) else {}),
        )
        left_out = ", ".join(f"{number} {reason}" for reason, number in self.data.left_out.items())
        self.watcher.say(
            f"{bytes_text(self.data.train.text_bytes)} of text in {len(self.data.train.names)} documents, "
            f"{bytes_text(self.data.heldout.text_bytes)} held out" + (f"; left out: {left_out}" if left_out else "")
        )
        self.watcher.say(
            f"{count_text(total)} parameters, {count_text(active)} used per token, "
            f"{str(trainer.dtype).removeprefix('torch.')} on {trainer.device}"
            + (f", {self.engine.layout}" if self.engine.layout else "")
        )
        if self.recipe.train.precision == "fp8" and (reason := why_no_fp8(self.spec, trainer.device)):
            self.watcher.say(f"train.precision is fp8, but experts stay in bfloat16: {reason}")
        if self.recipe.train.tensorboard and not installed():
            self.watcher.say(INSTALL)
        if self.recipe.balance.slotted and self.recipe.dist.ep == 1:
            self.watcher.say("balance: dist.ep is 1, so every rank holds all experts and there is nothing to balance")

    def run(self, stop: Stop) -> Outcome:
        """Steps until the last or until `stop` asks."""
        train, trainer = self.recipe.train, self.trainer
        while trainer.step < train.steps:
            if self.asked_to(stop):
                self.tell(last=True)
                self.save(must=True)
                return Outcome(self.folder, trainer.step, finished=False, seconds=self.seconds)
            name = trainer.batch_name()
            result = trainer.run_step()
            self.log(result, name)
            self.tell(last=trainer.step == train.steps)
            last = trainer.step == train.steps
            if _due(train.evaluate_every, trainer.step) and not last:
                self.evaluate(limit=train.evaluate_sequences)
            if _due(train.checkpoint_every, trainer.step) and not last:
                self.save(must=False)
        evaluation = self.evaluate(limit=0)
        self.save(must=True)
        packed = self.engine.first(lambda: compressors(self.data))
        self.events.write("finished", trainer.step, seconds=self.seconds, compressors=packed)
        return Outcome(self.folder, trainer.step, True, self.seconds, evaluation, packed)

    def tell(self, last: bool) -> None:
        """Log what the ranks have to tell of the last steps."""
        for news in self.engine.news(last):
            if news.event != "timeline" or _due(self.recipe.train.log_every, news.step):
                self.events.write(news.event, news.step, **news.fields)
            if news.text:
                self.watcher.say(news.text)

    def asked_to(self, stop: Stop) -> bool:
        """Whether any rank was asked to stop; a checkpoint that could not be written meanwhile is reported."""
        asked, problem = self.engine.between_steps(stop())
        if problem:
            self.watcher.say(f"{problem}; training goes on and tries again")
        return asked

    @property
    def seconds(self) -> float:
        """Since this session began."""
        return round(time.monotonic() - self.begun_s, 3)

    def log(self, result: StepResult, batch: str) -> None:
        """Put a step into the log, the trace, the board and on the screen."""
        step = self.trainer.step
        if not result.applied:
            self.skip(result, batch)
            return
        self.skipped = 0
        if self.loads:
            self.loads.append(step, *loads_of(result.records))
        facts = self.facts(result)
        if _due(self.recipe.train.log_every, step):
            self.events.write("step", step, **facts)
            self.board.add("train", facts, step)
        self.watcher.step(
            Reading(
                step=step,
                loss=result.loss,
                bits_per_byte=facts["bits_per_byte"],
                tokens_per_s=facts["tokens_per_s"],
                mean_experts=_mean(facts.get("experts", [])),
                busiest_over_mean=_mean(facts.get("busiest_over_mean", [])),
            )
        )

    def facts(self, result: StepResult) -> dict[str, Any]:
        """A step in numbers; lists have one entry per sparse layer."""
        train = self.recipe.train
        facts: dict[str, Any] = {
            "loss": round(result.loss, 6),
            "bits_per_byte": round(result.loss / LN2 / self.bytes_per_token, 6),
            "grad_norm": round(result.grad_norm, 5),
            "lr": self.recipe.optimizer.lr * lr_share(self.recipe.optimizer, self.trainer.step - 1, train.steps),
            "tokens_per_s": round(train.tokens_per_step / result.step_s, 1),
        }
        facts |= {name: round(getattr(result, name), 5) for name in ("data_s", "forward_s", "backward_s", "update_s")}
        if self.engine.sent_bytes:
            facts["sent_bytes"] = round(self.engine.sent_bytes)
        facts |= self.engine.facts
        if result.records:
            records = result.records
            facts["experts"] = [round(record.mean_experts, 4) for record in records]
            facts["busiest_over_mean"] = [
                round(float(r.count_E.max() / r.count_E.mean().clamp(min=1)), 3) for r in records
            ]
            facts["entropy"] = [round(float(record.entropy), 4) for record in records]
            facts["balance"] = [round(float(record.balance), 4) for record in records]
        routers = self.trainer.model.routers
        due = _due(train.log_every, self.trainer.step)
        if due and any(router.steered for router in routers) and len(routers) == len(result.records):  # else elsewhere
            thresholds = torch.stack([router.budget.threshold for router in routers]).tolist()
            facts["threshold"] = [round(threshold, 5) for threshold in thresholds]
        return facts

    def skip(self, result: StepResult, batch: str) -> None:
        """A step that was not applied: say so, and stop where the recipe or too many in a row demand it."""
        step, what = self.trainer.step, f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
        self.events.write("skipped", step, loss=str(result.loss), grad_norm=str(result.grad_norm), batch=batch)
        self.skipped += 1
        message = f"step {step} was not applied: {what}; batch: {batch}"
        if self.recipe.train.on_nan == "stop":
            raise TrainingError(f"{message}; train.on_nan is stop: lower optimizer.lr, or set train.on_nan=skip")
        if self.skipped >= SKIPS_IN_A_ROW:
            raise TrainingError(
                f"{message}; {self.skipped} steps in a row: lower optimizer.lr and start from a checkpoint"
            )
        self.watcher.say(message)

    def evaluate(self, limit: int) -> Evaluation:
        """Measure on held-out text and log it."""
        train, trainer = self.recipe.train, self.trainer
        if limit == 0:
            self.watcher.say("evaluating on all held-out text")
        self.engine.meet()
        evaluation = evaluate(
            trainer.model,
            self.data,
            length=train.length,
            limit=limit,
            dtype=trainer.dtype,
            split=self.engine.split,
            forward=self.engine.logits(trainer.model),
        )
        self.engine.settle()
        self.events.write("evaluation", trainer.step, whole=limit == 0, **evaluation.as_dict())
        shown = {"loss": evaluation.loss, "bits_per_byte": evaluation.bits_per_byte, "experts": evaluation.mean_experts}
        self.board.add("heldout", shown, trainer.step)
        which = "held-out" if limit == 0 else "held-out sample"
        self.watcher.say(
            f"step {trainer.step}  {which}: {evaluation.bits_per_byte:.3f} bits/byte  loss {evaluation.loss:.3f}"
        )
        return evaluation

    def save(self, must: bool) -> None:
        """Write a checkpoint; a refusal by the disk is reported, and raised only where it must succeed."""
        trainer = self.trainer
        step = trainer.step
        target = self.folder.checkpoint(step)
        if self.engine.first(target.exists):
            return
        self.engine.meet()
        try:
            trainer.save(target, self.data, lambda: self.saved(target, step), wait=must)
        except (CheckpointError, StorageError) as error:
            if must:
                raise
            self.watcher.say(f"{error}; training goes on and tries again")

    def saved(self, target: Path, step: int) -> None:
        """A checkpoint is there: log it and delete older ones."""
        self.events.write("checkpoint", step, folder=target.name)
        if self.engine.leads:
            checkpoint.keep_newest(self.folder, self.recipe.train.keep_checkpoints)


def loads_of(records: Sequence[RoutingRecord]) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """count_LSE and perhaps pair_LX of a step; one process is one source."""

    def stacked(tensors: Sequence[torch.Tensor]) -> NDArray[np.int64]:
        return torch.stack(list(tensors)).round().long().cpu().numpy()

    pairs = [record.pair_X for record in records if record.pair_X is not None]
    sources = [record.count_E[None] if record.source_SE is None else record.source_SE for record in records]
    return stacked(sources), stacked(pairs) if pairs else None


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
