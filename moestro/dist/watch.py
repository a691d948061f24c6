"""Find out which rank is to blame when ranks stop hearing of each other.

    every half second, every rank -> store: beats, exchanges entered        an exchange fails -> verdict -> RankLostError

A rank whose beats stop was killed or stopped, or its machine is gone. Where all beat, the one that has entered the
fewest exchanges is stuck while the others wait for it. The first rank to find out writes the verdict down; those that
fail later, also because others have left, repeat it.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from moestro.core.errors import RankLostError
from moestro.dist.mesh import PULSE

BEAT_S = 0.5
SIGNS = ("gloo", "connection", "nccl", "timed out", "socket", "store", "broken pipe")
"""Words by which an error of the network is told from others."""
NONE_YET = "-"


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
        self.scope = f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._write(0)
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        number = 0
        while not self.stopped.wait(BEAT_S):
            number += 1
            try:
                self._write(number)
            except RuntimeError:  # the store has gone, and with it the run
                return

    def _write(self, number: int) -> None:
        self.store.set(f"{self.scope}/{self.rank}", f"{number} {PULSE.entered}")

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
        """Who was lost, and whether we are the first to say so."""
        try:
            before = self._read()
            time.sleep(4 * BEAT_S)
            after = self._read()
            text = _judge(before, after)
            agreed = self.store.compare_set(f"{self.scope}/verdict", "", text).decode()
            return agreed, agreed == text
        except RuntimeError:
            return "rank 0 was lost, which held the ranks' common store", self.rank == 1

    def _read(self) -> dict[int, tuple[int, int]]:
        """(beats, exchanges entered) of every rank that has begun."""
        keys = {rank: f"{self.scope}/{rank}" for rank in range(self.ranks)}
        found = {rank: self.store.get(key).decode().split() for rank, key in keys.items() if self.store.check([key])}
        return {rank: (int(beats), int(entered)) for rank, (beats, entered) in found.items()}


def _judge(before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]]) -> str:
    """One line from two looks at everybody's beats."""
    silent = [rank for rank, seen in after.items() if before.get(rank, (0, 0))[0] == seen[0]]
    if silent:
        names = " and ".join(str(rank) for rank in silent)
        return f"rank {names} was lost: no sign of life (killed, stopped, or its machine is gone)"
    entered = {rank: seen[1] for rank, seen in after.items()}
    rank = min(entered, key=lambda rank: entered[rank])
    return f"rank {rank} hangs: it has entered {entered[rank]} exchanges, others {max(entered.values())}"
