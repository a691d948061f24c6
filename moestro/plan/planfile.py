"""plan.toml: the chosen layout as a recipe that `moestro train` takes as it is.

    model file or recipe + Layout -> plan_table -> plan.toml: [model] [train] [dist], predictions as comments

Where the input is a recipe, all its tables stay; only what the layout decides is set.
"""

from pathlib import Path
from typing import Any

import tomli_w

from moestro.core.files import write_text
from moestro.plan.layout import SCHEDULES, Layout, recompute_text, text_of
from moestro.plan.profile import band
from moestro.plan.schedule import cut
from moestro.plan.search import Found, Question

Table = dict[str, Any]


def plan_table(question: Question, layout: Layout, source: Table) -> Table:
    """Tables of a recipe under this layout; raises nothing, the layout is possible already.

    source  the model's file as read: its [model] and, where it is a recipe, everything else
    """
    table = {name: value for name, value in source.items() if name != "planning"}
    train = {"steps": 1000, **table.get("train", {})}
    train |= {"length": question.length, "sequences": question.sequences}
    train["micro_batches"] = max(int(float(layout.micro_batches)), 1)
    train["recompute"] = bool(recompute_text(layout))
    return {**table, "train": train, "dist": dist_table(question, layout)}


def dist_table(question: Question, layout: Layout) -> Table:
    """The axes of the mesh; every data-parallel rank holds a shard, none a copy.

    ranks  all where the cluster is one machine, so that `moestro train` starts them itself; else 0, for torchrun
    """
    alone = len(question.cluster.network) == 1
    return {
        "ranks": question.devices if alone else 0,
        "pp": int(layout.pp),
        "dp_replicate": 1,
        "dp_shard": int(layout.dp),
        "tp": int(layout.tp),
        "ep": int(layout.ep),
        "expert_tp": bool(layout.etp > 1),
        "zero": int(layout.zero),
    }


def stage_sizes(question: Question, found: Found) -> list[int]:
    """Layers of every pipeline stage, cut by cost: the head counts on the last stage."""
    layout, step = found.layouts[0], found.steps[0]
    layers = int(question.shape.num_layers)
    head = float(step.parts["output head and loss"])
    inner = float(sum(step.parts[name] for name in LAYER_PARTS))
    return cut([inner / layers] * layers, int(layout.pp), head)


LAYER_PARTS = (
    "attention products",
    "attention scores",
    "feed-forward",
    "experts",
    "between products",
    "tensor exchange",
    "context exchange",
    "token exchange",
    "recomputation",
    "waiting for the host",
)


def plan_text(question: Question, found: Found, source: Table) -> str:
    """The file: predictions as comments, then the recipe."""
    layout, step, memory = found.layouts[0], found.steps[0], found.memories[0]
    seconds = float(step.total_s)
    low, high = band(seconds, found.spread)
    comments = [
        f"{question.shape.name} on {question.devices} x {question.cluster.device.name}: {text_of(layout)}",
        f"predicted: {seconds:.4g} s a step (p10 {low:.4g}, p90 {high:.4g}), {float(memory.total_gib):.1f} GiB at most",
        f"schedule {SCHEDULES[int(layout.schedule)]}, {int(layout.virtual)} chunks a rank, micro-batches of "
        f"{int(layout.micro_batch)}, cp {int(layout.cp)}, etp {int(layout.etp)}, zero {int(layout.zero)}",
        f"layers of the stages, cut by cost: {stage_sizes(question, found)}",
    ]
    table = plan_table(question, layout, source)
    return "".join(f"# {line}\n" for line in comments) + "\n" + tomli_w.dumps(table)


def write_plan(path: Path, question: Question, found: Found, source: Table) -> None:
    """Write plan.toml, whole or not at all."""
    write_text(path, plan_text(question, found, source))
