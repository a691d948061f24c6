"""One rank of several: its rows, its part of the model, its files; see `Engine`.

Every rank reads the same batch and takes its rows. Losses are shares of the whole batch's mean, so gradients, records
and losses only add up, and every layout of ranks learns what one rank does, to rounding. A checkpoint is written by all
ranks, each what it alone holds, and becomes visible when the last has finished.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moestro.core.errors import CheckpointError, ConfigError, Error, StorageError
from moestro.core.tokens import Tokenizer
from moestro.dist.layout import Layout, fit, places
from moestro.dist.mesh import Mesh, join, under_torchrun
from moestro.dist.pipeline import Pipeline
from moestro.dist.reduce import GradientSum, total_norm
from moestro.dist.shard import Parts, cut, held_rows, local, pieces
from moestro.dist.synchronise import Synchroniser, average, make_synchroniser
from moestro.dist.timeline import CLOCK
from moestro.dist.watch import Watch
from moestro.dist.zero import shard
from moestro.nn.decoder import Decoder, Output
from moestro.nn.router import RoutingRecord, merge
from moestro.train.balance import Balance, open_balance
from moestro.train.checkpoint import verify
from moestro.train.device import pick_device
from moestro.train.engine import Done, Engine, Learned, OneRank, Stopwatch, learn_in_turn
from moestro.train.exchange_facts import ExchangeFacts, exchange_facts
from moestro.train.ledger import EVERY, Ledger, News
from moestro.train.rank_state import (
    KIND,
    Rememberer,
    left_behind,
    mesh_facts,
    own_parts,
    take_back,
    take_back_moments,
    whole_part,
    written_under,
)
from moestro.train.recipe import Recipe
from moestro.train.record_sums import RecordSums, record_sums
from moestro.train.saving import Saving
from moestro.train.shards import Part, Shards
from moestro.train.shares import Shares, check_shares

if TYPE_CHECKING:
    from moestro.train.trainer import Trainer

T = TypeVar("T")
KINDS = ("model", "optimizer", "state", KIND)


def enlist(recipe: Recipe) -> Engine:
    """Join the ranks that a launcher has started, or be the only one; raises ConfigError for an impossible mesh."""
    if not under_torchrun():
        check_alone(recipe)
        return OneRank()
    train, here = recipe.train, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    layout = fit(recipe.dist, int(os.environ["WORLD_SIZE"]), here)
    rows = train.sequences // train.micro_batches
    check_shares(recipe, layout, rows)
    check_pipeline(recipe, layout, rows)
    if not train.threads:
        torch.set_num_threads(max((os.cpu_count() or 1) // here, 1))
    if torch.cuda.is_available() and train.device == "auto":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    join(recipe.dist.timeout_s)
    return Ranks(layout, pick_device(train.device), recipe)


def check_alone(recipe: Recipe) -> None:
    """Raise ConfigError where a mesh is asked for and nobody starts its ranks; dist.ranks = 1 says that one will do."""
    spec = recipe.dist
    asked = spec.pp * spec.dp_replicate * max(spec.dp_shard, 1) * spec.tp
    if asked > 1 and spec.ranks == 0:
        raise ConfigError(
            f"dist asks for {asked} ranks, but this is one process; start them with torchrun, here with "
            f"dist.ranks={asked}, or train on one rank with dist.ranks=1"
        )


def check_pipeline(recipe: Recipe, layout: Layout, rows: int) -> None:
    """Raise ConfigError for what does not go together with pp, or with copies that learn apart."""
    train, every = recipe.train, recipe.dist.sync_every
    if recipe.dist.sync != "step" and any(n % every for n in (train.checkpoint_every, train.evaluate_every)):
        raise ConfigError(
            f"train.checkpoint_every is {train.checkpoint_every} and train.evaluate_every {train.evaluate_every}; with "
            f"dist.sync {recipe.dist.sync} both must be multiples of dist.sync_every = {every}, where copies meet"
        )
    if layout.pp == 1:
        return
    if rows % layout.dp:
        raise ConfigError(
            f"train.sequences / train.micro_batches is {rows}; with dist.pp it must be a multiple of {layout.dp}, "
            "the parts of the batch: a pipeline moves equal pieces"
        )
    if train.micro_batches < layout.pp:
        raise ConfigError(
            f"train.micro_batches is {train.micro_batches}; it must be at least dist.pp = {layout.pp}, "
            "so that every stage has one to work on"
        )
    if recipe.dist.schedule != "1f1b" and recipe.train.micro_batches % layout.pp:
        raise ConfigError(
            f"train.micro_batches is {recipe.train.micro_batches}; for dist.schedule {recipe.dist.schedule} it must be "
            f"a multiple of dist.pp = {layout.pp}"
        )
    if train.recompute == "all" and recipe.model.moe and recipe.model.moe.router.aux_scope == "global":
        raise ConfigError(
            f"train.recompute is all with dist.pp {layout.pp} and model.moe.router.aux_scope global: a block that is "
            "computed again later in the pipeline would see other loads; set train.recompute=none or aux_scope=batch"
        )


class Ranks:
    """One of several ranks."""

    def __init__(self, layout: Layout, device: torch.device, recipe: Recipe) -> None:
        self.mesh = Mesh(layout, device, recipe.dist.timeout_s)
        self.recipe, self.spec, self.length = recipe, recipe.dist, recipe.train.length
        self.balance: Balance | None = None
        self.exchanges: ExchangeFacts | None = None
        self.sharded: list[FSDPModule] = []
        self.pipeline: Pipeline | None = None
        self.tied: nn.Parameter | None = None
        self.synchroniser: Synchroniser | None = None
        self.buffers: list[Tensor] = []
        self.steps = 0
        self.layers: list[int] = []
        self.record_sums: RecordSums | None = None
        self.saving: Saving | None = None
        self.done: Done = lambda: None
        self.watch = Watch(self.mesh.rank, layout.world, self.spec.timeout_s) if "MASTER_ADDR" in os.environ else None
        self.apart = recipe.dist.sync != "step"
        self.leads, self.split = self.mesh.rank == 0, self.mesh["dp_shard" if self.apart else "dp"]
        self.layout = f"{layout.world} ranks: {layout.text()}"
        self.shares = Shares(recipe.dist, layout, recipe.train.sequences // recipe.train.micro_batches)
        self.ledger = Ledger(self.mesh, self.shares, recipe.dist.sync_every if self.apart else EVERY)
        self.parts: Parts = {}
        self.parameters: dict[str, nn.Parameter] = {}

    def guard(self) -> AbstractContextManager[None]:
        """See `Engine`."""
        return self.watch.guard() if self.watch else nullcontext()

    def place(self, model: Decoder) -> None:
        """Cut the model in place."""
        spec, moe = model.spec, model.spec.moe
        self.layers = spec.moe_layers
        if moe:
            self.record_sums = record_sums(model, self.split, places(self.mesh.layout))
        self.balance = open_balance(self.recipe, model, self.mesh, self.first)
        self.parts = cut(model, self.mesh, self.spec, self.balance.placed.cut if self.balance else None)
        self.exchanges = exchange_facts(model, self.mesh, self.balance.placed.placements if self.balance else None)
        if self.mesh["pp"].size > 1:
            self.pipeline = Pipeline(model, self.spec, self.mesh["pp"], self.length)
            if spec.tied_head and isinstance(model.embedding, nn.Embedding):
                self.parts["embedding.weight"] = replace(self.parts["embedding.weight"], same_on=("dp", "tp", "ends"))
        self.sharded = shard(model, self.mesh, self.spec, self.pipeline) if self.spec.zero else []
        self.parameters, self.buffers = dict(model.named_parameters()), list(model.buffers())
        self.tied = self.parameters["embedding.weight"] if "ends" in self.parts["embedding.weight"].same_on else None
        inside = replace(self.spec, compression="none") if self.apart else self.spec
        self.sum_gradients = GradientSum(self.parameters, self.parts, self.mesh, inside)
        self.synchroniser = self._synchroniser()
        between = {name: replace(held, sum_over="dp_replicate") for name, held in self.parts.items()}
        self.sum_copies = GradientSum(self.parameters, between, self.mesh, inside) if self.synchroniser else None

    def begin_micro_batch(self, last: bool) -> None:
        """See `Engine`; with zero = 1 gradients stay whole until the last one."""
        for module in self.sharded:
            module.set_requires_gradient_sync(last or self.spec.zero > 1, recurse=False)
            module.set_requires_all_reduce(last, recurse=False)

    def settle(self) -> None:
        """Give back weights gathered for a forward pass that no backward pass followed."""
        for module in self.sharded:
            module.reshard()

    def meet(self) -> None:
        """See `Engine`; experts on their way arrive."""
        if self.balance:
            self.balance.placed.arrive()
        if self.synchroniser:
            self.synchroniser.meet()
            average(self.buffers, self.mesh["dp_replicate"])

    def own_rows(self, token_BS: Tensor) -> tuple[Tensor, float]:
        """Neighbouring rows, as many as `Shares` says."""
        rows = len(token_BS)
        own_BS = token_BS[self.shares.own(rows, self.mesh["dp"].index)]
        if not self.apart:
            return own_BS, len(own_BS) / rows
        copy, copies = self.mesh["dp_replicate"].index, self.mesh["dp_replicate"].size
        of_copy = rows * (copy + 1) // copies - rows * copy // copies
        return own_BS, len(own_BS) / of_copy

    def finish_gradients(self) -> Tensor:
        """See `Engine`."""
        self.sum_gradients()
        if self.tied is not None and self.tied.grad is not None:  # on the first and on the last rank of the pipeline
            grad = local(self.tied.grad)
            grad.copy_(self.mesh["ends"].sum(grad))
        if self.balance:
            self.balance.placed.replicas()
        if self.sum_copies and self.steps < self.spec.sync_after:  # post-local: synchronous at first
            self.sum_copies()
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    local(parameter.grad).div_(self.mesh["dp_replicate"].size)
        return total_norm(self.parameters, self.parts, self.mesh, self.apart)

    def before_update(self) -> None:
        """See `Engine`."""
        if self.synchroniser:
            self.synchroniser.before_step()

    def after_update(self, trainer: "Trainer") -> None:
        """See `Engine`; now and then experts begin to move."""
        self.steps = trainer.step
        if self.synchroniser:
            self.synchroniser.after_step(self.steps)
        CLOCK.end(self.steps)
        if self.balance and self.balance.after_step(self.steps, trainer.optimizer, self.first):
            self._follow_placement()

    def _follow_placement(self) -> None:
        """Experts live elsewhere from now on."""
        assert self.balance is not None
        assert self.exchanges is not None
        self.parts |= self.balance.placed.parts
        self.exchanges.follow(self.balance.placed.placements)

    def news(self, last: bool) -> list[News]:
        """See `Engine`."""
        moved = self.balance.news(self.steps) if self.balance else []
        spent, news = self.ledger.news(self.steps, last)
        if self.balance:
            self.balance.learn(spent)
        return moved + news

    @property
    def facts(self) -> dict[str, Any]:
        """See `Engine`: what dispatch did."""
        return self.exchanges.facts if self.exchanges else {}

    @property
    def sent_bytes(self) -> float:
        """For gradients or updates of dense weights and experts, by this rank, so far."""
        between = self.synchroniser.sent_bytes if self.synchroniser else 0.0
        replicas = self.balance.placed.replicas.sent_bytes if self.balance else 0.0
        copies = self.sum_copies.sent_bytes if self.sum_copies else 0.0
        return self.sum_gradients.sent_bytes + between + copies + replicas

    def learn(self, trainer: "Trainer", parts: Sequence[Tensor], watch: Stopwatch) -> Learned:
        """Through the pipeline, where there is one."""
        if self.exchanges:
            self.exchanges.begin()
        CLOCK.begin()
        with CLOCK.during("exchange"):
            return self._learn(trainer, parts, watch)

    def _learn(self, trainer: "Trainer", parts: Sequence[Tensor], watch: Stopwatch) -> Learned:
        if self.pipeline is None:
            return learn_in_turn(trainer, parts, watch)
        rows = [self.own_rows(part_BS) for part_BS in parts]
        token_BS = torch.cat([own_BS for own_BS, _ in rows])
        with trainer.autocast():
            loss, seen = self.pipeline.learn(token_BS, len(parts), rows[0][1])
        watch.lap("backward_s")
        return loss, [merge(records) for records in seen.values()]

    def total(self, loss: Tensor, records: Sequence[RoutingRecord]) -> Learned:
        """One message: the loss, then every layer's counts, means and histogram; each rank adds what it has."""
        own = dict(zip(self.pipeline.own_layers if self.pipeline else self.layers, records, strict=True))
        pairs, rows = self.recipe.train.counts_pairs(self.steps + 1), loss.new_zeros(0, dtype=torch.float64)
        if self.record_sums:
            rows = self.record_sums.rows(own, pairs, self.mesh.device)
        extra = rows.new_zeros(0)
        if self.exchanges:
            extra = self.mesh["tp"].sum(self.exchanges.numbers(own).to(extra))
        flat = torch.cat([loss.to(rows).view(1), rows.flatten(), extra])
        flat = self.mesh["pp"].sum(self.split.sum(flat))
        if self.exchanges:
            self.exchanges.read(flat[1 + rows.numel() :])
        if not self.record_sums:
            return flat[0], []
        everything = self.record_sums.read(own, flat[1 : 1 + rows.numel()].view_as(rows), pairs)
        if self.balance:
            self.balance.watch(everything)
        return flat[0], everything

    def of_own_layers(self, records: Sequence[RoutingRecord]) -> Sequence[RoutingRecord]:
        """Those of `total` whose routers are here."""
        layers = self.pipeline.own_layers if self.pipeline else self.layers
        return [record for layer, record in zip(self.layers, records, strict=True) if layer in layers]

    def logits(self, model: Decoder) -> Callable[..., Output]:
        """See `Engine`."""
        return self.pipeline.forward if self.pipeline else model

    def between_steps(self, stop: bool) -> tuple[bool, Error | None]:
        """See `Engine`; also completes a checkpoint that all ranks have written."""
        if self.apart and self.steps % self.spec.sync_every:
            return False, None
        writing = self.saving is not None and not self.saving.finished
        CLOCK.begin(anew=True)
        flags = self.mesh["world"].sum(torch.tensor([float(stop), float(writing)], device=self.mesh.device))
        stops, writers = flags.tolist()
        problem = None
        if self.saving is not None and not writers:
            CLOCK.drop()  # files are no part of a step
            try:
                self._commit()
            except (CheckpointError, StorageError) as error:
                problem = error
        return stops > 0, problem

    def first(self, work: Callable[[], T]) -> T:
        """See `Engine`; the result has to be picklable."""
        box: list[object] = [None, None]
        if self.leads:
            try:
                box[0] = work()
            except Error as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if isinstance(box[1], Error):
            raise box[1]
        result: T = box[0]  # type: ignore[assignment]
        return result

    def save(self, folder: Path, trainer: "Trainer", tokenizer: Tokenizer, done: Done, wait: bool) -> None:
        """Every rank writes its files aside; when all have, the leader adds the manifest and renames."""
        if (under_way := self.saving) is not None:
            self._commit()
            if under_way.folder == folder:  # asked to stop while this very checkpoint was being written
                return
        if self.balance:
            self.balance.placed.arrive()
        saving = Saving(folder, trainer.step)
        facts = mesh_facts(self.mesh.layout, self.spec)
        self.first(lambda: saving.begin(trainer.model, tokenizer, facts))
        saving.start(self.mesh.rank, dict(zip(KINDS, self._contents(trainer), strict=True)))
        self.saving, self.done = saving, done
        if wait:
            self._commit()

    def _commit(self) -> None:
        """Wait for everybody's files and make them a checkpoint."""
        saving, self.saving = self.saving, None
        assert saving is not None
        saving.wait()
        mine = (saving.digests, str(saving.error) if saving.error else "")
        everyones: list[tuple[dict[str, str], str]] = [({}, "") for _ in range(self.mesh.layout.world)]
        dist.all_gather_object(everyones, mine)
        errors = [error for _, error in everyones if error]
        self.first(lambda: saving.commit([digests for digests, _ in everyones], errors))
        self.done()

    def _contents(self, trainer: "Trainer") -> Iterator[list[Part]]:
        """What this rank writes of each kind."""
        yield [part for name, tensor in trainer.model.state_dict().items() for part in self._own(name, name, tensor)]
        yield [
            part
            for name, parameter in self.parameters.items()
            for key, value in trainer.optimizer.state.get(parameter, {}).items()
            for part in self._own(f"{key}.{name}", name, value)
        ]
        state = [whole_part("random", torch.get_rng_state())] if self.leads else []
        if self.leads and (row_P := self.shares.state()):
            state.append(whole_part("shares", torch.tensor(row_P)))
        placements = self.balance.state() if self.balance else {}  # asks all ranks
        yield state + [whole_part(key, value) for key, value in placements.items() if self.leads]
        moments = {
            f"{key}.{name}": value
            for name, parameter in self.parameters.items()
            for key, value in trainer.optimizer.state.get(parameter, {}).items()
        }
        others = moments if self.apart and self.mesh["dp_replicate"].index else {}
        yield list(own_parts(self.mesh.rank, self.remembered, others, self.mesh.device))

    def _own(self, name: str, place: str, tensor: Tensor) -> list[Part]:
        """The parts of a tensor that this rank writes; `place` is the parameter that says where they belong."""
        held = self.parts[place]
        if tensor.dim() == 0 and held.shape:  # the optimiser's step count
            held = replace(held, shape=(), boxes=((),), starts=None, spare=())
        if not held_rows(tensor, held).writes(self.mesh):
            return []
        return [(key, held.shape, box, part) for key, box, part in pieces(name, tensor, held.counted)]

    @torch.no_grad()
    def restore(self, folder: Path, trainer: "Trainer") -> tuple[int, str]:
        """Read what this rank holds, whatever mesh wrote it."""
        manifest = self.first(lambda: dict(verify(folder)))
        if not isinstance(manifest.get("step"), int):
            raise CheckpointError(f"{folder} has no optimiser state; start from it with train.init={folder}")
        model, moments, state = (Shards(folder, kind) for kind in KINDS[:3])
        if self.balance and self.balance.go_back(state):
            self._follow_placement()
        for name, tensor in trainer.model.state_dict().items():
            self._read(model, name, name, tensor)
        for name, parameter in self.parameters.items():
            keys = [key for key in moments.shapes if key.partition(".")[2] == name]
            entries = {key.partition(".")[0]: _like(parameter, moments.shapes[key]) for key in keys}
            for kind, value in entries.items():
                self._read(moments, f"{kind}.{name}", name, value)
            if entries:
                trainer.optimizer.state[parameter] = entries
        if "shares" in state.shapes:
            self.shares.restore(state.read("shares").tolist())
        self.steps = int(manifest["step"])
        self.synchroniser = self._synchroniser()
        return self.steps, self._remember(folder, trainer)

    def _remember(self, folder: Path, trainer: "Trainer") -> str:
        """Take back what this very rank remembered; returns what another mesh's ranks did, see `rank_state`."""
        written, facts = written_under(folder), mesh_facts(self.mesh.layout, self.spec)
        own = Shards(folder, KINDS[-1]) if written else None
        if own is None or written != facts:
            torch.manual_seed(trainer.recipe.seed + self.steps * self.split.size + self.split.index)
            return left_behind(own, written, facts) if own else ""
        take_back(own, self.mesh.rank, self.remembered, self.mesh.device)
        take_back_moments(own, self.mesh.rank, self.parameters, trainer.optimizer.state)
        return ""

    @property
    def remembered(self) -> dict[str, Rememberer | None]:
        """Who has state beside the model."""
        return {"gradients": self.sum_gradients, "updates": self.synchroniser}

    def _synchroniser(self) -> Synchroniser | None:
        return make_synchroniser(self.parameters, self.parts, self.mesh["dp_replicate"], self.spec)

    def _read(self, shards: Shards, name: str, place: str, tensor: Tensor) -> None:
        """Fill a tensor with its boxes."""
        if name not in shards.shapes:
            raise CheckpointError(f"{shards.folder} does not fit the model: {name} is missing")
        if tensor.dim() == 0:
            local(tensor).copy_(shards.read(name))
            return
        if self.parts[place].starts is not None:
            tensor.zero_()  # empty slots
        for _, box, part in pieces(name, tensor, self.parts[place]):
            part.copy_(shards.read(name, box))


def _like(parameter: nn.Parameter, shape: tuple[int, ...]) -> Tensor:
    """Room for one moment: sharded as its parameter is, or a number."""
    return torch.zeros_like(parameter) if shape else torch.zeros((), device=parameter.device)
