"""The fastest layouts that fit: all combinations that are possible, evaluated as columns.

    Question -> candidates (columns) -> memory -> those that fit -> step time -> the best few, and why others lose

Degrees are divisors, not powers of two only; what cannot run is left out before anything is evaluated. Memory is
computed first, because it is cheaper and rules most layouts out. Nothing is sampled: what is left is all evaluated.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import product

import numpy as np

from moestro.cluster.topology import Cluster
from moestro.core.errors import PlanError
from moestro.plan.case import Case
from moestro.plan.columns import Array, Number, at
from moestro.plan.layout import SCHEDULES, Layout, text_of
from moestro.plan.loads import imbalance_of_ranks
from moestro.plan.machine import machine_of, precision_of
from moestro.plan.memory import Memory, memory
from moestro.plan.profile import Profile, effect_and_spread
from moestro.plan.schedule import DUALPIPE, INTERLEAVED, ONE_F_ONE_B, ZERO_BUBBLE, ZERO_BUBBLE_V
from moestro.plan.shape import ModelShape
from moestro.plan.stacks import Stack, traits
from moestro.plan.step import StepTime, step_time

RECOMPUTE: tuple[dict[str, float], ...] = (
    {},
    {"again_activation": 1, "again_up": 1},
    {"again_activation": 1, "again_up": 1, "again_dense": 1, "again_experts": 1},
    {"full": 0.5},
    {"full": 1},
)
"""What may be done again, from nothing to everything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """What is tried besides every possible cut."""

    micro_batches: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
    virtual: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 12)
    recompute: tuple[dict[str, float], ...] = RECOMPUTE


MODULES = ("again_activation", "again_up", "again_dense", "again_experts", "again_attention")
WHOLE_SPACE = Space(
    micro_batches=tuple(range(1, 65)),
    virtual=tuple(range(1, 17)),
    recompute=(
        *(dict(zip(MODULES, map(float, chosen), strict=True)) for chosen in product((0, 1), repeat=len(MODULES))),
        *({"full": share} for share in (0.25, 0.5, 0.75, 1.0)),
    ),
)
"""Every micro-batch, every number of chunks, every choice of modules: to check the usual space against; minutes."""
CHUNK = 16384
"""Layouts evaluated at a time: columns stay in the processor's cache."""
MOST_TENSOR = 64
TRAINER_LIMITS = (
    "the trainer has 1f1b, interleaved and zero_bubble, zero 2 and 3 only without a pipeline, recomputes all or "
    "nothing, no cp"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What to run, and on what."""

    shape: ModelShape
    cluster: Cluster
    stack: Stack
    profile: Profile
    devices: int
    sequences: int
    """Of one step over all ranks."""
    length: int
    precision: str = "bf16"
    imbalance: float = 0.0
    """Busiest over mean load of expert ranks; 0 takes the profile's."""
    load_RE: Array | None = None
    """Loads of experts from a trace; the imbalance of ranks follows for every degree of expert parallelism."""
    fixed: dict[str, float] = field(default_factory=dict)
    """Fields of Layout that the user has set."""
    trainable: bool = False
    """Only layouts that this package's own trainer runs."""

    @property
    def kind(self) -> str:
        """dense or moe."""
        return "moe" if float(self.shape.experts) else "dense"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Result of a search, fastest first."""

    layouts: tuple[Layout, ...]
    steps: tuple[StepTime, ...]
    memories: tuple[Memory, ...]
    considered: int
    """Layouts that could run."""
    fitting: int
    seconds: float
    """Of searching."""
    spread: float
    """Standard deviation of the logarithm of a step's seconds."""
    too_large: tuple[Layout, float, float] | None = None
    """The fastest layout that does not fit, its seconds and its GiB."""


def case_of(question: Question, layout: Layout) -> Case:
    """The case of one layout, or of a column of them."""
    effect, _ = effect_and_spread(question.profile, question.stack.effects or question.stack.name, question.kind)
    imbalance: Number = question.imbalance
    if question.load_RE is not None:
        imbalance = imbalance_of_ranks(question.load_RE, layout.ep)
    return Case(
        shape=question.shape,
        layout=layout,
        machine=machine_of(question.cluster, question.precision),
        precision=precision_of(question.precision),
        traits=traits(question.stack, question.cluster.device),
        length=float(question.length),
        imbalance=imbalance,
        effect=effect,
    )


def search(question: Question, keep: int = 5, space: Space | None = None) -> Found:
    """The `keep` fastest layouts that fit; raises PlanError with the nearest way out where none does."""
    begin = time.perf_counter()
    columns = candidates(question, space)
    number = _number(columns)
    room = room_gib(question)
    seconds, peaks = np.full(number, np.inf), np.empty(number)
    for start in range(0, number, CHUNK):
        part = at(columns, slice(start, start + CHUNK))
        peaks[start : start + CHUNK] = memory(case_of(question, part), question.profile.memory).total_gib
    fits = np.flatnonzero(peaks <= room)
    if not len(fits):
        raise PlanError(_why_none_fits(question, columns, peaks, room))
    for start in range(0, len(fits), CHUNK):
        places = fits[start : start + CHUNK]
        seconds[places] = step_time(case_of(question, at(columns, places)), question.profile.constants).total_s
    best = _distinct(columns, seconds, keep)
    layouts = tuple(_plain(at(columns, int(place))) for place in best)
    cases = [case_of(question, layout) for layout in layouts]
    return Found(
        layouts=layouts,
        steps=tuple(step_time(case, question.profile.constants) for case in cases),
        memories=tuple(memory(case, question.profile.memory) for case in cases),
        considered=number,
        fitting=len(fits),
        seconds=time.perf_counter() - begin,
        spread=spread_of(question),
        too_large=_fastest_too_large(question, columns, peaks, room, float(seconds[best[0]])),
    )


def spread_of(question: Question) -> float:
    """Standard deviation of the logarithm of predicted seconds."""
    software = question.stack.effects or question.stack.name
    return effect_and_spread(question.profile, software, question.kind)[1]


def _distinct(columns: Layout, seconds: Array, keep: int) -> list[int]:
    """Places of the fastest layouts, one per choice of degrees: variants of recomputation and schedule count once."""
    best: list[int] = []
    seen = set()
    for place in np.argsort(seconds, kind="stable")[: 400 * keep]:
        degrees = tuple(
            float(getattr(columns, name)[place]) for name in ("tp", "pp", "cp", "ep", "etp", "micro_batch", "zero")
        )
        if degrees not in seen and np.isfinite(seconds[place]):
            seen.add(degrees)
            best.append(int(place))
        if len(best) == keep:
            break
    return best


def _plain(layout: Layout) -> Layout:
    return type(layout)(**{item.name: float(getattr(layout, item.name)) for item in fields(layout)})


def divisors(number: int, most: int) -> list[int]:
    """Divisors up to a bound."""
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def candidates(question: Question, space: Space | None = None) -> Layout:
    """Every layout that can run, as columns; raises PlanError where the user's settings leave none."""
    cuts = _cuts(question)
    if not cuts:
        raise PlanError(_why_impossible(question))
    space = space or Space()
    sizes = [micro for micro in space.micro_batches if question.sequences % micro == 0]
    zeros = (0, 1, 2, 3) if question.trainable else (1, 3)
    options = list(product(sizes, space.virtual, range(len(SCHEDULES)), zeros, range(len(space.recompute))))
    cut_CK, option_OK = np.array(cuts, dtype=np.float64), np.array(options, dtype=np.float64)
    rows_C = np.repeat(np.arange(len(cut_CK)), len(option_OK))
    rows_O = np.tile(np.arange(len(option_OK)), len(cut_CK))
    tp, pp, cp, ep, etp = cut_CK.T
    micro, chunks, schedule, zero, again = option_OK.T
    possible = _possible(
        question,
        [column[rows_C] for column in (tp, pp, cp)],
        [column[rows_O] for column in (micro, chunks, schedule, zero)],
    )
    possible &= _as_set(question, again[rows_O], micro[rows_O], chunks[rows_O], schedule[rows_O], zero[rows_O])
    if question.trainable:
        batches = question.sequences * pp[rows_C] * tp[rows_C] / (question.devices * micro[rows_O])
        whole = np.array([not choice or choice == {"full": 1} for choice in space.recompute])[again.astype(int)]
        possible &= _trainable(pp[rows_C], batches, schedule[rows_O], zero[rows_O]) & whole[rows_O]
    c, o = rows_C[possible], rows_O[possible]
    if not len(c):
        raise PlanError(_why_impossible(question))
    chosen = again[o].astype(int)
    recompute = {
        name: there * np.array([choice.get(name, 0.0) for choice in space.recompute])[chosen]
        for name, there in _modules(question.shape).items()
    }
    return Layout(
        devices=float(question.devices),
        sequences=float(question.sequences),
        tp=tp[c],
        pp=pp[c],
        cp=cp[c],
        ep=ep[c],
        etp=etp[c],
        micro_batch=micro[o],
        virtual=chunks[o],
        schedule=schedule[o],
        zero=zero[o],
        by_cost=1.0,
        **recompute,
    )


def _modules(shape: ModelShape) -> dict[str, float]:
    """What can be done again, 1 where the model has it."""
    there = dict.fromkeys(("full", *MODULES), 1.0)
    there["again_up"] = float(shape.latent)
    there["again_dense"] = float(shape.num_dense > 0 or shape.shared_width > 0)
    there["again_experts"] = float(shape.sparse)
    return there


def _cuts(question: Question) -> list[tuple[int, int, int, int, int]]:
    """(tp, pp, cp, ep, etp) that divide devices, heads, layers, experts and batch."""
    shape, devices, fixed = question.shape, question.devices, question.fixed
    experts = int(shape.experts)
    found = []
    for tp, pp, cp in _dense_cuts(question):
        ranks = devices // pp
        for ep, etp in product(divisors(experts, ranks) if experts else [1], {1, tp} if experts else {1}):
            if ranks % (ep * etp) or int(shape.expert_width or etp) % etp:
                continue
            cut = (tp, pp, cp, ep, etp)
            names = ("tp", "pp", "cp", "ep", "etp")
            if all(fixed.get(name, size) == size for name, size in zip(names, cut, strict=True)):
                found.append(cut)
    return found


def _dense_cuts(question: Question) -> Iterator[tuple[int, int, int]]:
    """(tp, pp, cp) that divide devices, heads, layers and batch."""
    shape, devices = question.shape, question.devices
    host = int(min(question.cluster.unit_sizes()[0], MOST_TENSOR))
    heads, kv = int(shape.heads), int(shape.kv_heads)
    for tp in divisors(devices, host):
        if heads % tp or (not float(shape.latent) and kv % tp and (question.trainable or tp % kv)):
            continue
        if question.trainable and (shape.dense_width % tp or shape.shared_width % tp):
            continue
        for pp in divisors(devices // tp, int(shape.num_layers)):
            for cp in divisors(devices // (tp * pp), 1 if question.trainable else 64):
                data = devices // (tp * pp * cp)
                short = cp > 1 and question.length / cp < 512
                if not (question.sequences % data or question.length % (2 * cp * tp) or short):
                    yield tp, pp, cp


def _possible(question: Question, cut: list[Array], option: list[Array]) -> np.ndarray:
    """Which options a cut allows."""
    tp, pp, cp = cut
    micro, chunks, schedule, zero = option
    data = question.devices / (tp * pp * cp)
    batches = question.sequences / (data * micro)
    whole = np.abs(batches - np.round(batches)) < 1e-9
    piped, interleaved = pp > 1, schedule == INTERLEAVED
    enough = chunks * pp <= float(question.shape.num_layers)
    filled = np.where(interleaved, batches % np.maximum(pp, 1) == 0, True)
    filled &= np.where(schedule == DUALPIPE, (batches >= 2 * pp) & (pp % 2 == 0), True)
    filled &= np.where(schedule == ZERO_BUBBLE_V, 2 * pp <= float(question.shape.num_layers), True)
    fitting = np.where(interleaved, piped & (chunks > 1), chunks == 1) & (piped | (schedule == ONE_F_ONE_B))
    return whole & (batches >= 1) & enough & filled & fitting & ((zero < 3) | ~piped)


def _trainable(pp: Array, batches: Array, schedule: Array, zero: Array) -> np.ndarray:
    """What the trainer runs: three schedules, whole rounds of micro-batches in two of them.

    In a pipeline the trainer's zero 2 and 3 keep whole gradients during a step, which is not modelled: left out.
    """
    known = (schedule == ONE_F_ONE_B) | np.isin(schedule, (INTERLEAVED, ZERO_BUBBLE)) & (batches % pp == 0)
    return known & ((zero <= 1) | (pp == 1))


def _as_set(question: Question, again: Array, micro: Array, chunks: Array, schedule: Array, zero: Array) -> np.ndarray:
    """Which options agree with what the user has set."""
    kept = np.ones(len(again), dtype=bool)
    columns = {"micro_batch": micro, "virtual": chunks, "schedule": schedule, "zero": zero, "recompute": again}
    for name, column in columns.items():
        if name in question.fixed:
            kept &= column == question.fixed[name]
    return kept


def _why_impossible(question: Question) -> str:
    """One line: what was set, and the nearest layout that works."""
    free = replace(question, fixed={})
    if not question.fixed:
        return (
            f"no layout divides {question.shape.name} over {question.devices} devices with {question.sequences} "
            f"sequences of {question.length} tokens; {_nearest_batch(question)}"
        )
    wanted = " ".join(f"{name}={value:g}" for name, value in question.fixed.items())
    columns = candidates(free)
    distance = np.zeros(_number(columns))
    for name, value in question.fixed.items():
        column = np.broadcast_to(getattr(columns, name, 0.0), len(distance))
        distance = distance + np.abs(np.log((column + 1e-3) / (value + 1e-3)))
    nearest = _plain(at(columns, int(np.argmin(distance))))
    return (
        f"no layout with {wanted} is possible for {question.shape.name} on {question.devices} devices with "
        f"{question.sequences} sequences ({_limits(question)}); the nearest that works is {text_of(nearest)}"
    )


def _limits(question: Question) -> str:
    shape = question.shape
    parts = [f"{shape.num_layers:g} layers", f"{shape.heads:g} heads", f"{shape.kv_heads:g} key-value heads"]
    parts += [f"{shape.experts:g} experts"] if float(shape.experts) else []
    return ", ".join(parts) + " must divide" + (f"; {TRAINER_LIMITS}" if question.trainable else "")


def _nearest_batch(question: Question) -> str:
    devices = question.devices
    nearest = max(devices, round(question.sequences / devices) * devices)
    return f"take a number of sequences that shares large divisors with the devices, for example {nearest}"


def _why_none_fits(question: Question, columns: Layout, peaks: Array, room: float) -> str:
    """One line: the leanest layout, what it needs, and how many devices would do."""
    place = int(np.argmin(peaks))
    leanest, device = _plain(at(columns, place)), question.cluster.device
    message = (
        f"{question.shape.name} does not fit {question.devices} x {device.name}: the leanest layout, "
        f"{text_of(leanest)}, needs {peaks[place]:.1f} GiB of {room:.1f} GiB a device"
    )
    for times in (2, 4, 8, 16, 32, 64):
        devices = question.devices * times
        if devices > question.cluster.most_devices:
            break
        more = replace(question, devices=devices, fixed={}, sequences=max(question.sequences, devices))
        try:
            larger = candidates(more)
        except PlanError:
            continue
        peak = np.asarray(memory(case_of(more, larger), question.profile.memory).total_gib)
        if peak.min() <= room:
            nearest = _plain(at(larger, int(np.argmin(peak))))
            return f"{message}; it fits {devices} devices with {text_of(nearest)}"
    return f"{message}; take devices with more memory, or a shorter sequence than {question.length}"


def _fastest_too_large(
    question: Question, columns: Layout, peaks: Array, room: float, best_s: float
) -> tuple[Layout, float, float] | None:
    """The fastest layout among a few that miss the memory by less than half, if it would be faster than the best."""
    near = np.flatnonzero((peaks > room) & (peaks < 1.5 * room))[:: max(1, len(peaks) // (4 * CHUNK))]
    if not len(near):
        return None
    near = near[: 2 * CHUNK]
    seconds = np.asarray(step_time(case_of(question, at(columns, near)), question.profile.constants).total_s)
    place = int(np.argmin(seconds))
    if seconds[place] >= best_s:
        return None
    return _plain(at(columns, int(near[place]))), float(seconds[place]), float(peaks[near[place]])


def room_gib(question: Question) -> float:
    """Memory of a device that training may use."""
    return question.cluster.device.memory_gib - question.profile.memory.runtime_gib


def _number(columns: Layout) -> int:
    return int(np.size(columns.tp))
