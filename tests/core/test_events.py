"""`core.events`: what was logged is read back, without torn lines and without history that a resume went back over."""

from pathlib import Path

from moestro.core.events import EventLog, read_events


def test_events_read_back_in_order(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("step", 1, loss=2.5)
        log.write("evaluation", 1, bits_per_byte=1.5)
    events = read_events(tmp_path / "events.jsonl")
    assert [(event["event"], event["step"]) for event in events] == [("step", 1), ("evaluation", 1)]
    assert events[0]["loss"] == 2.5


def test_a_torn_last_line_is_dropped_and_written_after(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event":"step","step":1}\n{"event":"st')
    with EventLog(path) as log:
        log.write("step", 2)
    assert [event["step"] for event in read_events(path)] == [1, 2]


def test_a_resume_takes_back_later_steps(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for step in (1, 2, 3):
            log.write("step", step, try_=1)
        log.write("resume", 1)
        log.write("step", 2, try_=2)
    kept = [(event["event"], event["step"], event.get("try_")) for event in read_events(path)]
    assert kept == [("step", 1, 1), ("resume", 1, None), ("step", 2, 2)]
