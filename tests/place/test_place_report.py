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
from moestro.place.loads import LoadWriter, as_one_source, read_trace
from moestro.place.plan_file import read_placements, save_placements
from moestro.place.report import Costs, place_trace, source_loads, token_sets
from moestro.place.solve import solve


def write_trace(path: Path, sources: int = 1, steps: int = 5, pairs: bool = False, merges: bool = False) -> Path:
    """Two layers of six experts; experts 0 and 5 are always chosen together where there are pairs."""
    writer = LoadWriter(path, num_layers=2, num_experts=6, merges=merges)
    for step in range(steps):
        count_SE = skewed(sources, 6, seed=step).astype(int)
        count_SE[:, 5] = count_SE[:, 0]
        pair_LX = np.zeros((2, 15), int)
        pair_LX[:, 4] = count_SE[:, 0].sum()
        writer.append(step + 1, np.stack([count_SE, count_SE]), pair_LX if pairs else None)
    writer.close()
    return path


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


def test_a_trace_of_other_ranks_is_refused_or_taken_as_even(tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path / "t", sources=3))
    with pytest.raises(PlacementError, match="recorded on 3 ranks, the cluster has 4 devices"):
        source_loads(trace, 4)
    token_LSE, _ = source_loads(as_one_source(trace), 4)
    assert (token_LSE == token_LSE[:, :1]).all()


def test_a_source_of_two_devices_is_both_of_them_in_halves(tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path / "t", sources=2, steps=1))
    token_LSE, _ = source_loads(trace, 4)
    np.testing.assert_allclose(token_LSE[:, 2], trace.source_MLSE[0, :, 1] / 2)
    np.testing.assert_allclose(token_LSE[:, 2], token_LSE[:, 3])


def test_token_sets_have_every_hosts_tokens_of_every_expert(tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path / "t", sources=4, steps=1, pairs=True))
    token_SE, links = source_loads(trace, 4)[0][0], links_of(park(2, 2))
    sets = token_sets(trace, 0, token_SE, links)
    assert {one.experts for one in sets} >= {(0, 5), (1,), (2,)}
    token_HE = np.zeros((2, 6))
    for one in sets:
        token_HE[one.host, list(one.experts)] += one.tokens
    np.testing.assert_allclose(token_HE, token_SE.reshape(2, 2, 6).sum(axis=1))
    together = sum(one.tokens for one in sets if one.experts == (0, 5))
    assert together == pytest.approx(token_SE[:, 0].sum())


def test_copies_are_merged_as_they_were_in_the_run(tmp_path: Path) -> None:
    costs, links = Costs(token_bytes=1e4, tokens_per_s=1e6, slot_G=np.full(4, 3)), links_of(park(2, 2, card=2))
    for pairs, merges, asked, merged in (
        (True, True, None, True),
        (True, False, None, False),
        (True, False, True, True),
        (False, True, None, False),
    ):
        trace = read_trace(write_trace(tmp_path / f"{pairs}{merges}", sources=4, pairs=pairs, merges=merges))
        (one, _) = place_trace(trace, links, costs, effort=0.05, merge_copies=asked, prove_s=0.5 if merged else 0.0)
        assert bool(one.layer.sets) == merged
        assert 0 < one.bound_s <= one.after_time.total_s
    with pytest.raises(PlacementError, match="no pairs of experts"):
        place_trace(trace, links, costs, merge_copies=True)


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
    assert "chosen together" not in text


def test_sources_and_pairs_are_shown(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", sources=2, pairs=True)
    lines = run("loads", "show", trace).splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("chosen together most often, over 5 steps"))
    assert lines[at + 1].split()[:3] == ["0", "and", "5"]
    assert any(line.split()[:2] == ["source", "rows/mean"] for line in lines)
    found = json.loads(run("loads", "show", trace, "--json"))
    assert found["pair_steps"] == [1, 2, 3, 4, 5]
    assert [(one["first"], one["second"]) for one in found["pairs"]] == [(0, 5)]
    assert found["pairs"][0]["over_chance"] > 1
    row_SE = read_trace(trace).source_MLSE[:, 0].sum(axis=0)
    shares = row_SE / row_SE.sum(axis=1, keepdims=True)
    mean = row_SE.sum(axis=0) / row_SE.sum()
    assert [one["apart"] for one in found["sources"]] == pytest.approx((abs(shares - mean).sum(axis=1) / 2).tolist())
    assert [one["busiest"] for one in found["sources"]] == row_SE.argmax(axis=1).tolist()


def test_a_cluster_is_drawn_and_imported(tmp_path: Path) -> None:
    conf, cluster = tmp_path / "topology.conf", tmp_path / "c.toml"
    conf.write_text("SwitchName=s0 Nodes=n[0-1]\nSwitchName=s1 Nodes=n2\nSwitchName=top Switches=s[0-1]\n")
    speeds = ["--speed", "host=400", "--speed", "leaf=50", "--speed", "spine=25"]
    run("cluster", "import", conf, "--device", "H100", "--devices-per-host", 8, *speeds, "-o", cluster)
    assert "24 devices" in run("cluster", "show", cluster)
    assert json.loads(run("cluster", "show", cluster, "--json"))["hosts"] == 3
