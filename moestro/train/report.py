"""report.html: what a run did, for people who would rather look than read.

    recipe.toml, events.jsonl, loads.trace, newest checkpoint -> write_report -> report.html

One file that opens offline. It is made from the run's files alone, so it can be written while the run trains, after it
was stopped, and again at any time; whatever the run does not have (experts, a final evaluation, a checkpoint) is left
out or said. Called by `moestro train`, `resume` and `report`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import numpy as np

from moestro.core.axes import number_text
from moestro.core.charts import chart_script, chart_style, figure
from moestro.core.errors import Error
from moestro.core.events import Event
from moestro.core.files import write_text
from moestro.core.svg import escaped
from moestro.core.units import bytes_text, count_text, duration_text
from moestro.place.loads import read_loads
from moestro.train.device import one_thread
from moestro.train.history import read_history
from moestro.train.rank_charts import balance_text, rank_charts
from moestro.train.recipe import ReportSpec
from moestro.train.report_balance import balance_charts, balance_words
from moestro.train.report_charts import (
    Run,
    learning_charts,
    load_limits,
    load_maps,
    routing_charts,
    speed_charts,
    timeline_of,
)
from moestro.train.run_folder import RunFolder
from moestro.train.samples import open_sampler

LISTED = 20
"""Resumes, skipped steps and new shares told one by one."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Nothing may be fetched from anywhere."""


def write_report(folder: RunFolder) -> Path:
    """Write report.html and return its path; raises StorageError where the disk refuses."""
    run = open_run(folder)
    title = run.recipe.report.title or folder.root.resolve().name
    sections = [
        _header(run, title),
        _section("Learning", "", _grid(map(figure, learning_charts(run)), "first")),
        _experts(run),
        _section("Balance", " ".join(balance_words(run)), _grid(map(figure, balance_charts(run)), "even")),
        _section("Speed", "", _grid(map(figure, speed_charts(run)), "even")),
        _ranks(run),
        _samples(run, folder),
        _happenings(run),
        _making(run, folder),
    ]
    write_text(folder.report, _page(title, "".join(sections)))
    return folder.report


def open_run(folder: RunFolder) -> Run:
    """Read what the charts need."""
    steps, loads = np.empty(0, dtype=np.int64), np.empty((0, 0, 0), dtype=np.int64)
    if folder.loads.exists():
        steps, loads = read_loads(folder.loads)
    return Run(folder.load_recipe(), read_history(folder), steps, loads)


def _page(title: str, body: str) -> str:
    style = chart_style() + files("moestro.train").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}</main>\n"
        f"<script>\n{chart_script()}</script>\n</body>\n</html>\n"
    )


def _section(title: str, text: str, body: str) -> str:
    """A part of the page; nothing where it has no content."""
    lead = f"<p>{escaped(text)}</p>" if text else ""
    return f'<section id="{title.lower()}">\n<h2>{escaped(title)}</h2>\n{lead}{body}</section>\n' if body else ""


def _grid(figures: Iterable[str], kind: str = "") -> str:
    """Figures beside each other. first: the first takes the whole width; even: so does a last one without neighbour."""
    cells = "".join(figures)
    return f'<div class="grid {kind}">\n{cells}</div>\n' if cells else ""


def _header(run: Run, title: str) -> str:
    done, steps = run.last_step, run.recipe.train.steps
    finished = run.history.finished is not None
    state = "finished" if finished else f"{done:,} of {steps:,} steps"
    tiles = "".join(tile.html for tile in _tiles(run))
    return (
        f'<header>\n<h1>{escaped(title)}<span class="state{" finished" * finished}">{state}</span></h1>\n'
        f'<p>{escaped(_in_words(run))}</p>\n<div class="tiles">\n{tiles}</div>\n</header>\n'
    )


def _in_words(run: Run) -> str:
    """The model and its text in a sentence."""
    model, data = run.recipe.model, run.recipe.data
    parts = [f"{model.num_layers} layers of width {model.width:,}", f"{model.attention.kind} attention"]
    if model.moe and model.moe_layers:
        router = model.moe.router
        which = "" if len(model.moe_layers) == model.num_layers else f" in {len(model.moe_layers)} layers"
        parts.append(f"{model.moe.num_experts} experts of width {model.moe.expert_width:,}{which}")
        parts.append(f"rule {router.rule}")
    else:
        parts.append(f"dense feed-forward of width {model.dense_width:,}")
    sources = [data.source] if isinstance(data.source, str) else list(data.source)
    return f"{', '.join(parts)}. Text: {', '.join(sources)}, tokens: {data.tokenizer}."


@dataclass(frozen=True, slots=True)
class Tile:
    """A headline figure."""

    name: str
    value: str
    unit: str = ""
    note: str = ""

    @property
    def html(self) -> str:
        """As it stands on the page."""
        unit = f" <i>{escaped(self.unit)}</i>" if self.unit else ""
        value = f"<span>{escaped(self.name)}</span><b>{escaped(self.value)}{unit}</b>"
        return f'<div class="tile">{value}<small>{escaped(self.note)}</small></div>\n'


def _tiles(run: Run) -> list[Tile]:
    """The headline figures a run has, most important first."""
    makers = (_heldout, _compared, _experts_used, _parameters, _tokens_seen, _time, _speed, _hardware)
    return [tile for tile in (make(run) for make in makers) if tile]


def _heldout(run: Run) -> Tile:
    found, every = run.history.evaluation, run.recipe.train.evaluate_every
    if found is None:
        when = f"first evaluation at step {min(every or run.recipe.train.steps, run.recipe.train.steps):,}"
        return Tile("held-out text", "\u2013", "bits/byte", when)
    which = "the whole of it" if found["whole"] else f"a sample of it, step {found['step']:,}"
    bits, nats = number_text(found["bits_per_byte"], 1e-3), number_text(found["loss"], 1e-3)
    return Tile("held-out text", bits, "bits/byte", f"{which}; {nats} nats per token")


def _compared(run: Run) -> Tile | None:
    packed: dict[str, float] = (run.history.finished or {}).get("compressors", {})
    found = run.history.evaluation
    if not packed or found is None:
        return None
    bits = found["bits_per_byte"]
    rivals = [
        f"{abs(1 - bits / other):.0%} {'less' if bits < other else 'more'} than {name}"
        for name, other in packed.items()
    ]
    figures = ", ".join(f"{name} {number_text(other, 1e-3)}" for name, other in packed.items())
    first, _, rest = rivals[0].partition(" ")
    return Tile("against compressors", first, rest, "; ".join([*rivals[1:], f"{figures} on the same files"]))


def _experts_used(run: Run) -> Tile | None:
    found, moe = run.history.evaluation, run.recipe.model.moe
    if found is None or moe is None or not run.layers:
        return None
    layers = f"of {moe.num_experts} in each of {len(run.layers)} sparse layers"
    budget = f"; budget {moe.router.mean_experts:g}" if run.has_budget else ""
    return Tile("experts per token", number_text(found["mean_experts"]), "mean", f"{layers}{budget}")


def _parameters(run: Run) -> Tile | None:
    begun = run.history.beginning
    if not begun:
        return None
    total, active = begun["parameters"], begun["active_parameters"]
    used = f"{count_text(active)} used per token ({active / max(total, 1):.0%})"
    return Tile("parameters", count_text(total), "", used if active < total else "all used for every token")


def _tokens_seen(run: Run) -> Tile | None:
    begun, seen = run.history.beginning, run.last_step * run.recipe.train.tokens_per_step
    if not begun:
        return None
    passes = seen / max(begun["train_tokens"], 1)
    text = f"{passes:.3g} passes over {count_text(begun['train_tokens'])} ({bytes_text(begun['train_bytes'])})"
    return Tile("tokens trained on", count_text(seen), "", text)


def _time(run: Run) -> Tile | None:
    if not run.history.beginning:
        return None
    sessions = len(run.history.of_kind("started", "resume"))
    text = f"{run.last_step:,} of {run.recipe.train.steps:,} steps, with evaluations and checkpoints"
    return Tile("time", duration_text(run.history.seconds), "", text + (f"; {sessions} sessions" * (sessions > 1)))


def _speed(run: Run) -> Tile | None:
    speed_N, phases = run.history.column("tokens_per_s"), run.history.phase_s
    if not len(speed_N):
        return None
    waiting = ""
    if phases:
        share = phases["data"].sum() / sum(phase.sum() for phase in phases.values())
        waiting = f"; {share:.2%} of step time waiting for data"
    return Tile("speed", number_text(float(np.median(speed_N))), "tokens/s", f"median step{waiting}")


def _hardware(run: Run) -> Tile | None:
    begun = run.history.beginning
    if not begun:
        return None
    around: dict[str, str] = begun.get("environment", {})
    where = around.get("hardware", "")
    if begun["device"] == "cpu" and "threads" in around:
        where += f", {around['threads']} of {around['cores']} cores"
    return Tile("computed on", begun["device"].upper(), begun["precision"], where)


def _experts(run: Run) -> str:
    key, *maps = [figure(chart) for chart in load_maps(run)] or [""]
    routing = [figure(chart) for chart in routing_charts(run)]
    shades = f'<div class="shades">{key}</div>' if key else ""
    text = "How many tokens each expert got, beside the mean of its layer. "
    return _section("Experts", text + load_limits(run) if maps else "", shades + _grid(maps) + _grid(routing, "even"))


def _ranks(run: Run) -> str:
    charts = rank_charts(run)
    return _section("Ranks", balance_text(run), _grid(map(figure, charts), "first"))


def _samples(run: Run, folder: RunFolder) -> str:
    spec = run.recipe.report
    if not spec.prompts:
        return ""
    if not folder.checkpoints():
        return _section("Samples", "There are no samples, because the run has no checkpoint yet.", "\n")
    try:
        with one_thread():
            texts = _continuations(folder, spec)
    except Error as error:
        return _section("Samples", f"There are no samples: {error}.", "\n")
    text = (
        f"Each prompt continued by {spec.sample_tokens} tokens at temperature {spec.temperature:g}, newest checkpoint."
    )
    shown = [
        f"<pre><mark>{escaped(prompt)}</mark>{escaped(drawn)}</pre>\n"
        for prompt, drawn in zip(spec.prompts, texts, strict=True)
    ]
    return _section("Samples", text, f'<div class="samples">\n{"".join(shown)}</div>\n')


def _continuations(folder: RunFolder, spec: ReportSpec) -> list[str]:
    sampler = open_sampler(folder.root)
    return [
        "".join(sampler.stream(prompt, spec.sample_tokens, temperature=spec.temperature, top_k=0, seed=number))
        for number, prompt in enumerate(spec.prompts)
    ]


def _happenings(run: Run) -> str:
    chart = timeline_of(run)
    told = [_told(event) for event in run.history.of_kind("resume", "skipped", "shares")]
    more = [f"and {len(told) - LISTED} more"] if len(told) > LISTED else []
    items = "".join(f"<li>{escaped(text)}</li>\n" for text in told[:LISTED] + more)
    listed = f'<ul class="log">\n{items}</ul>\n' if items else ""
    return _section("Events", "", (figure(chart) if chart else "") + listed)


def _told(event: Event) -> str:
    """A resume, a skipped step or a new cut of the batch in a sentence."""
    if event["event"] == "resume":
        return f"{_moment(event['time_s'])}: went on after step {event['step']:,}"
    if event["event"] == "shares":
        rows = " ".join(str(rows) for rows in event["rows"])
        return f"step {event['step']:,}: from here on ranks get {rows} rows of a micro-batch, by measured speed"
    what = f"loss {event['loss']}, gradient norm {event['grad_norm']}; batch: {event['batch']}"
    return f"step {event['step']:,} was not applied: {what}"


def _making(run: Run, folder: RunFolder) -> str:
    """The recipe as run and the machine it ran on."""
    begun = run.history.beginning
    facts = {"run folder": str(folder.root), "device": begun.get("device"), "precision": begun.get("precision")}
    facts |= begun.get("environment", {})
    facts |= {"first event": _moment(run.history.events[0]["time_s"])} if begun else {}
    facts |= {"last event": _moment(run.history.events[-1]["time_s"])} if begun else {}
    rows = "".join(
        f"<tr><th>{escaped(name)}</th><td>{escaped(str(fact))}</td></tr>" for name, fact in facts.items() if fact
    )
    recipe = folder.recipe.read_text(encoding="utf-8")
    return _section(
        "Recipe",
        "Every setting of the run, defaults written out; the same file trains it again.",
        f"<details><summary>recipe.toml</summary><pre>{escaped(recipe)}</pre></details>\n"
        f"<details open><summary>Environment</summary><table>{rows}</table></details>\n",
    )


def _moment(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
