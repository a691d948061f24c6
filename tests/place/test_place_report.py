"""Traces with sources and pairs, placement.toml, and the commands `moestro place` and `moestro loads show`."""

import json
from pathlib import Path

import numpy as np
import pytest
from parks import layer, park, skewed
from typer.testing import CliRunner

from moestro.cli.main import app
from moestro.cluster.links import links_of
from moestro.core.config import save_toml
from moestro.core.errors import PlacementError
from moestro.place.loads import LoadWriter, count_pairs, pair_index, read_trace
from moestro.place.plan_file import read_placements, save_placements
from moestro.place.report import Costs, place_trace, source_loads
from moestro.place.solve import solve


def write_trace(path: Path, sources: int = 0, steps: int = 5) -> Path:
    writer = LoadWriter(path, num_layers=2, num_experts=6, sources=sources)
    for step in range(steps):
        count_SE = skewed(max(sources, 1), 6, seed=step).astype(int)
        count = np.stack([count_SE, count_SE[:, ::-1]])
        writer.append(step + 1, count if sources else count[:, 0])
    writer.close()
    return path


def test_sources_and_pairs_read_back(tmp_path: Path) -> None:
    writer = LoadWriter(tmp_path / "t", num_layers=1, num_experts=3, sources=2, pairs=True)
    writer.append(7, np.array([[[1, 2, 3], [4, 5, 6]]]), np.array([[10, 20, 30]]))
    writer.close()
    trace = read_trace(tmp_path / "t")
    assert trace.count_NLE.tolist() == [[[5, 7, 9]]]
    assert trace.source_NLSE is not None
    assert trace.source_NLSE[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert trace.pair_NLX is not None
    assert trace.pair_NLX.tolist() == [[[10, 20, 30]]]


def test_pairs_are_counted_once_and_unused_slots_ignored() -> None:
    pair_X = count_pairs(np.array([[0, 1], [1, 0], [2, -1], [1, 2]]), 3)
    assert dict(zip(zip(*(index.tolist() for index in pair_index(3)), strict=True), pair_X.tolist(), strict=True)) == {
        (0, 1): 2,
        (0, 2): 0,
        (1, 2): 1,
    }


def test_a_placement_reads_back_and_checks_what_it_is_for(tmp_path: Path) -> None:
    placement = solve(layer(park(2, 2), skewed(4, 6), 3), effort=0.1).placement
    path = tmp_path / "placement.toml"
    save_placements(path, [placement])
    (back,) = read_placements(path, num_layers=1, num_experts=6, devices=4)
    assert (back.held_EG == placement.held_EG).all()
    np.testing.assert_allclose(back.share_AEP, placement.share_AEP, atol=1e-6)
    with pytest.raises(PlacementError, match="has 6 experts, 8 are needed"):
        read_placements(path, num_experts=8)
    path.write_text(path.read_text().replace("moestro-placement-1", "other"))
    with pytest.raises(PlacementError, match="is not a placement"):
        read_placements(path)


def test_a_trace_of_other_ranks_is_refused(tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path / "t", sources=3))
    with pytest.raises(PlacementError, match="recorded on 3 ranks, the cluster has 4 devices"):
        source_loads(trace, 4)


def test_every_answer_states_its_gap(tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path / "t", sources=4))
    costs = Costs(token_bytes=1e4, tokens_per_s=1e6, slot_G=np.full(4, 3))
    for one in place_trace(trace, links_of(park(2, 2, card=2)), costs, effort=0.2, prove_s=5):
        assert one.bound_s <= one.after_time.total_s < one.before_time.total_s
        assert one.proven


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_places_and_writes(tmp_path: Path) -> None:
    trace, cluster, out = write_trace(tmp_path / "t"), tmp_path / "c.toml", tmp_path / "p.toml"
    save_toml(cluster, park(2, 2, card=2))
    text = run("place", trace, cluster, "--slots", 3, "--effort", 0.1, "-o", out, "--svg", tmp_path / "p.svg")
    assert "times faster" in text
    assert "host 1" in text
    assert (tmp_path / "p.svg").read_text().startswith("<svg")
    table = json.loads(run("place", trace, cluster, "--slots", 3, "--effort", 0.1, "--current", out, "--json"))
    assert len(table["layers"]) == 2
    assert table["layers"][0]["bound_ms"] <= table["layers"][0]["after_ms"]


def test_loads_are_drawn(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t")
    text = run("loads", "show", trace, "--layer", 1, "--svg", tmp_path / "l.svg")
    assert "layer 1, steps 1 to 5" in text
    assert "Layer 1" in (tmp_path / "l.svg").read_text()


def test_a_cluster_is_drawn_and_imported(tmp_path: Path) -> None:
    conf, cluster = tmp_path / "topology.conf", tmp_path / "c.toml"
    conf.write_text("SwitchName=s0 Nodes=n[0-1]\nSwitchName=s1 Nodes=n2\nSwitchName=top Switches=s[0-1]\n")
    speeds = ["--speed", "host=400", "--speed", "leaf=50", "--speed", "spine=25"]
    run("cluster", "import", conf, "--device", "H100", "--devices-per-host", 8, *speeds, "-o", cluster)
    assert "24 devices" in run("cluster", "show", cluster)
    assert json.loads(run("cluster", "show", cluster, "--json"))["hosts"] == 3
