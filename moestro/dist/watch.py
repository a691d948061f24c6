"""Find out which rank is to blame when ranks stop hearing of each other.

    every half second, every rank -> store: beats, exchanges entered        an exchange fails -> verdict -> RankLostError

A rank whose beats stop was killed or stopped, or its machine is gone. Where all beat, the one that has entered the
fewest exchanges is stuck while the others wait for it. The first rank to find out writes the verdict down; those that
fail later, also because others have left, repeat it.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from moestro.core.errors import RankLostError
from moestro.dist.mesh import PULSE

BEAT_S = 0.5
ANSWER_S = 10.0
"""After so long without an answer from the store, rank 0, which holds it, is the one that was lost."""
SIGNS = ("gloo", "connection", "nccl", "timed out", "socket", "store", "broken pipe")
"""Words by which an error of the network is told from others."""


@dataclass(frozen=True, slots=True)
class Sign:
    """What a rank tells of itself every half second."""

    beats: int
    entered: int
    """Exchanges it has entered."""
    host: str = ""
    pid: int = 0


class Watch:
    """This rank's beats, and what it knows of the others'."""

    def __init__(self, rank: int, ranks: int, patience_s: float) -> None:
        self.rank, self.ranks, self.patience_s = rank, ranks, patience_s
        self.store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=10),
        )
        self.stopped = threading.Event()
        self.keeper: Sign | None = None
        self.scope = f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._write(0)
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        number = 0
        while not self.stopped.wait(BEAT_S):
            number += 1
            try:
                self._write(number)
                if self.keeper is None:
                    self.keeper = self._read(1).get(0)
            except RuntimeError:  # the store has gone, and with it the run
                return

    def _write(self, number: int) -> None:
        self.store.set(f"{self.scope}/{self.rank}", f"{number} {PULSE.entered} {socket.gethostname()} {os.getpid()}")

    def close(self) -> None:
        """Beat no more."""
        self.stopped.set()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn an error of the network into a RankLostError that names the rank."""
        try:
            yield
        except RuntimeError as error:
            if not any(sign in str(error).lower() for sign in SIGNS):
                raise
            verdict, ours = self.verdict()
            raise RankLostError(
                f"{verdict}; ranks wait {self.patience_s:g} s for each other (dist.timeout_s); "
                "go on from the last checkpoint with moestro resume",
                ours,
            ) from error

    def verdict(self) -> tuple[str, bool]:
        """Who was lost, and whether we are the first to say so; lost ranks of this machine are killed for good."""
        found: list[tuple[str, bool]] = []
        asking = threading.Thread(target=lambda: found.append(self._ask()), daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        if found:
            return found[0]
        if self.rank == 1 and self.keeper:
            _kill(self.keeper)
        return "rank 0 was lost: the ranks' common store, which it holds, does not answer", self.rank == 1

    def _ask(self) -> tuple[str, bool]:
        """The verdict where the store answers."""
        try:
            before = self._read(self.ranks)
            time.sleep(4 * BEAT_S)
            after = self._read(self.ranks)
            lost, text = judge(before, after)
            agreed = self.store.compare_set(f"{self.scope}/verdict", "", f"{self.rank} {text}").decode()
        except RuntimeError:
            return "rank 0 was lost, which held the ranks' common store", self.rank == 1
        author, _, text = agreed.partition(" ")
        if author == str(self.rank):
            for rank in lost:
                _kill(after[rank])
        return text, author == str(self.rank)

    def _read(self, ranks: int) -> dict[int, Sign]:
        """The last sign of life of every rank that has begun, of the first so many."""
        keys = {rank: f"{self.scope}/{rank}" for rank in range(ranks)}
        found = {rank: self.store.get(key).decode().split() for rank, key in keys.items() if self.store.check([key])}
        return {rank: Sign(int(beats), int(entered), host, int(pid)) for rank, (beats, entered, host, pid) in found.items()}


def judge(before: dict[int, Sign], after: dict[int, Sign]) -> tuple[list[int], str]:
    """Lost ranks, and one line about them, from two looks at everybody's signs of life."""
    silent = [rank for rank, sign in after.items() if rank in before and before[rank].beats == sign.beats]
    if silent:
        names = " and ".join(str(rank) for rank in silent)
        return silent, f"rank {names} was lost: no sign of life (killed, stopped, or its machine is gone)"
    rank = min(after, key=lambda rank: after[rank].entered)
    most = max(sign.entered for sign in after.values())
    return [rank], f"rank {rank} hangs: it has entered {after[rank].entered} exchanges, others {most}"


def _kill(sign: Sign) -> None:
    """End a lost process that is on this machine: a stopped one would keep its launcher waiting."""
    if sign.host == socket.gethostname():
        with suppress(ProcessLookupError):
            os.kill(sign.pid, signal.SIGKILL)
