"""A rank that is killed, or hangs, ends the step everywhere with its name; restarted ranks go on bit for bit."""

import os
import signal
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest


def load_benchmark(name: str) -> ModuleType:
    """A script of benchmarks/, which is no package."""
    spec = spec_from_file_location(name, Path(__file__).parents[2] / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kills = load_benchmark("rank_kills")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "number", "rank", "message"),
    [
        ("ep", signal.SIGKILL, 2, "rank 2 was lost"),
        ("ep", signal.SIGSTOP, 2, "rank 2 was lost: no sign of life"),
        ("ep", signal.SIGSTOP, 0, "rank 0 was lost: the ranks' common store"),
        ("tp", signal.SIGSTOP, 1, "rank 1 was lost: no sign of life"),
        ("zero", signal.SIGSTOP, 1, "rank 1 was lost: no sign of life"),
        ("pp", signal.SIGSTOP, 3, "rank 3 was lost: no sign of life"),
    ],
    ids=["killed", "stopped", "the store's holder stopped", "in tp", "in zero", "in pp"],
)
def test_a_lost_rank_is_named(tmp_path: Path, mesh: str, number: signal.Signals, rank: int, message: str) -> None:
    kills.write_corpus(tmp_path / "corpus")
    (tmp_path / mesh).mkdir()
    run, process = kills.Trial(tmp_path / mesh, mesh, kills=5000, seed=0).begin("run")
    kills.wait_for(process, lambda: kills.steps_done(run) > 3)
    begun_s = time.monotonic()
    os.kill(kills.rank_processes(process.pid)[rank], number)
    assert process.wait() == 1
    assert message in process.said()
    assert time.monotonic() - begun_s < kills.TIMEOUT_S + 30


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["zero", "diloco"])
def test_killed_at_random_moments_a_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path, mesh: str) -> None:
    kills.write_corpus(tmp_path / "corpus")
    (tmp_path / mesh).mkdir()
    trial = kills.Trial(tmp_path / mesh, mesh, kills=3, seed=0)
    calm, wild = trial.calm(), trial.wild()
    assert trial.count.writing >= 1
    assert kills.curve(wild) == kills.curve(calm)


@pytest.mark.slow
def test_two_ranks_go_on_where_one_of_four_was_killed(tmp_path: Path) -> None:
    kills.write_corpus(tmp_path / "corpus")
    (tmp_path / "pp").mkdir()
    trial = kills.Trial(tmp_path / "pp", "pp", kills=3, seed=0)
    assert trial.fewer(trial.calm()) < 1e-5
