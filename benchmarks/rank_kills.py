"""Kill ranks of training runs at random instants, and compare what is left with undisturbed runs.

    python benchmarks/rank_kills.py FOLDER [--kills 50] [--meshes zero ...] [--out FILE]

For every mesh an undisturbed run and a disturbed one of 4 ranks with dist.restarts. In turn a random rank is killed:
*writing*   while a checkpoint is on its way to the disk (counted where its partial folder was there after the kill)
*starting*  in the first instants of a start, while ranks meet, read data or load the checkpoint
*anywhere*  within the time of two checkpoints
and every eighth is *hung* instead: SIGSTOP, ended by dist.timeout_s. Asserted: the run always ends by itself with
status 0, and losses, gradient norms and evaluations of all steps equal the undisturbed run's to the last bit. Then the
same run without restarts is killed once, goes on with 2 ranks, and ends with the same curve within rounding.

Prints one line per mesh, then one JSON line.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed.launcher.api  # noqa: F401  # all that runs need is imported once

import moestro.train.loop
import moestro.train.ranks  # noqa: F401
from moestro.cli.main import main as main_command
from moestro.core.config import build, save_toml, with_overrides
from moestro.core.events import read_events
from moestro.train.recipe import Recipe
from moestro.train.run_folder import RunFolder

RANKS = 4
STEPS_PER_KILL = 7
TIMEOUT_S = 8
PATIENCE_S = 900
MESHES = {
    "ep": (["dist.dp_replicate=2", "dist.ep=2"], ["dist.ep=2"]),
    "zero": (["dist.ep=2", "dist.zero=2"], ["dist.ep=1"]),
    "tp": (["dist.tp=2", "dist.ep=2"], ["dist.tp=2"]),
    "pp": (["dist.pp=2", "dist.zero=1"], ["dist.ep=2"]),
    "diloco": (["dist.dp_replicate=2", "dist.sync=diloco", "dist.sync_every=3", "dist.compression=int8"], []),
}
"""Settings of 4 ranks, and of the 2 that go on without the others; none where copies would learn another way."""


@dataclass(slots=True)
class Count:
    """What one mesh went through."""

    kills: int = 0
    writing: int = 0
    starting: int = 0
    hung: int = 0
    resumed: int = 0
    recovery_s: list[float] = field(default_factory=list)
    """From a kill to the next step that is done."""


class Command:
    """`moestro ...` in a fork of this process, which has imported everything already."""

    def __init__(self, *arguments: str) -> None:
        self.returncode: int | None = None
        self.errors, path = tempfile.mkstemp()
        os.unlink(path)
        self.pid = os.fork()
        if self.pid == 0:
            self._run(arguments)

    def _run(self, arguments: tuple[str, ...]) -> NoReturn:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(self.errors, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
            for key in [key for key in os.environ if key.startswith(("RANK", "WORLD", "LOCAL_"))]:
                del os.environ[key]
            sys.argv = ["moestro", *arguments]
            main_command()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status, once it has one."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        """Until it ends."""
        until_s = time.monotonic() + PATIENCE_S
        while self.poll() is None:
            assert time.monotonic() < until_s, f"a run does not end: {self.said()}"
            time.sleep(0.05)
        assert self.returncode is not None
        return self.returncode

    def said(self) -> str:
        """What came on stderr."""
        return os.pread(self.errors, 1 << 20, 0).decode()


class Trial:
    """One mesh's runs."""

    def __init__(self, folder: Path, mesh: str, kills: int, seed: int) -> None:
        self.folder, self.mesh, self.kills, self.dice = folder, mesh, kills, random.Random(seed)
        self.four, self.two = MESHES[mesh]
        self.steps, self.count = STEPS_PER_KILL * max(kills, 2), Count()
        self.start_s = self.step_s = 0.0

    def recipe(self, name: str) -> Recipe:
        """A tiny model on a corpus of some kilobytes."""
        table: dict[str, Any] = {
            "out": str(self.folder / name),
            "data": {"source": str(self.folder.parent / "corpus"), "heldout_share": 0.2},
            "model": {"num_layers": 2, "width": 16, "attention": {"num_heads": 2}},
            "train": {"steps": self.steps, "length": 32, "sequences": 8, "micro_batches": 2, "tensorboard": False},
            "optimizer": {"warmup_steps": 2, "lr": 0.01, "eps": 1e-3},
        }
        table["model"]["moe"] = {"num_experts": 4, "expert_width": 16}
        table["train"] |= {"threads": 1, "evaluate_every": 15, "checkpoint_every": 3, "precision": "fp32"}
        return build(Recipe, with_overrides(table, [f"dist.timeout_s={TIMEOUT_S}"]))

    def begin(self, name: str, *settings: str) -> tuple[RunFolder, Command]:
        """`moestro train` on 4 ranks."""
        recipe = self.recipe(name)
        save_toml(self.folder / f"{name}.toml", recipe)
        command = ["train", str(self.folder / f"{name}.toml"), f"dist.ranks={RANKS}", *self.four, *settings]
        return RunFolder(recipe.out), Command(*command)

    def calm(self) -> RunFolder:
        """The run that nobody disturbs."""
        run, process = self.begin("calm")
        wait_for(process, lambda: len(rank_processes(process.pid)) == RANKS)
        begun_s = time.time()
        ended(process)
        step_s = [event["time_s"] for event in read_events(run.events) if event["event"] == "step"]
        self.start_s, self.step_s = step_s[0] - begun_s, (step_s[-1] - step_s[0]) / len(step_s)
        return run

    def wild(self) -> RunFolder:
        """The run that is disturbed again and again."""
        run, process = self.begin("wild", f"dist.restarts={self.kills + 2}")
        for number in range(self.kills):
            kind = ("writing", "starting", "writing", "anywhere")[number % 4]
            rank, hang = self.dice.randrange(RANKS), number % 8 == 7
            self.strike(run, process, kind, rank, signal.SIGSTOP if hang else signal.SIGKILL)
        ended(process)
        self.count.resumed = run.events.read_text().count('"event":"resume"')
        return run

    def strike(self, run: RunFolder, process: Command, kind: str, rank: int, number: signal.Signals) -> None:
        """Wait for a moment of this kind, hit a rank, and wait until training goes on."""
        count, before = self.count, newest(run)
        wait_for(process, lambda: len(rank_processes(process.pid)) == RANKS)
        if kind == "starting":
            time.sleep(self.dice.random() * self.start_s)
        else:
            wait_for(process, lambda: newest(run) != before)
        if kind == "anywhere":
            time.sleep(self.dice.random() * 6 * self.step_s)
        since_s = time.time()  # a kill may leave a folder behind
        if kind == "writing":
            older = run.checkpoints()
            wait_for(process, lambda: run.checkpoints() != older)
            wait_for(process, lambda: partial(run, since_s), look_s=0.0005)
            time.sleep(self.dice.random() * 0.003)
        hit = rank_processes(process.pid)[rank]
        os.kill(hit, number)
        seen, begun_s = newest(run), time.monotonic()
        count.writing += partial(run, since_s)
        count.kills, count.starting = count.kills + 1, count.starting + (kind == "starting")
        count.hung += number == signal.SIGSTOP
        wait_for(process, lambda: hit not in rank_processes(process.pid))
        wait_for(process, lambda: newest(run) != seen and len(rank_processes(process.pid)) == RANKS)
        count.recovery_s.append(time.monotonic() - begun_s)

    def fewer(self, calm: RunFolder) -> float:
        """Killed once, 2 ranks go on; returns the largest relative difference of a loss."""
        run, process = self.begin("fewer")
        wait_for(process, lambda: steps_done(run) > self.steps // 3)
        time.sleep(self.dice.random())
        os.kill(rank_processes(process.pid)[self.dice.randrange(RANKS)], signal.SIGKILL)
        status = process.wait()
        assert status == 1, f"status {status}: {process.said()}"
        plain = ["dist.pp=1", "dist.tp=1", "dist.ep=1", "dist.zero=0", "dist.dp_replicate=1"]
        ended(Command("resume", str(run.root), "dist.ranks=2", *plain, *self.two))
        pairs = zip(curve(run), curve(calm), strict=True)
        return max(abs(one["loss"] / other["loss"] - 1) for one, other in pairs if one["event"] == "step")


def ended(process: Command) -> None:
    """Wait for a run to end well."""
    status = process.wait()
    assert status == 0, f"status {status}: {process.said()}"


def rank_processes(agent: int) -> list[int]:
    """The forked ranks, in order: children of the agent that run the same command."""
    try:
        command = Path(f"/proc/{agent}/cmdline").read_bytes()
        children = [file.read_text().split() for file in Path(f"/proc/{agent}/task").glob("*/children")]
        numbers = sorted({int(pid) for pids in children for pid in pids})
        return [pid for pid in numbers if Path(f"/proc/{pid}/cmdline").read_bytes() == command]
    except (FileNotFoundError, ProcessLookupError):  # one ended while we looked
        return []


def partial(run: RunFolder, since_s: float) -> bool:
    """True while a checkpoint is on its way to the disk that was begun since."""
    try:
        return any(path.stat().st_mtime > since_s for path in (run.root / "checkpoints").glob("*.partial"))
    except FileNotFoundError:  # it has just got its name
        return False


def steps_done(run: RunFolder) -> int:
    """Of steps that count."""
    return max((event["step"] for event in read_events(run.events)), default=0)


def newest(run: RunFolder) -> float:
    """When the last step was done that anybody logged."""
    steps = [event for event in read_events(run.events) if event["event"] == "step"]
    return float(steps[-1]["time_s"]) if steps else 0.0


def curve(run: RunFolder) -> list[dict[str, Any]]:
    """What every step and evaluation found, without times."""
    names = ("event", "step", "loss", "grad_norm", "bits_per_byte", "experts", "entropy", "whole")
    events = [event for event in read_events(run.events) if event["event"] in ("step", "evaluation")]
    return [{name: event[name] for name in names if name in event} for event in events]


def wait_for(process: Command, what: Callable[[], bool], look_s: float = 0.01) -> None:
    """Look until it is so; raises where the run ends before or nothing happens for minutes."""
    until_s = time.monotonic() + PATIENCE_S
    while not what():
        if process.poll() is not None:
            raise AssertionError(f"the run ended with status {process.returncode}: {process.said()}")
        if time.monotonic() > until_s:
            raise AssertionError("nothing happens any more")
        time.sleep(look_s)


def write_corpus(folder: Path) -> None:
    """Eight small text files."""
    folder.mkdir(parents=True)
    for number in range(8):
        lines = (f"line {i} of file {number}: {'abc' * (i % 5)}\n" for i in range(60))
        (folder / f"file{number}.txt").write_text("".join(lines))


def main() -> None:
    """All meshes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--meshes", nargs="+", default=list(MESHES), choices=list(MESHES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    write_corpus(args.folder / "corpus")
    rows: list[list[Any]] = []
    begun_s = time.monotonic()
    columns = ["mesh", "kills", "writing", "starting", "hung", "resumed", "median_s", "worst_s", "fewer_ranks_error"]
    result = {"bench": "rank_kills", "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count()}
    result |= {"columns": columns, "rows": rows}
    for place, mesh in enumerate(args.meshes):
        (args.folder / mesh).mkdir()
        kills = args.kills * (place + 1) // len(args.meshes) - args.kills * place // len(args.meshes)
        trial = Trial(args.folder / mesh, mesh, kills, args.seed + place)
        calm, wild, count = trial.calm(), trial.wild(), trial.count
        assert curve(wild) == curve(calm), f"{mesh}: another curve, see {trial.folder}"
        apart = trial.fewer(calm) if trial.two else None
        assert apart is None or apart < 1e-5, f"{mesh}: with fewer ranks a loss differs by {apart:.1e}"
        median_s, worst_s = statistics.median(count.recovery_s), max(count.recovery_s)
        rows.append(
            [mesh, count.kills, count.writing, count.starting, count.hung, count.resumed, median_s, worst_s, apart]
        )
        print(
            f"{mesh:7} {count.kills:3d} kills, {count.writing} while writing, {count.starting} at the start, "
            f"{count.hung} hung; {trial.steps} steps equal bit for bit; next step after {median_s:.1f} s, "
            f"at most {worst_s:.1f} s; 2 ranks went on within {apart}",
            flush=True,
        )
        result["minutes"] = (time.monotonic() - begun_s) / 60
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
