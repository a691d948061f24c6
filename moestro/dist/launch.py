"""Start several ranks on this machine, and start them again when one is lost: torchrun's agent, as a function call.

    launch(work, ranks=4, restarts=2) -> exit status

On CPU the ranks are forked from this process, which has torch loaded already: 0.3 s instead of seconds each. `work`
returns a rank's exit status; only a rank that dies or raises counts as lost.
"""

import logging
import os
import uuid
from collections.abc import Callable

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moestro.core.errors import STOPPED, TrainingError

STOP_WITHIN_S = 10
"""Seconds that ranks have to end after a signal, or after one of them was lost, before they are killed."""


def launch(work: Callable[[], int], ranks: int, restarts: int) -> int:
    """Run `work` on forked ranks; raises TrainingError where one is lost once more than `restarts` times.

    SIGTERM and SIGINT go to all ranks, which have STOP_WITHIN_S to save and end; the status is STOPPED then.
    """
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # else replaced ranks cannot join, docs/LOG.md
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // ranks, 1)))
    for name in ("torch.distributed", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what it has to say, we say
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        start_method="spawn" if torch.cuda.is_available() else "fork",
        shutdown_timeout=STOP_WITHIN_S,
    )
    try:
        statuses: dict[int, int] = elastic_launch(config, work)()
    except SignalException:
        return STOPPED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise TrainingError(
            f"rank {rank} was lost ({failure.signal_name() if failure.exitcode < 0 else f'status {failure.exitcode}'}) "
            f"and dist.restarts is {restarts}; go on from the last checkpoint with moestro resume"
        ) from error
    return max(statuses.values())
