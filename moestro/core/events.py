"""The event log of a run: one JSON object a line, appended as things happen.

    {"event": "step", "step": 30, "time_s": 12.1, "loss": 2.31, ...}

A killed run leaves at most one torn last line, which reading drops. A resumed run appends `{"event": "resume",
"step": s}`: what was logged after step s before is then history that did not happen, and reading drops that too.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from moestro.core.files import cannot_write

Event = dict[str, Any]


class EventLog:
    """Appends events to `path`; use as a context manager or call `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _end_torn_line(path)
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise cannot_write(path, error) from error

    def write(self, event: str, step: int, **fields: Any) -> None:
        """Append one event; raises StorageError when the disk is full."""
        record: Event = {"event": event, "step": step, "time_s": round(time.time(), 3), **fields}
        try:
            self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_events(path: Path) -> list[Event]:
    """All events that count, in order: without a torn last line and without what a resume went back over."""
    events: list[Event] = []
    if not path.exists():
        return events
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn by a kill
        if event["event"] == "resume":
            events = [old for old in events if old["step"] <= event["step"]]
        events.append(event)
    return events


def _end_torn_line(path: Path) -> None:
    """Start the next event on a line of its own."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.write(b"\n")
