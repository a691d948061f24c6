"""Loads over time for the placement benchmarks: made streams, and recorded ones where ../shared is there.

Each gives samples [N, S, E]: routed tokens of every source device, one sample every 10 steps. Seeds are fixed.

    steady     counts drawn from one Zipf popularity: only noise
    drifting   log-popularity walks at random
    bursty     a steady base; single experts get eight times their load for 50 to 200 steps
    rotating   the hot experts change every 500 steps
    silent     drifting, and some source devices send nothing for a while
    domains    OLMoE's layer 7 (64 experts, top-8) while the text turns from arxiv to books, c4, github, wikipedia
    recorded   Mixtral e16k4 layer 12 of LAER-MoE's artefact, 30 recorded iterations, held and blended over the run
"""

import csv
import gzip
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
TRACES = Path(os.environ.get("MOESTRO_TRACES", Path(__file__).parents[2] / "shared" / "placement" / "traces"))
TOKENS = 8192
STEPS_PER_SAMPLE = 10
DOMAINS = ("arxiv", "book", "c4", "github", "wikipedia")


def drawn(share_NE: Floats, sources: int, choices: int, seed: int) -> Floats:
    """Tokens counted: multinomial draws per source."""
    rng = np.random.default_rng(seed)
    share_NE = share_NE / share_NE.sum(axis=1, keepdims=True)
    counts = [rng.multinomial(TOKENS * choices, share_E, size=sources) for share_E in share_NE]
    return np.array(counts, float)


def zipf(experts: int, seed: int, slope: float = 1.0) -> Floats:
    """A Zipf popularity in random order."""
    return np.random.default_rng(seed).permutation(np.arange(1, experts + 1.0) ** -slope)


def steady(samples: int, experts: int, seed: int) -> Floats:
    return np.tile(zipf(experts, seed), (samples, 1))


def drifting(samples: int, experts: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    walk_NE = np.cumsum(0.06 * rng.standard_normal((samples, experts)), axis=0)
    return np.exp(np.log(zipf(experts, seed)) + walk_NE)


def bursty(samples: int, experts: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    share_NE = steady(samples, experts, seed)
    for start in np.flatnonzero(rng.random(samples) < 0.05):
        share_NE[start : start + rng.integers(5, 21), rng.integers(experts)] *= 8
    return share_NE


def rotating(samples: int, experts: int, seed: int) -> Floats:
    return np.array([np.roll(zipf(experts, seed), 5 * (sample // 50)) for sample in range(samples)])


def silent(samples: int, sources: int, experts: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    load_NSE = drawn(drifting(samples, experts, seed), sources, 2, seed)
    for start in range(0, samples, 20):
        load_NSE[start : start + 20, rng.random(sources) < 0.25] = 0.0
    return load_NSE


def domains(samples: int) -> Floats | None:
    """Shares of OLMoE's experts; None where the recorded counts are not there."""
    path = TRACES / "olmoe_mixtral_routing_counts.npz"
    if not path.exists():
        return None
    with np.load(path) as table:
        found = [_domain(table, domain) for domain in DOMAINS]
    share_DE = np.array([count / count.sum() for count in found])
    at_N = np.linspace(0, len(share_DE) - 1, samples)
    low_N = np.minimum(at_N.astype(int), len(share_DE) - 2)
    blend_N = np.clip(4 * (at_N - low_N) - 1.5, 0, 1)[:, None]
    return np.asarray((1 - blend_N) * share_DE[low_N] + blend_N * share_DE[low_N + 1])


def _domain(table: "np.lib.npyio.NpzFile", domain: str) -> Floats:
    key = next(
        key for key in table.files if key.lower().startswith("olmoe") and key.endswith(f"expert_counts__{domain}")
    )
    return np.asarray(table[key][1], float)


def recorded(samples: int) -> Floats | None:
    """Shares of 16 experts in LAER-MoE's recording without balancing; None where it is not there."""
    path = TRACES / "laer_token_counts_per_rank.csv.gz"
    if not path.exists():
        return None
    table: dict[int, dict[int, float]] = {}
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            if row["model_name"].endswith("e16k4") and row["layer"] == "12" and "FSDP" in row["method"]:
                at = table.setdefault(int(row["iter"]), {})
                expert = int(row["rank"]) % 16
                at[expert] = at.get(expert, 0.0) + float(row["token_num"])
    if not table:
        return None
    count_IE = np.array([[table[it].get(expert, 0.0) for expert in range(16)] for it in sorted(table)])
    share_IE = count_IE / count_IE.sum(axis=1, keepdims=True)
    at_N = np.linspace(0, len(share_IE) - 1, samples)
    return np.array([np.interp(at_N, np.arange(len(share_IE)), share_E) for share_E in share_IE.T]).T


def all_streams(samples: int, sources: int, experts: int) -> Iterator[tuple[str, Floats]]:
    """(name, load_NSE)"""
    made: dict[str, Callable[[int, int, int], Floats]] = {
        "steady": steady,
        "drifting": drifting,
        "bursty": bursty,
        "rotating": rotating,
    }
    for name, make in made.items():
        yield name, drawn(make(samples, experts, 3), sources, 2, 4)
    yield "silent", silent(samples, sources, experts, 3)
    for name, choices, share_NE in (("domains", 8, domains(samples)), ("recorded", 4, recorded(samples))):
        if share_NE is not None:
            yield name, drawn(share_NE, sources, choices, 5)
