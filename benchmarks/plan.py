"""How well does the planner predict published training runs it has not seen, and how fast is it?

    published_rows.json -> fit, leave each report out -> errors, bands, memory, ranking -> a table, one JSON line

Errors are of step time. "Left out" means that no row of the report was fitted on; every report (group) weighs the same.
With --profile the fit to all rows is written to moestro/plan/profiles/published.json, which the package ships.
Run with `make bench-plan`; needs a minute, numpy only.
"""

import argparse
import csv
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moestro.cluster.topology import read_cluster
from moestro.plan.constants import NAMES, prior_spreads
from moestro.plan.fit import Fit, LeftOut, fit, left_out, profile_of, widening
from moestro.plan.goodput import Reliability, goodput
from moestro.plan.profile import TENTH, Profile, anchored, predict, save_profile
from moestro.plan.published import Row, read_rows, row_of
from moestro.plan.search import WHOLE_SPACE, Question, search
from moestro.plan.shape import read_model
from moestro.plan.stacks import find_stack

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
ROWS = HERE / "published_rows.json"
PACKAGE = HERE.parent / "moestro"
Errors = dict[str, float]


def main() -> None:
    """Print the table of the issue, then one JSON line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--profile", action="store_true", help="write the fitted profile into the package")
    arguments.add_argument("--out", type=Path, help="write the JSON here too")
    arguments.add_argument("--shared", type=Path, default=SHARED, help="where the rows of single nodes are, if at hand")
    asked = arguments.parse_args()
    everything = read_rows(ROWS)
    rows = [row for row in everything if row.step_s > 0]
    begin = time.perf_counter()
    whole = fit(rows)
    fit_s = time.perf_counter() - begin
    unseen = left_out(rows, whole)
    widen = widening(rows, unseen)
    profile = profile_of(whole, "published", widen, f"{len(rows)} published rows in {len(groups(rows))} reports")
    if asked.profile:
        save_profile(profile, PACKAGE / "plan" / "profiles" / "published.json")
    fitted = dict(zip([row.id for row in rows], predict(rows, profile).step_s.tolist(), strict=True))
    result: dict[str, object] = {
        "bench": "plan",
        "rows": len(rows),
        "reports": len(groups(rows)),
        "fit_s": round(fit_s, 2),
    }
    result["constants"] = f"{len(NAMES)} with priors; rows decide as much as {learned(whole):.0f} free ones would take"
    result["effects"] = len(whole.names_E)
    for kind in ("dense", "moe"):
        result[f"{kind}_left_out"] = spread_of_errors(rows, unseen.step_s, kind)
        result[f"{kind}_fit"] = spread_of_errors(rows, fitted, kind)
        result[f"{kind}_one_row_given"] = anchored_error(rows, unseen, widen, kind)
        result[f"{kind}_band_coverage"] = coverage(rows, unseen, widen, kind)
        result[f"{kind}_band_coverage_other_half"] = coverage_other_half(rows, unseen, kind)
    result |= single_node(profile, asked.shared / "planner" / "vtrain_single_node_1440.csv")
    result |= ranking(rows, unseen.step_s) | memory(everything, profile) | answering(everything, profile)
    result |= searching(profile)
    good = {
        f"restart_{seconds}_s": round(100 * goodput(16384, Reliability(restart_s=seconds)).share, 1)
        for seconds in (300, 600, 900)
    }
    result["goodput_16384_percent"] = good
    for name, value in result.items():
        print(f"{name:32s} {value}")
    line = json.dumps(result)
    print(line)
    if asked.out:
        asked.out.write_text(line + "\n", encoding="utf-8")


def learned(whole: Fit) -> float:
    """Effective number of constants: one minus posterior over prior variance, summed."""
    variance = np.diag(whole.covariance)[: len(NAMES)]
    return float((1 - variance / prior_spreads() ** 2).sum())


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by report."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return found


def spread_of_errors(rows: Sequence[Row], step_s: dict[str, float], kind: str) -> Errors:
    """Percent: median and 90th percentile, of reports' medians and of rows."""
    by_group = groups([row for row in rows if row.kind == kind])
    errors = [[abs(step_s[row.id] / row.step_s - 1) for row in of] for of in by_group.values()]
    medians, single = [np.median(of) for of in errors], [error for of in errors for error in of]
    return {
        "median": percent(np.median(medians)),
        "p90": percent(np.quantile(medians, 0.9)),
        "row_median": percent(np.median(single)),
        "row_p90": percent(np.quantile(single, 0.9)),
    }


def percent(value: float) -> float:
    """0.0345 -> 3.5"""
    return round(100 * float(value), 1)


def anchored_error(rows: Sequence[Row], unseen: LeftOut, widen: dict[str, float], kind: str) -> Errors:
    """Every row of a report in turn is given; the error of the report's other rows, reports weighing the same.

    first_row  the kindest count: only the first row is given and counts as met, so that reports of one row err by 0
    covered    of the other rows, inside p10-p90 as it is after conditioning
    """
    medians, firsts, covered = [], [], []
    for of in groups([row for row in rows if row.kind == kind]).values():
        log_s = np.log([unseen.step_s[row.id] for row in of])
        spread = np.array([unseen.spread[row.id] for row in of]) * widen[kind]
        share_RP, measured = np.stack([unseen.shares[row.id] for row in of]), np.log([row.step_s for row in of])
        errors, inside = [], []
        for place, anchor in enumerate(of):
            given, left = anchored(of, log_s, spread, share_RP, {anchor.id: anchor.step_s})
            error = np.abs(np.expm1(given - measured))
            error[place] = 0
            firsts += [] if place else [float(np.median(error))]
            errors.append(np.delete(error, place))
            inside.append(np.delete(np.abs(given - measured) <= TENTH * left, place))
        if len(of) > 1:
            medians.append(float(np.median(np.concatenate(errors))))
            covered.append(float(np.mean(np.concatenate(inside))))
    return {
        "median": percent(np.median(medians)),
        "p90": percent(np.quantile(medians, 0.9)),
        "reports": len(medians),
        "first_row": percent(np.median(firsts)),
        "covered": percent(np.mean(covered)),
    }


def coverage(rows: Sequence[Row], unseen: LeftOut, widen: dict[str, float], kind: str) -> Errors:
    """Share of left-out rows inside p10-p90, by rows and with reports weighing the same."""
    inside = {}
    for name, of in groups([row for row in rows if row.kind == kind]).items():
        inside[name] = [
            abs(np.log(unseen.step_s[row.id] / row.step_s)) <= TENTH * widen[kind] * unseen.spread[row.id] for row in of
        ]
    return {
        "by_report": percent(np.mean([np.mean(of) for of in inside.values()])),
        "by_row": percent(np.mean([one for of in inside.values() for one in of])),
    }


def coverage_other_half(rows: Sequence[Row], unseen: LeftOut, kind: str) -> float:
    """The same by report, where the width was set on the other half of the reports."""
    names = sorted(groups([row for row in rows if row.kind == kind]))
    shares = []
    for half in (names[::2], names[1::2]):
        widen = widening([row for row in rows if row.group not in half], unseen)
        shares.append(coverage([row for row in rows if row.group in half], unseen, widen, kind)["by_report"])
    return round(float(np.mean(shares)), 1)


def ranking(rows: Sequence[Row], step_s: dict[str, float]) -> dict[str, object]:
    """Regret of picking the layout predicted fastest, and Spearman's rank correlation, over families of layouts."""
    families: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        case = row.case
        key = (row.group, case.shape.name, case.layout.devices, case.layout.sequences, case.length, str(case.precision))
        families.setdefault(key, []).append(row)
    regrets, correlations = [], []
    for of in families.values():
        if len({str(replace(row.case.layout)) for row in of}) < 4:
            continue
        measured = np.array([row.step_s for row in of])
        predicted = np.array([step_s[row.id] for row in of])
        regrets.append(measured[predicted.argmin()] / measured.min() - 1)
        ranks = [np.argsort(np.argsort(values)) for values in (measured, predicted)]
        correlations.append(float(np.corrcoef(*ranks)[0, 1]))
    return {
        "regret": {"median": percent(np.median(regrets)), "worst": percent(max(regrets)), "families": len(regrets)},
        "spearman_median": round(float(np.median(correlations)), 2),
    }


def memory(rows: Sequence[Row], profile: Profile) -> dict[str, object]:
    """Error of peak memory, and layouts that ran although they are called too large."""
    found = predict(rows, profile)
    known = [place for place, row in enumerate(rows) if row.memory_gib]
    errors = [abs(found.memory_gib[place] / rows[place].memory_gib - 1) for place in known]
    refused = [row.id for place, row in enumerate(rows) if row.step_s and not found.fits[place]]
    return {
        "peak_memory": {"median": percent(np.median(errors)), "max": percent(max(errors)), "rows": len(known)},
        "called_too_large": refused,
    }


def single_node(profile: Profile, path: Path) -> dict[str, object]:
    """1,440 runs of small GPT models on one A100 node (vTrain), none of them fitted; where the file is at hand.

    Vocabulary, precision and ZeRO are not in the file: those of vTrain's other runs are taken, without recomputation.
    """
    if not path.exists():
        return {}
    like = next(e for e in json.loads(ROWS.read_text())["entries"] if e["group"] == "vtrain-multi-3.6b")
    with path.open(encoding="utf-8-sig") as file:
        rows = [single_node_row(line, like) for line in csv.DictReader(file)]
    error = np.abs(predict(rows, profile).step_s / [row.step_s for row in rows] - 1)
    shown = {"median": percent(np.median(error)), "p90": percent(np.quantile(error, 0.9)), "rows": len(rows)}
    return {"single_node_never_fitted": shown}


def single_node_row(line: dict[str, str], like: dict[str, Any]) -> Row:
    """A line of the file as a row."""
    width, heads, layers = int(line["hidden size"]), int(line["attention heads"]), int(line["# layers"])
    cut = {axis: int(line[f"{name} parallelism"]) for axis, name in (("tp", "tensor"), ("pp", "pipeline"))}
    sizes = {"hidden": width, "heads": heads, "kv_heads": heads, "head_dim": width // heads, "ffn": 4 * width}
    sizes |= {"layers": layers, "dense_layers": layers, "seq_len": int(line["sequence length"])}
    entry = {
        **like,
        "model": {**like["model"], **sizes},
        "hardware": {**like["hardware"], "count": int(line["# GPUs"])},
        "parallelism": {**like["parallelism"], **cut},
        "micro_batch": int(line["micro batch"]),
        "global_batch": int(line["global batch"]),
        "recompute": "none",
        "derived": {"step_time_s": float(line["iteration time (ms)"]) / 1e3},
    }
    return row_of(entry)


def answering(rows: Sequence[Row], profile: Profile) -> dict[str, object]:
    """Rows with an answer, and milliseconds a row."""
    begin = time.perf_counter()
    found = predict(rows, profile)
    spent = time.perf_counter() - begin
    one = time.perf_counter()
    for row in rows[:20]:
        predict([row], profile)
    alone = (time.perf_counter() - one) / 20
    answered = int(np.isfinite(found.step_s).sum())
    return {
        "answered": f"{answered} of {len(rows)}",
        "ms_a_row": round(1e3 * spent / len(rows), 3),
        "ms_one_row_alone": round(1e3 * alone, 2),
    }


def searching(profile: Profile) -> dict[str, object]:
    """Seconds, microseconds a layout, and what the usual space loses beside every micro-batch, chunk and module."""
    result: dict[str, object] = {}
    for name, devices in (("moe-1t", 16384), ("moe-1t", 512), ("llama3-70b", 512)):
        question = Question(
            shape=read_model(PACKAGE / "specs" / "models" / f"{name}.toml"),
            cluster=read_cluster(PACKAGE / "specs" / "clusters" / "h100.toml"),
            stack=find_stack(""),
            profile=profile,
            devices=devices,
            sequences=max(devices, 2048),
            length=4096,
        )
        found = search(question)
        entry: dict[str, object] = {
            "seconds": round(found.seconds, 2),
            "layouts": found.considered,
            "us_a_layout": round(1e6 * found.seconds / found.considered, 1),
        }
        if devices == 512:
            whole = search(question, space=WHOLE_SPACE)
            loss = float(found.steps[0].total_s) / float(whole.steps[0].total_s) - 1
            entry |= {"slower_than_exhaustive": f"{100 * loss:.2f} %", "exhaustive_layouts": whole.considered}
        result[f"search_{name}_{devices}"] = entry
    return result


if __name__ == "__main__":
    main()
