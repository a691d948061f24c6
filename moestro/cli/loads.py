"""`moestro loads show`: what experts were given to do, over time."""

import json
from pathlib import Path

import typer

app = typer.Typer(help="Look at recorded expert loads.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Look at recorded expert loads."""


@app.command("show")
def show(
    trace: Path = typer.Argument(help="A run's loads.trace."),
    layer: int | None = typer.Option(None, "--layer", help="Which layer to draw; else the first here, all in --svg."),
    svg: Path | None = typer.Option(None, "--svg", help="Draw into this file."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Heat map of loads over time, with drift, sources, and experts that are chosen together."""
    from dataclasses import asdict

    from moestro.core.charts import standalone_svg
    from moestro.core.files import write_text
    from moestro.place.heat import (
        heat_charts,
        heat_lines,
        over_mean_EB,
        sources_of,
        summary_lines,
        together_lines,
        top_pairs,
    )
    from moestro.place.loads import read_trace

    loads = read_trace(trace)
    shown = layer or 0
    lines = heat_lines(loads, shown)
    if svg is not None:
        write_text(svg, standalone_svg(*heat_charts(loads, layer)))
    if as_json:
        over_EB = over_mean_EB(loads, shown)
        found = {
            "layer": shown,
            "steps": loads.step_N.tolist(),
            "over_mean": over_EB.round(4).tolist(),
            "sources": [asdict(one) for one in sources_of(loads, shown)],
            "pair_steps": loads.pair_step_P.tolist(),
            "pairs": [asdict(one) for one in top_pairs(loads, shown)],
        }
        print(json.dumps(found))
        return
    print("\n".join([*lines, "", *together_lines(loads, shown), "", *summary_lines(loads)]))
    if svg is not None:
        print(f"\nwritten: {svg}")
