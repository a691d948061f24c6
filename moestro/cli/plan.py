"""`moestro plan`: the fastest layout that fits, its cost, and how sure that is; `predict`, `simulate`, `calibrate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moestro.core.errors import PlanError

if TYPE_CHECKING:
    from moestro.plan.columns import Array
    from moestro.plan.goodput import Reliability
    from moestro.plan.search import Found, Question

app = typer.Typer(
    help="Plan a training run: memory, time, layout, goodput and cost.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
MODEL = typer.Option(..., "--model", "-m", help="A model file, a recipe, a config.json, or a name of a known model.")
CLUSTER = typer.Option(
    "h100", "--cluster", "-c", help="A cluster.toml, or a name: a100 h100 h200 b200 b300 gb200 gb300 mi300x cpu."
)
DEVICES = typer.Option(64, "--devices", "-n", help="Devices to train on.")
SEQUENCES = typer.Option(0, "--sequences", "-b", help="Sequences of one step over all ranks; 0 takes 4 a device.")
LENGTH = typer.Option(4096, "--length", "-l", help="Tokens of a sequence.")
PRECISION = typer.Option("bf16", help="bf16 fp16 fp8 fp8-block mxfp8 nvfp4 fp32.")
SOFTWARE = typer.Option("", help="Training software and version, for example 'NeMo 25.04'; empty is a present-day one.")
SET = typer.Option(
    [],
    "--set",
    metavar="KEY=VALUE",
    help="What-if: network.spine=2x, device.memory_gib=192, model.num_layers=96, layout.tp=8, reliability.restart_s=9.",
)
PROFILE = typer.Option(None, help="A profile written by `moestro plan calibrate`.")


@app.callback(invoke_without_command=True)
def plan(
    context: typer.Context,
    model: str = typer.Option(
        "", "--model", "-m", help="A model file, a recipe, a config.json, or a name of a known model."
    ),
    cluster: str = CLUSTER,
    devices: int = DEVICES,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    precision: str = PRECISION,
    software: str = SOFTWARE,
    settings: list[str] = SET,
    loads: Path = typer.Option(None, help="A load trace: a run's loads.trace, or JSON lists of tokens per expert."),
    imbalance: float = typer.Option(0.0, help="Busiest over mean load of expert ranks; 0 takes the profile's."),
    tokens: float = typer.Option(0.0, help="Token budget of the whole run, for example 15e12."),
    profile: Path = PROFILE,
    keep: int = typer.Option(5, help="Layouts to show."),
    explain: bool = typer.Option(False, "--explain", help="Show where each millisecond and each gigabyte goes."),
    chart: Path = typer.Option(None, help="Write that as an SVG chart."),
    out: Path = typer.Option(
        None,
        "--out",
        "-o",
        help="Write plan.toml, which `moestro train` takes; only layouts it can run are considered.",
    ),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Find the fastest layout that fits, and say what it takes and what it costs."""
    if context.invoked_subcommand:
        return
    if not model:
        raise PlanError("--model is missing; give a model file, a config.json or one of " + ", ".join(_known("models")))
    from moestro.core.files import write_text
    from moestro.plan.explain import chart as chart_of
    from moestro.plan.planfile import write_plan
    from moestro.plan.search import search

    question = _question(
        model=model,
        cluster=cluster,
        devices=devices,
        sequences=sequences,
        length=length,
        precision=precision,
        software=software,
        settings=settings,
        loads=loads,
        imbalance=imbalance,
        profile=profile,
        trainable=out is not None,
    )
    found = search(question, keep)
    if out:
        write_plan(out, question, found, _source(_find(model, "models"), settings), tokens)
    if chart:
        write_text(chart, chart_of(question, found.steps[0], found.memories[0], found.spread))
    if as_json:
        print(json.dumps(_as_json(question, found, settings, tokens)))
        return
    _print(question, found, settings, tokens, explain=explain)
    for path in (out, chart):
        if path:
            print(f"wrote {path}")


@app.command()
def predict(
    rows: Path = typer.Argument(help="JSON rows: a list, or an object with 'entries'."),
    out: Path = typer.Option(None, "--out", "-o", help="Write {id: prediction} here; else it is printed."),
    anchor: list[str] = typer.Option(
        [], "--anchor", metavar="ID=STEP_S", help="A measured row: its group is conditioned on it."
    ),
    profile: Path = PROFILE,
) -> None:
    """Predict step time with its p10-p90 band, peak memory (GB = 1e9 bytes) and whether it fits, for every row."""
    from moestro.core.files import write_text
    from moestro.plan.profile import load_profile
    from moestro.plan.profile import predict as predict_rows
    from moestro.plan.published import read_rows

    asked = read_rows(rows)
    if not asked:
        raise PlanError(f"{rows} has no rows; give at least one")
    found = predict_rows(asked, load_profile(profile), _anchors(anchor))
    table = {
        row.id: {
            "step_s": float(found.step_s[place]),
            "p10_s": float(found.p10_s[place]),
            "p90_s": float(found.p90_s[place]),
            "memory_gb": float(found.memory_gib[place]) * 2**30 / 1e9,
            "memory_gib": float(found.memory_gib[place]),
            "fits": bool(found.fits[place]),
        }
        for place, row in enumerate(asked)
    }
    if out:
        write_text(out, json.dumps(table, indent=1) + "\n")
        print(f"wrote {len(table)} predictions to {out}")
    else:
        print(json.dumps(table))


@app.command()
def simulate(
    model: str = MODEL,
    cluster: str = CLUSTER,
    devices: int = DEVICES,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    precision: str = PRECISION,
    software: str = SOFTWARE,
    settings: list[str] = SET,
    trace: Path = typer.Option(None, help="Write the step's events for chrome://tracing or ui.perfetto.dev."),
    tokens: float = typer.Option(0.0, help="Token budget: draw whole runs with failures."),
    runs: int = typer.Option(1000, help="Runs to draw."),
    seed: int = typer.Option(0, help="Of the draws."),
    jitter: float = typer.Option(0.01, help="Standard deviation of a device's speed beside the others'."),
    profile: Path = PROFILE,
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Play the best layout's step event by event over all ranks, and whole runs with failures."""
    from moestro.plan.layout import text_of
    from moestro.plan.search import search
    from moestro.plan.timeline import play, write_trace

    question = _question(
        model=model,
        cluster=cluster,
        devices=devices,
        sequences=sequences,
        length=length,
        precision=precision,
        software=software,
        settings=settings,
        loads=None,
        imbalance=0.0,
        profile=profile,
    )
    found = search(question, 1)
    played = play(found.layouts[0], found.steps[0], jitter=jitter, seed=seed)
    result: dict[str, Any] = {
        "layout": text_of(found.layouts[0]),
        "step_s": played.step_s,
        "predicted_step_s": float(found.steps[0].total_s),
        "busy_share": played.busy_share,
        "events": played.num_events,
        "devices": question.devices,
    }
    if trace:
        write_trace(trace, played)
        result["trace"] = str(trace)
    if tokens:
        result |= _simulated_run(question, found, settings, tokens, runs=runs, seed=seed)
    if as_json:
        print(json.dumps(result))
        return
    print(f"{question.shape.name} on {question.devices} x {question.cluster.device.name}: {result['layout']}")
    print(
        f"one step: {played.step_s:.3f} s played, {float(found.steps[0].total_s):.3f} s in closed form; stages busy "
        f"{100 * played.busy_share:.1f} %; {played.num_events} events on {question.devices} devices"
    )
    if tokens:
        print(
            f"{runs} runs of {tokens:.3g} tokens: {result['wall_days_p10']:.1f} - {result['wall_days_p90']:.1f} days "
            f"(p10 - p90), {result['failures_mean']:.0f} failures, goodput {100 * result['goodput_mean']:.1f} %"
        )
    if trace:
        print(f"wrote {trace}")


@app.command()
def calibrate(
    out: Path = typer.Option(Path("profile.json"), "--out", "-o", help="The profile to write."),
    steps: int = typer.Option(10, help="Steps of each short run; the first are not counted."),
    ranks: list[int] = typer.Option([1], help="Numbers of ranks to measure; give it several times."),
    check: bool = typer.Option(False, help="Leave every third run out and say how well it is predicted."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Fit the profile of this machine from short measured runs of the trainer."""
    from moestro.cli.plan_calibrate import calibrate_here

    result = calibrate_here(out=out, steps=steps, ranks=ranks, check=check, say=lambda line: typer.echo(line, err=True))
    print(json.dumps(result) if as_json else result["text"])


def _question(
    *,
    model: str,
    cluster: str,
    devices: int,
    sequences: int,
    length: int,
    precision: str,
    software: str,
    settings: list[str],
    loads: Path | None,
    imbalance: float,
    profile: Path | None,
    trainable: bool = False,
) -> "Question":
    from moestro.cluster.topology import read_cluster
    from moestro.plan.profile import load_profile
    from moestro.plan.search import Question
    from moestro.plan.settings import layout_settings, of_kind
    from moestro.plan.shape import read_model
    from moestro.plan.stacks import find_stack

    for name, value in (("--devices", devices), ("--length", length)):
        if value < 1:
            raise PlanError(f"{name} is {value}; it must be 1 or more")
    shape = read_model(_find(model, "models"), tuple(of_kind(settings, "model", "planning")))
    park = read_cluster(_find(cluster, "clusters"), of_kind(settings, "network", "device"))
    if devices > park.most_devices:
        raise PlanError(f"--devices is {devices}; {park.name} has {park.most_devices:.0f}")
    stack = find_stack(software)
    return Question(
        shape=shape,
        cluster=park,
        stack=stack,
        profile=load_profile(profile),
        devices=devices,
        sequences=sequences or 4 * devices,
        length=length,
        precision=precision,
        imbalance=imbalance,
        load_RE=_loads(loads, int(shape.experts)) if loads else None,
        fixed=layout_settings(of_kind(settings, "layout")),
        trainable=trainable or stack.family == "moestro",
    )


def _loads(path: Path, experts: int) -> "Array":
    """Of a run's loads.trace, or of a JSON trace."""
    from moestro.place.loads import read_trace
    from moestro.plan.loads import checked_loads, read_loads

    if path.suffix == ".trace":
        return checked_loads(read_trace(path).count_NLE, experts, str(path))
    return read_loads(path, experts)


def _reliability(settings: list[str]) -> "Reliability":
    from moestro.core.config import build, with_overrides
    from moestro.plan.goodput import Reliability
    from moestro.plan.settings import of_kind

    table = with_overrides({}, of_kind(settings, "reliability"))
    return build(Reliability, table.get("reliability", {}), where="--set")


def _print(question: "Question", found: "Found", settings: list[str], tokens: float, *, explain: bool) -> None:
    from moestro.core.units import count_text
    from moestro.plan.explain import memory_lines, table_lines, time_lines
    from moestro.plan.search import room_gib

    shape = question.shape
    print(
        f"{shape.name}: {count_text(float(shape.total_params))} weights, "
        f"{count_text(float(shape.active_params))} a token, "
        f"{question.sequences} sequences of {question.length}, {question.precision}, on {question.devices} x "
        f"{question.cluster.device.name}"
    )
    print("\n".join(table_lines(question, found)))
    print(f"  {found.considered} layouts can run, {found.fitting} fit; searched in {found.seconds:.2f} s")
    if explain:
        print("where the time goes in layout 1:")
        print("\n".join(time_lines(found.steps[0])))
        print("where the memory goes:")
        print("\n".join(memory_lines(found.memories[0], room_gib(question))))
    run = _run_json(question, found, settings, tokens)
    print(
        f"goodput {100 * run['goodput']:.1f} %: a failure every {run['hours_between_failures']:.1f} h, "
        f"a checkpoint every {run['checkpoint_minutes']:.1f} min"
    )
    if tokens:
        print(f"{tokens:.3g} tokens: {run['days']:.1f} days, {run['energy_mwh']:.0f} MWh, {run['price_usd']:,.0f} USD")


def _run_json(question: "Question", found: "Found", settings: list[str], tokens: float) -> dict[str, float]:
    from moestro.plan.goodput import goodput, run_cost

    device, seconds = question.cluster.device, float(found.steps[0].total_s)
    good = goodput(question.devices, _reliability(settings))
    result = {
        "goodput": good.share,
        "hours_between_failures": good.mean_between_failures_s / 3600,
        "checkpoint_minutes": good.interval_s / 60,
    }
    if tokens:
        cost = run_cost(
            tokens=tokens,
            tokens_per_step=question.sequences * question.length,
            step_s=seconds,
            share=good.share,
            devices=question.devices,
            power_w=device.power_w,
            usd_per_hour=device.usd_per_hour,
        )
        result |= {
            "steps": cost.steps,
            "days": cost.hours / 24,
            "energy_mwh": cost.energy_mwh,
            "price_usd": cost.price_usd,
        }
    return result


def _simulated_run(
    question: "Question", found: "Found", settings: list[str], tokens: float, *, runs: int, seed: int
) -> dict[str, float]:
    from moestro.plan.goodput import simulate as simulate_runs

    work = tokens / (question.sequences * question.length) * float(found.steps[0].total_s)
    drawn = simulate_runs(
        work, question.devices, _reliability(settings), runs=runs, seed=seed, step_spread=found.spread
    )
    return {
        "wall_days_p10": drawn.percentile(0.1) / 24,
        "wall_days_p50": drawn.percentile(0.5) / 24,
        "wall_days_p90": drawn.percentile(0.9) / 24,
        "failures_mean": float(drawn.failures_R.mean()),
        "goodput_mean": float((work / 3600 / drawn.wall_hours_R).mean()),
    }


def _as_json(question: "Question", found: "Found", settings: list[str], tokens: float) -> dict[str, Any]:
    from moestro.plan.explain import memory_parts, model_flops_share, question_peak, time_parts
    from moestro.plan.layout import as_table, text_of
    from moestro.plan.profile import band
    from moestro.plan.search import room_gib

    layouts = []
    for layout, step, memory in zip(found.layouts, found.steps, found.memories, strict=True):
        seconds = float(step.total_s)
        low, high = band(seconds, found.spread)
        layouts.append(
            {
                "text": text_of(layout),
                "layout": as_table(layout),
                "step_s": seconds,
                "p10_s": low,
                "p90_s": high,
                "mfu": model_flops_share(question, seconds, question_peak(question)),
                "memory_gib": float(memory.total_gib),
                "time_ms": time_parts(step),
                "memory_parts_gib": memory_parts(memory),
            }
        )
    return {
        "model": question.shape.name,
        "devices": question.devices,
        "device": question.cluster.device.name,
        "sequences": question.sequences,
        "length": question.length,
        "precision": question.precision,
        "considered": found.considered,
        "fitting": found.fitting,
        "search_s": found.seconds,
        "room_gib": room_gib(question),
        "layouts": layouts,
        "run": _run_json(question, found, settings, tokens),
    }


def _anchors(texts: list[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        try:
            found[name] = float(value)
        except ValueError:
            equals = ""
        if not equals or not found[name] > 0:
            raise PlanError(f"--anchor is '{text}'; write ID=STEP_S with seconds above 0, for example row-17=3.21")
    return found


def _find(name: str, kind: str) -> Path:
    """A path, or the file of a name that comes with the package."""
    from importlib.resources import files

    if Path(name).exists():
        return Path(name)
    known = Path(str(files("moestro").joinpath("specs", kind, f"{name}.toml")))
    if known.exists():
        return known
    raise PlanError(f"{name} is neither a file nor a known name; known {kind} are {', '.join(_known(kind))}")


def _known(kind: str) -> list[str]:
    from importlib.resources import files

    return sorted(entry.name.removesuffix(".toml") for entry in files("moestro").joinpath("specs", kind).iterdir())


def _source(path: Path, settings: list[str]) -> dict[str, Any]:
    """The recipe or model file as read, with the settings of its model."""
    from moestro.core.config import read_toml, with_overrides
    from moestro.plan.settings import of_kind

    if path.suffix != ".toml":
        raise PlanError(
            f"--out needs a model file or recipe in TOML; `moestro import {path} MODEL --recipe RECIPE.toml` makes one "
            "of a config.json with its weights"
        )
    return with_overrides(read_toml(path), of_kind(settings, "model"))
