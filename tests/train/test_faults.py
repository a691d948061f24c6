"""A rank that is killed, or hangs, ends the step everywhere with its name; restarted ranks go on bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moestro.core.config import save_toml
from moestro.core.events import read_events
from moestro.train.recipe import Recipe
from moestro.train.run_folder import RunFolder

MakeRecipe = Callable[..., Recipe]
RANKS = 3


def launched(recipe: Recipe, tmp_path: Path, *settings: str) -> subprocess.Popen[str]:
    save_toml(tmp_path / "recipe.toml", recipe)
    command = [sys.executable, "-m", "moestro", "train", str(tmp_path / "recipe.toml"), f"dist.ranks={RANKS}"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "WORLD", "LOCAL_"))}
    return subprocess.Popen([*command, *settings], env=clean, stderr=subprocess.PIPE, text=True)


def rank_processes(agent: int) -> list[int]:
    """The forked ranks: children of the agent that run the same command."""
    command = Path(f"/proc/{agent}/cmdline").read_bytes()
    children = Path(f"/proc/{agent}/task").glob("*/children")
    numbers = sorted({int(pid) for file in children for pid in file.read_text().split()})
    return [pid for pid in numbers if Path(f"/proc/{pid}/cmdline").read_bytes() == command]


def wait_for(what: Callable[[], bool], looks: int = 6000) -> None:
    for _ in range(looks):  # looks, not seconds: all of this may be paused together
        if what():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def steps_done(recipe: Recipe) -> int:
    return max((event["step"] for event in read_events(RunFolder(recipe.out).events)), default=0)


def losses(recipe: Recipe) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_events(RunFolder(recipe.out).events) if e["event"] == "step"}


def strike(process: subprocess.Popen[str], number: signal.Signals, rank: int) -> None:
    os.kill(rank_processes(process.pid)[rank], number)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "message"),
    [(signal.SIGKILL, "rank 2 was lost"), (signal.SIGSTOP, "rank 2 was lost: no sign of life")],
    ids=["killed", "stopped"],
)
def test_a_lost_rank_is_named(make_recipe: MakeRecipe, tmp_path: Path, number: signal.Signals, message: str) -> None:
    recipe = make_recipe("train.steps=100000", "train.checkpoint_every=50", "train.evaluate_every=0")
    process = launched(recipe, tmp_path, "dist.timeout_s=3")
    wait_for(lambda: steps_done(recipe) > 3)
    begun_s = time.monotonic()
    strike(process, number, rank=2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert message in errors
    assert time.monotonic() - begun_s < 30


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_with_the_bits_of_an_undisturbed_one(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    kills = int(os.environ.get("MOESTRO_KILLS", "3"))
    settings = ["train.evaluate_every=0", "train.checkpoint_every=3", f"train.steps={100 * kills}"]
    calm = make_recipe(f"out={tmp_path}/calm", *settings)
    process = launched(calm, tmp_path, "dist.ep=3", "model.moe.num_experts=6")
    process.communicate()
    assert process.returncode == 0
    wild = make_recipe(f"out={tmp_path}/wild", *settings)
    process = launched(wild, tmp_path, "dist.ep=3", "model.moe.num_experts=6", f"dist.restarts={kills}")
    draw, folder = random.Random(0), RunFolder(wild.out)
    for _ in range(kills):
        begun = steps_done(wild)
        wait_for(lambda begun=begun: steps_done(wild) > begun and len(rank_processes(process.pid)) == RANKS)
        if draw.random() < 0.5:  # while a checkpoint is being written
            wait_for(lambda: bool(list((folder.root / "checkpoints").glob("*.partial"))) or process.poll() is not None)
        else:
            time.sleep(draw.random())
        strike(process, signal.SIGKILL, draw.randrange(RANKS))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert losses(wild) == losses(calm)
    resumes = [event for event in map(str, folder.events.read_text().splitlines()) if '"resume"' in event]
    assert len(resumes) == kills
