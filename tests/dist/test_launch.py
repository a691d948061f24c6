"""Ranks started on this machine end together, and what comes back is a status."""

import os
import signal
import threading
import time
from pathlib import Path

from moestro.core.errors import STOPPED
from moestro.dist.launch import launch


def test_a_signal_reaches_all_ranks_and_ends_in_a_status(tmp_path: Path) -> None:
    def work() -> int:
        def note(*_: object) -> None:
            (tmp_path / os.environ["RANK"]).touch()
            os._exit(0)

        signal.signal(signal.SIGTERM, note)
        (tmp_path / f"{os.environ['RANK']} runs").touch()
        time.sleep(60)
        return 0

    def stop() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert launch(work, ranks=2, restarts=0) == STOPPED
    assert {"0", "1"} <= {path.name for path in tmp_path.iterdir()}
