"""A trace and a cluster in, a placement of every layer out, with before, after and bound: what `moestro place` prints.

    Trace, Links, Costs -> place_trace -> [LayerReport]     -> table, drawing, charts

Dimension key:  L layers   S sources   E experts   G devices
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moestro.cluster.links import Links
from moestro.core.axes import Axis
from moestro.core.charts import Chart, Shades, heat_map
from moestro.core.errors import PlacementError
from moestro.place.bound import dual_bound, exact, relaxed_bound
from moestro.place.cost import (
    Bools,
    Ints,
    Layer,
    Placement,
    StepTime,
    TokenSet,
    contiguous,
    exchange_bytes,
    step_time,
)
from moestro.place.loads import Trace, pair_index, spread_sources
from moestro.place.predict import Predictor
from moestro.place.solve import solve, split

Floats = NDArray[np.float64]
RECENT = 5
"""Steps with pairs whose pairs are taken together."""
WORTH_IT = 0.98
"""A placement made afresh must be this much faster than one near the placement in force."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one expert and one token weigh."""

    token_bytes: float
    tokens_per_s: float
    """Rows that a device passes forward through its experts in a second."""
    slot_G: Ints
    gradient_bytes: float = 0.0
    state_bytes: float = 0.0
    horizon_steps: float = 1000.0


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer."""

    layer: Layer
    before: Placement
    after: Placement
    before_time: StepTime
    after_time: StepTime
    bound_s: float
    proven: bool
    moved: int
    error: float
    """Relative error that the predicted loads had lately."""

    @property
    def gap(self) -> float:
        """How far above the bound the answer lies, as a share of the bound."""
        return self.after_time.total_s / self.bound_s - 1


def source_loads(trace: Trace, devices: int) -> tuple[Floats, Floats]:
    """Predicted token_LSE and error_L from a trace.

    raises  PlacementError when the trace was recorded on a number of ranks that does not fit
    """
    if not len(trace.step_N):
        raise PlacementError("the trace has no steps; train a few first")
    _, layers, sources, experts = trace.source_MLSE.shape
    predictor = Predictor(layers, sources * experts)
    for count_LSE in trace.source_MLSE:
        predictor.update(count_LSE.reshape(layers, -1))
    load_LX, error_L = predictor.predict()
    return spread_sources(load_LX.reshape(layers, sources, experts), devices), error_L


def token_sets(trace: Trace, number: int, token_SE: Floats, links: Links) -> tuple[TokenSet, ...]:
    """Experts that were chosen together lately, as token sets, by host in proportion to tokens.

    Sets of one host have just its tokens of every expert: what is in no pair was chosen alone, and where tokens choose
    more than two, they are taken apart into pairs that count for less.
    """
    pair_X, count_E = recent_pairs(trace, number)
    experts = len(count_E)
    first_X, second_X = pair_index(experts)
    token_HE = np.zeros((links.hosts, experts))
    np.add.at(token_HE, links.host_G, token_SE)
    part_HE = token_HE / np.maximum(token_SE.sum(axis=0), 1e-12)
    pair_X = pair_X * (token_SE.sum() / max(count_E.sum(), 1.0))

    def paired_E(here_X: Floats) -> Floats:
        return np.asarray(np.bincount(first_X, here_X, experts) + np.bincount(second_X, here_X, experts), float)

    found = []
    for host, (token_E, part_E) in enumerate(zip(token_HE, part_HE, strict=True)):
        here_X = pair_X * np.sqrt(part_E[first_X] * part_E[second_X])
        room_E = token_E / np.maximum(paired_E(here_X), token_E + 1e-300)
        here_X *= np.minimum(room_E[first_X], room_E[second_X])
        alone_E = token_E - paired_E(here_X)
        found += [TokenSet(host, (int(first_X[x]), int(second_X[x])), float(here_X[x])) for x in here_X.nonzero()[0]]
        found += [TokenSet(host, (int(e),), float(alone_E[e])) for e in np.flatnonzero(alone_E > 0)]
    return tuple(found)


def recent_pairs(trace: Trace, number: int) -> tuple[Floats, Floats]:
    """pair_X and count_E of one layer over the last steps whose pairs were counted."""
    known_N = np.isin(trace.step_N, trace.pair_step_P[-RECENT:])
    pair_PX, count_PE = trace.pair_PLX[-RECENT:, number], trace.count_NLE[known_N, number]
    return pair_PX.astype(float).sum(axis=0), count_PE.astype(float).sum(axis=0)


def basis(trace: Trace, reports: Sequence[LayerReport]) -> str:
    """What of the trace the plan was made from, in a line."""
    sources, devices = trace.source_MLSE.shape[2], reports[0].layer.links.devices
    by_source = f"loads of {sources} sources on {devices} devices" if sources > 1 else "every device alike"
    steps = min(len(trace.pair_step_P), RECENT)
    together = f"copies to one host merged, by pairs of {steps} steps" if reports[0].layer.sets else "every copy sent"
    return f"{by_source}; {together}"


def place_trace(
    trace: Trace,
    links: Links,
    costs: Costs,
    *,
    held_LEG: Sequence[Bools] | None = None,
    effort: float = 1.0,
    prove_s: float = 0.0,
    merge_copies: bool | None = None,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerReport]:
    """Place every layer.

    held_LEG       placements in force; contiguous without
    prove_s        seconds for a tighter bound of every layer; from 1 s on small layers are also tried exactly
    merge_copies   tokens travel once per host, which needs pairs; None: as they did in the run, where it has pairs
    """
    if merge_copies and not len(trace.pair_step_P):
        raise PlacementError(
            "the trace has no pairs of experts; train with train.pairs_every above 0, or leave --merge-copies out"
        )
    merge_copies = trace.merges and len(trace.pair_step_P) > 0 if merge_copies is None else merge_copies
    token_LSE, error_L = source_loads(trace, links.devices)
    speed_G = links.speed_G if links.speed_G.size else np.ones(links.devices)
    reports = []
    for number, token_SE in enumerate(token_LSE):
        held_EG = held_LEG[number] if held_LEG is not None else contiguous(token_SE.shape[1], costs.slot_G)
        layer = Layer(
            links=links,
            token_SE=token_SE,
            tokens_per_s_G=costs.tokens_per_s * speed_G,
            slot_G=costs.slot_G,
            token_bytes=costs.token_bytes,
            held_EG=held_EG,
            gradient_bytes=costs.gradient_bytes,
            state_bytes=costs.state_bytes,
            horizon_steps=costs.horizon_steps,
            sets=token_sets(trace, number, token_SE, links) if merge_copies else (),
        )
        reports.append(_report(layer, float(error_L[number]), effort, prove_s, held_LEG is not None))
        say(number + 1, len(token_LSE))
    return reports


def _report(layer: Layer, error: float, effort: float, prove_s: float, placed: bool) -> LayerReport:
    answer = solve(layer, effort=effort)
    if placed:
        near = solve(layer, effort=effort, gentle=True)
        answer = answer if answer.time.total_s < WORTH_IT * near.time.total_s else near
    after, time = answer.placement, answer.time
    before = split(layer, layer.held_EG)
    bound_s, proven = dual_bound(layer, answer.state), False
    if prove_s >= 1 and layer.token_SE.size <= 256:
        found = exact(layer, prove_s)
        bound_s, proven = max(bound_s, found.bound_s), found.proven
        if (
            found.held_EG is not None
            and (better := step_time(layer, split(layer, found.held_EG))).total_s < time.total_s
        ):
            after, time = split(layer, found.held_EG), better
    if prove_s > 0 and (layer.sets or not proven):  # a programme of merged copies is proven for less than the layer
        bound_s = max(bound_s, relaxed_bound(layer, prove_s, time.total_s))
    return LayerReport(
        layer=layer,
        before=before,
        after=after,
        before_time=step_time(layer, before),
        after_time=time,
        bound_s=min(bound_s, time.total_s),
        proven=proven,
        moved=int((after.held_EG & ~layer.held_EG).sum()),
        error=error,
    )


def imbalance(layer: Layer, placement: Placement) -> float:
    """Time of the slowest device over the mean."""
    time_G = placement.flow_SG(layer.token_SE).sum(axis=0) / layer.tokens_per_s_G
    return float(time_G.max() / time_G.mean()) if time_G.any() else 1.0


def cross_bytes(layer: Layer, placement: Placement) -> float:
    """Bytes that leave their host in one dispatch, on the first link above it."""
    links = layer.links
    flow_SG = placement.flow_SG(layer.token_SE)
    if not layer.sets:
        return float(flow_SG[links.host_G[:, None] != links.host_G[None]].sum() * layer.token_bytes)
    bytes_L = exchange_bytes(layer, placement)
    inner = [
        i for i, name in enumerate(links.names) if links.above_L[i] and name.startswith("host") and name.endswith("out")
    ]
    return float(bytes_L[inner].sum())


def table(reports: Sequence[LayerReport]) -> list[str]:
    """One line per layer and their sum, milliseconds of a step."""
    head = (
        f"{'layer':>5s} {'before':>9s} {'after':>9s} {'bound':>9s} {'gap':>7s} {'busiest device':>15s} "
        f"{'between hosts':>21s} {'moved':>6s} {'loads':>6s}"
    )
    lines = [
        head,
        f"{'':>5s} {'ms':>9s} {'ms':>9s} {'ms':>9s} {'':>7s} {'/ mean':>15s} {'MB a dispatch':>21s}" + f"{'+-':>14s}",
    ]
    for number, one in enumerate(reports):
        layer = one.layer
        lines.append(
            f"{number:5d} {1e3 * one.before_time.total_s:9.3f} {1e3 * one.after_time.total_s:9.3f} "
            f"{1e3 * one.bound_s:9.3f} {'proven' if one.proven else f'{100 * one.gap:5.1f} %':>7s} "
            f"{imbalance(layer, one.before):6.2f} -> {imbalance(layer, one.after):5.2f} "
            f"{cross_bytes(layer, one.before) / 1e6:9.1f} -> {cross_bytes(layer, one.after) / 1e6:8.1f} "
            f"{one.moved:6d} {50 * one.error:4.0f} %"
        )
    before, after = (sum(getattr(one, name).total_s for one in reports) for name in ("before_time", "after_time"))
    bound = sum(one.bound_s for one in reports)
    lines.append(
        f"{'all':>5s} {1e3 * before:9.3f} {1e3 * after:9.3f} {1e3 * bound:9.3f} {100 * (after / bound - 1):5.1f} % "
        f"  {before / after:.2f} times faster"
    )
    return lines


def drawing(one: LayerReport, most_devices: int = 64) -> list[str]:
    """Who holds what: a line per device with its load and its experts, replicated ones marked by their number."""
    layer, placement = one.layer, one.after
    time_G = placement.flow_SG(layer.token_SE).sum(axis=0) / layer.tokens_per_s_G
    count_E, held_EG = (placement.device_EP >= 0).sum(axis=1), placement.held_EG
    lines, host = [], -1
    for device in range(min(placement.devices, most_devices)):
        if layer.links.host_G[device] != host:
            host = int(layer.links.host_G[device])
            lines.append(f"host {host}")
        bar = "█" * round(20 * time_G[device] / max(time_G.max(), 1e-30))
        experts = [
            f"{expert}{f'/{count_E[expert]}' if count_E[expert] > 1 else ''}"
            f"{'' if layer.held_EG[expert, device] else '+'}"
            for expert in np.flatnonzero(held_EG[:, device])
        ]
        lines.append(f"  {device:3d} {bar:20s} {' '.join(experts)}")
    if placement.devices > most_devices:
        lines.append(f"  ... and {placement.devices - most_devices} more devices")
    return lines


def charts(reports: Sequence[LayerReport]) -> list[Chart]:
    """Load of every device in every layer over the layer's mean, before and after."""
    drawn = []
    for title, name in (("Before", "before"), ("After", "after")):
        ratio_GL = []
        for one in reports:
            time_G = getattr(one, name).flow_SG(one.layer.token_SE).sum(axis=0) / one.layer.tokens_per_s_G
            ratio_GL.append(time_G / max(time_G.mean(), 1e-30))
        drawn.append(
            heat_map(
                f"{title}: time of a device over the mean",
                np.array(ratio_GL).T,
                x=Axis(label="layer", low=0, high=max(len(reports) - 1, 1), whole=True),
                rows=[f"device {device}" for device in range(len(ratio_GL[0]))],
                shades=Shades(kind="ratio", high=4.0, label="of the mean"),
            )
        )
    return drawn
