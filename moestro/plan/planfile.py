"""plan.toml: the chosen layout as a recipe that `moestro train` takes as it is.

    model file or recipe + Layout -> plan_table -> plan.toml: [model] [train] [dist], predictions as comments

Where the input is a recipe, all its tables stay; only what the layout decides is set. The search behind it must have
been for layouts that the trainer runs (`Question.trainable`). The trainer cuts stages by cost by itself.
"""

import math
from pathlib import Path
from typing import Any

import tomli_w

from moestro.core.errors import PlanError
from moestro.core.files import write_text
from moestro.plan.layout import SCHEDULES, Layout, recompute_text, text_of
from moestro.plan.profile import band
from moestro.plan.schedule import cut
from moestro.plan.search import Found, Question

Table = dict[str, Any]
TRAINED = ("bf16", "fp32")
"""Number formats that the trainer has."""
UNBUILT = ("gated", "extra_heads")
"""Keys of [planning] that say what the trainer does not build."""


def plan_table(question: Question, layout: Layout, source: Table, tokens: float = 0.0) -> Table:
    """Tables of a recipe under this layout; raises PlanError for a number format that the trainer does not have.

    source  the model's file as read: its [model] and, where it is a recipe, everything else
    tokens  budget of the whole run; 0 leaves the number of steps alone
    """
    if question.precision not in TRAINED:
        raise PlanError(
            f"--precision is {question.precision}, but a plan.toml is for the trainer, which has {', '.join(TRAINED)}; "
            "take one of them, or leave out --out"
        )
    table = {name: value for name, value in source.items() if name != "planning"}
    table = {"out": f"runs/{question.shape.name}", **table}
    train = {"steps": 1000, **table.get("train", {})}
    if tokens:
        train["steps"] = math.ceil(tokens / (question.sequences * question.length))
    train |= {"length": question.length, "sequences": question.sequences, "precision": question.precision}
    train["micro_batches"] = max(round(float(layout.micro_batches)), 1)
    train["recompute"] = "all" if recompute_text(layout) else "none"
    return {**table, "train": train, "dist": {**table.get("dist", {}), **dist_table(question, layout)}}


def dist_table(question: Question, layout: Layout) -> Table:
    """The axes of the mesh; every data-parallel rank holds a shard, none a copy.

    ranks  all where the cluster is one machine, so that `moestro train` starts them itself; else 0, for torchrun
    """
    schedule = SCHEDULES[int(layout.schedule)]
    return {
        "ranks": question.devices if starts_itself(question) else 0,
        "pp": int(layout.pp),
        "schedule": schedule,
        "stages_per_rank": int(layout.virtual),
        "dp_replicate": 1,
        "dp_shard": int(layout.dp),
        "tp": int(layout.tp),
        "ep": int(layout.ep),
        "expert_tp": bool(layout.etp > 1),
        "zero": int(layout.zero),
    }


def starts_itself(question: Question) -> bool:
    """True where `moestro train` starts all ranks on this machine."""
    return len(question.cluster.network) == 1


def starting(question: Question, name: str) -> str:
    """The command that starts training."""
    if starts_itself(question) or question.devices == 1:
        return f"moestro train {name}"
    here = int(min(question.cluster.unit_sizes()[0], question.devices))
    hosts = -(-question.devices // here)
    several = f" --nnodes {hosts} --rdzv-backend c10d --rdzv-endpoint HOST:29500" if hosts > 1 else ""
    return f"torchrun{several} --nproc-per-node {here} -m moestro train {name}"


def stage_sizes(question: Question, found: Found) -> list[int]:
    """Layers of every pipeline stage (of every chunk of every rank), cut by cost: the head counts on the last one."""
    layout, step = found.layouts[0], found.steps[0]
    layers = int(question.shape.num_layers)
    head = float(step.parts["output head and loss"])
    inner = float(sum(step.parts[name] for name in LAYER_PARTS))
    return cut([inner / layers] * layers, int(layout.pp * layout.virtual), head)


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


def plan_text(question: Question, found: Found, source: Table, name: str = "plan.toml", tokens: float = 0.0) -> str:
    """The file: predictions as comments, then the recipe."""
    layout, step, memory = found.layouts[0], found.steps[0], found.memories[0]
    seconds = float(step.total_s)
    low, high = band(seconds, found.spread)
    table = plan_table(question, layout, source, tokens)
    comments = [
        f"{question.shape.name} on {question.devices} x {question.cluster.device.name}: {text_of(layout)}",
        f"predicted: {seconds:.4g} s a step (p10 {low:.4g}, p90 {high:.4g}), {float(memory.total_gib):.1f} GiB at most",
        f"start: {starting(question, name)}",
    ]
    if layout.pp > 1:
        comments.append(f"layers of the stages, cut by predicted cost: {stage_sizes(question, found)}")
    if "data" not in table:
        comments.append("text: the standard library's source as bytes, until data.source and data.tokenizer say more")
    if unbuilt := [key for key in source.get("planning", {}) if key in UNBUILT]:
        comments.append(f"planned for, but not built by the trainer: {', '.join(unbuilt)}")
    return "".join(f"# {line}\n" for line in comments) + "\n" + tomli_w.dumps(table)


def write_plan(path: Path, question: Question, found: Found, source: Table, tokens: float = 0.0) -> None:
    """Write plan.toml, whole or not at all."""
    write_text(path, plan_text(question, found, source, path.name, tokens))
