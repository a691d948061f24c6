"""`moestro place TRACE CLUSTER`: where experts should live, what that saves, how far it is from the best."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from moestro.cluster.links import Links
    from moestro.cluster.topology import Cluster
    from moestro.place.loads import Trace
    from moestro.place.report import Costs, LayerReport


def place(
    trace: Path = typer.Argument(help="A run's loads.trace."),
    cluster: Path = typer.Argument(help="A cluster.toml."),
    devices: int = typer.Option(0, "--devices", help="How many, where the cluster leaves it open."),
    slots: int = typer.Option(0, "--slots", help="Experts that a device holds; 0 takes what its memory holds."),
    width: int = typer.Option(4096, "--width", help="Model width: a token is so many bfloat16 numbers."),
    expert_params: float = typer.Option(44e6, "--expert-params", help="Parameters of one expert."),
    tokens_per_s: float = typer.Option(
        0.0, "--tokens-per-s", help="Rows a device passes through experts; 0 estimates."
    ),
    horizon: float = typer.Option(1000.0, "--horizon", help="Steps over which moving is spread."),
    current: Path | None = typer.Option(None, "--current", help="placement.toml in force; contiguous otherwise."),
    merge_copies: bool | None = typer.Option(
        None,
        help="Tokens travel once per host, for which the trace needs pairs; else as in the run.",
        show_default=False,
    ),
    even_sources: bool = typer.Option(
        False, "--even-sources", help="Every device sends the same, whatever ranks the trace is of."
    ),
    effort: float = typer.Option(1.0, "--effort", help="1 is some 30 ms a layer."),
    prove: float = typer.Option(
        0.0, "--prove", help="Seconds a layer for a tighter bound, and for small layers a proof."
    ),
    out: Path | None = typer.Option(None, "--out", "-o", help="Write placement.toml here."),
    svg: Path | None = typer.Option(None, "--svg", help="Draw device loads before and after."),
    show_layer: int = typer.Option(0, "--show", help="Which layer to draw."),
    settings: list[str] = typer.Option([], "--set", help="What-if on the cluster, for example network.spine=2x."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Place experts for recorded loads: before, after, lower bound, plan and drawing."""
    from moestro.cluster.links import links_of
    from moestro.cluster.topology import read_cluster
    from moestro.core.charts import standalone_svg
    from moestro.core.errors import PlacementError
    from moestro.core.files import write_text
    from moestro.place.compiled import is_cold
    from moestro.place.loads import as_one_source, read_trace
    from moestro.place.plan_file import read_placements, save_placements
    from moestro.place.report import basis, charts, drawing, place_trace, table

    loads = read_trace(trace)
    if even_sources:
        loads = as_one_source(loads)
    park = read_cluster(cluster, settings)
    links = links_of(park, devices)
    layers, experts = loads.count_NLE.shape[1:]
    if not 0 <= show_layer < layers:
        raise PlacementError(f"--show {show_layer} is not a layer of the trace; it has 0..{layers - 1}")
    costs = _costs(park, links, loads, slots, width, expert_params, tokens_per_s, horizon)
    held = None
    if current is not None:
        found = read_placements(current, num_layers=layers, num_experts=experts, devices=links.devices)
        held = [placement.held_EG for placement in found]

    def say(done: int, total: int) -> None:
        if sys.stderr.isatty() and total > 1:
            print(f"\rlayer {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    if sys.stderr.isatty() and is_cold():
        print("compiling the search, once on a machine: some 20 s", file=sys.stderr, flush=True)
    reports = place_trace(
        loads, links, costs, held_LEG=held, effort=effort, prove_s=prove, merge_copies=merge_copies, say=say
    )
    if out is not None:
        save_placements(out, [one.after for one in reports])
    if svg is not None:
        write_text(svg, standalone_svg(*charts(reports)))
    if as_json:
        print(json.dumps({"devices": links.devices, "layers": [_as_json(one) for one in reports]}))
        return
    print("\n".join([basis(loads, reports), *table(reports)]))
    print(f"\nlayer {show_layer}: devices, their load, their experts (/n: n replicas, +: copied there)")
    print("\n".join(drawing(reports[show_layer])))
    if out is not None:
        print(f"\nwritten: {out}")


def _costs(
    park: "Cluster",
    links: "Links",
    loads: "Trace",
    slots: int,
    width: int,
    expert_params: float,
    tokens_per_s: float,
    horizon: float,
) -> "Costs":
    """What rows, replicas and moves cost: bfloat16 rows and gradients, weights with both moments in float32."""
    import numpy as np

    from moestro.place.cost import slots_that_fit
    from moestro.place.report import Costs

    layers, experts = loads.count_NLE.shape[1:]
    state_bytes = 16.0 * expert_params
    slot_G = np.full(links.devices, slots) if slots else slots_that_fit(links, layers * state_bytes, 0.0)
    peak = max(park.device.peak_tflops.get("bf16", 0.0), park.device.peak_tflops.get("fp32", 0.0))
    return Costs(
        token_bytes=2.0 * width,
        tokens_per_s=tokens_per_s or 0.4 * peak * 1e12 / (2.0 * expert_params),
        slot_G=np.minimum(slot_G, experts),
        gradient_bytes=2.0 * expert_params,
        state_bytes=state_bytes,
        horizon_steps=horizon,
    )


def _as_json(one: "LayerReport") -> dict[str, Any]:
    return {
        "before_ms": 1e3 * one.before_time.total_s,
        "after_ms": 1e3 * one.after_time.total_s,
        "bound_ms": 1e3 * one.bound_s,
        "proven": one.proven,
        "moved": one.moved,
        "holders": [row[row >= 0].tolist() for row in one.after.device_EP],
    }
