"""`cluster.fit`: measured matrices give back the network they came from; and a real probe between gloo ranks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moestro.cluster.fit import fit_levels
from moestro.cluster.links import Links, exception, links_of
from moestro.cluster.topology import Cluster, DeviceSpec, ExceptionSpec, LevelSpec, read_cluster
from moestro.core.errors import ClusterError

DEVICE = DeviceSpec(name="D", memory_gib=80, memory_gb_per_s=1000, peak_tflops={"bf16": 100})


def links_for(rates: list[tuple[int, float]], *exceptions: ExceptionSpec) -> Links:
    names = ("host", "leaf", "spine")
    levels = tuple(LevelSpec(name=names[i], fan_out=f, gb_per_s=b) for i, (f, b) in enumerate(rates))
    return links_of(Cluster(name="p", device=DEVICE, network=levels, exception=exceptions))


def measured(links: Links, noise: float = 0.04) -> np.ndarray:
    rng = np.random.default_rng(1)
    rate_RR = links.path_bytes_per_s_GG / 1e9
    return np.where(np.isfinite(rate_RR), rate_RR, 0) * (1 - noise * rng.random(rate_RR.shape))


def test_three_levels_come_back() -> None:
    # pairs alone are silent about sharing: a host's link is as fast as the probe's pairs see it
    rates = [(2, 300.0), (2, 50.0), (2, 10.0)]
    links = links_for(rates)
    links = Links(**{**vars_of(links), "bytes_per_s_L": np.array([_solo(name, rates) for name in links.names])})
    fitted = fit_levels(measured(links), np.full((8, 8), 5.0))
    assert [level.fan_out for level in fitted.levels] == [2, 2, 2]
    for level, (_, rate) in zip(fitted.levels, rates, strict=True):
        assert level.gb_per_s == pytest.approx(rate, rel=0.05)
    assert fitted.groups[0] == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert not fitted.exceptions


def vars_of(links: Links) -> dict[str, object]:
    return {name: getattr(links, name) for name in links.__dataclass_fields__}


def _solo(name: str, rates: list[tuple[int, float]]) -> float:
    return rates[("device", "host", "leaf").index(re.match(r"[a-z]+", name)[0])][1] * 1e9


def test_a_slow_card_is_an_exception() -> None:
    fitted = fit_levels(measured(links_for([(2, 300.0), (4, 25.0)], exception("leaf", 3, gb_per_s=5))), np.ones((8, 8)))
    assert [level.fan_out for level in fitted.levels] == [2, 4]
    (slow,) = fitted.exceptions
    assert (slow.level, slow.units) == ("leaf", (3,))
    assert slow.gb_per_s == pytest.approx(10, rel=0.05)


def test_a_dead_link_is_named() -> None:
    rate_RR = np.full((3, 3), 5.0)
    rate_RR[0, 2] = np.nan
    with pytest.raises(ClusterError, match="nan GB/s from rank 0 to 2"):
        fit_levels(rate_RR, np.ones((3, 3)))


@pytest.mark.slow
def test_a_probe_between_ranks_writes_a_cluster(tmp_path: Path) -> None:
    out = tmp_path / "c.toml"
    command = [
        sys.executable,
        "-m",
        "moestro",
        "cluster",
        "probe",
        "--ranks",
        "2",
        "--payload-mb",
        "1",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=True, env=dict(os.environ), timeout=120
    )
    rates = json.loads(done.stdout)["gb_per_s"]
    assert rates[0][1] > 0 < rates[1][0]
    assert read_cluster(out).network[0].fan_out == 2
