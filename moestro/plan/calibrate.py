"""A profile of one's own machine, fitted to a few measured steps of the trainer.

    Trial (sizes of a small recipe) + seconds -> measured_row -> calibrated -> profile.json

The same formulas and the same fit as for published rows; only what depends on the machine is free, with wide priors,
because a CPU's rates may be anything. Ranks on one machine share it: each gets its part of the rates.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from moestro.cluster.topology import changed, read_cluster
from moestro.core.config import build
from moestro.core.specs import ModelSpec
from moestro.plan.case import Case
from moestro.plan.columns import Array
from moestro.plan.constants import NAMES, prior_means
from moestro.plan.fit import Fit, Known, fit, profile_of
from moestro.plan.layout import Layout
from moestro.plan.machine import machine_of, precision_of
from moestro.plan.profile import predict, save_profile
from moestro.plan.published import Row
from moestro.plan.shape import shape_of
from moestro.plan.stacks import find_stack, traits

FREE = (
    "matmul_share",
    "grouped_share",
    "depth_half",
    "operand_weight",
    "memory_share",
    "kernel_s",
    "fused_share",
    "elementwise",
    "elementwise_sparse",
    "loss_traffic",
    "host_s",
    "optimizer",
    "step_s",
    "across_share",
    "inside_share",
    "collective_s",
    "hop_inside_s",
    "exchange_s",
    "alltoall_inside",
    "imbalance",
)
"""Constants that this machine decides."""
WIDE, NARROW = 0.6, 0.02
"""Standard deviations of the logarithm of a free and of any other constant."""
NOISE = 0.1
"""Standard deviation of the logarithm of a measured step: neighbours on the machine."""
VOCAB = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Sizes of one short run."""

    ranks: int = 1
    width: int = 256
    num_layers: int = 4
    num_experts: int = 8
    expert_width: int = 384
    length: int = 256
    sequences: int = 8
    micro_batches: int = 1

    def changed(self, **sizes: int) -> "Trial":
        """Another trial."""
        return replace(self, **sizes)

    def text(self) -> str:
        """For people."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())

    def model(self) -> dict[str, Any]:
        """The recipe's [model]."""
        return {
            "num_layers": self.num_layers,
            "width": self.width,
            "attention": {"num_heads": 4, "num_kv_heads": 2},
            "moe": {"num_experts": self.num_experts, "expert_width": self.expert_width, "router": {"rule": "top2"}},
        }

    def recipe(self, steps: int, out: Path, text: Path) -> dict[str, Any]:
        """A whole recipe, with nothing but steps in it."""
        table: dict[str, Any] = {
            "out": str(out),
            "data": {"source": [str(text)], "tokenizer": "bytes"},
            "model": self.model(),
            "train": {
                "steps": steps,
                "length": self.length,
                "sequences": self.sequences,
                "micro_batches": self.micro_batches,
                "precision": "fp32",
                "evaluate_every": 0,
                "checkpoint_every": 0,
                "tensorboard": False,
            },
            "optimizer": {"warmup_steps": 1},
            "report": {"sample_tokens": 1, "prompts": ["a"]},
        }
        return table | ({"dist": {"ranks": self.ranks}} if self.ranks > 1 else {})


def measured_row(trial: Trial, step_s: float) -> Row:
    """A trial as a row of the fit."""
    share = f"{1 / trial.ranks}x"
    known = files("moestro").joinpath("specs", "clusters", "cpu.toml")
    whole = read_cluster(Path(str(known)))
    rates = [
        f"device.memory_gb_per_s={share}",
        f"device.peak_tflops.fp32={share}",
        f"device.achievable_tflops.fp32={share}",
    ]
    cluster = changed(whole, rates)
    shape = shape_of(build(ModelSpec, trial.model() | {"vocab_size": VOCAB}))
    stack = find_stack("moestro")
    case = Case(
        shape=shape,
        layout=Layout(
            devices=trial.ranks,
            sequences=trial.sequences,
            zero=0.0,
            micro_batch=trial.sequences / trial.ranks / trial.micro_batches,
        ),
        machine=machine_of(cluster, "fp32"),
        precision=precision_of("fp32"),
        traits=traits(stack, cluster.device),
        length=float(trial.length),
    )
    return Row(
        id=trial.text(),
        group=trial.text(),
        kind="moe",
        case=case,
        software="moestro",
        step_s=step_s,
        memory_gib=0.0,
    )


def known_machine() -> Known:
    """Wide for what the machine decides, narrow for the rest."""
    spread = np.array([WIDE if name in FREE else NARROW for name in NAMES])
    return Known(center_P=prior_means(), spread_P=spread, effect_spread=0.001, noise=NOISE)


def calibrated(rows: Sequence[Row], out: Path, *, check: bool = False) -> dict[str, Any]:
    """Fit all rows, write the profile, and say how well runs that were left out are predicted."""
    found = fit(rows, known=known_machine())
    profile = profile_of(found, "this machine", {"moe": 0.5, "dense": 0.5}, f"{len(rows)} short runs of the trainer")
    save_profile(profile, out)
    result: dict[str, Any] = {"runs": len(rows), "fit_error": _errors(rows, found)}
    error = result["fit_error"]
    lines = [f"fit to {len(rows)} runs: median error {error['median']} %, largest {error['max']} %"]
    if check:
        result["left_out_error"] = _left_out(rows)
        error = result["left_out_error"]
        lines.append(
            f"every run predicted by a fit without it: median error {error['median']} %, 90 % below {error['p90']} %, "
            f"largest {error['max']} %"
        )
    return result | {"lines": lines}


def _errors(rows: Sequence[Row], found: Fit) -> dict[str, float]:
    predicted = predict(rows, profile_of(found, "check")).step_s
    return _summary(np.abs(predicted / np.array([row.step_s for row in rows]) - 1))


def _left_out(rows: Sequence[Row]) -> dict[str, float]:
    errors = []
    for place, row in enumerate(rows):
        found = fit([*rows[:place], *rows[place + 1 :]], known=known_machine())
        errors.append(abs(float(predict([row], profile_of(found, "check")).step_s[0]) / row.step_s - 1))
    return _summary(np.array(errors))


def _summary(errors: Array) -> dict[str, float]:
    shares = {"median": np.median(errors), "p90": np.quantile(errors, 0.9), "max": errors.max()}
    return {name: round(100 * float(value), 1) for name, value in shares.items()}
