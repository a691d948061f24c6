"""Versions on a device, against a real server: switching, rolling back, updates by residuals, what is refused."""

from pathlib import Path

import pytest
from package.samples import contents
from ship.conftest import Make, Serve

from moestro.core.errors import RefusalError
from moestro.ship.edge import Edge
from moestro.ship.install import CURRENT, HELD_BACK, INSTALLED, How, roll_back, update
from moestro.ship.pull import Guard
from moestro.ship.push import push

ANYBODY = Guard(trust=None)


def test_an_update_installs_switches_and_rolls_back(serve: Serve, make: Make, tmp_path: Path) -> None:
    running, edge = serve(), Edge(tmp_path / "home", "demo")
    first, second = make(sequence=1, seed=0), make(sequence=2, seed=1)
    push(running.server(), first)
    assert update(running.server(), edge, ANYBODY).state == INSTALLED
    assert contents(edge.root / "active") == contents(first)
    assert update(running.server(), edge, ANYBODY).state == CURRENT

    push(running.server(), second)
    assert update(running.server(), edge, ANYBODY).sequence == 2
    assert contents(edge.root / "active") == contents(second)
    assert contents(edge.folder(edge.state.previous)) == contents(first)

    roll_back(edge)
    assert contents(edge.root / "active") == contents(first)
    assert update(running.server(), edge, ANYBODY).state == HELD_BACK
    assert update(running.server(), edge, ANYBODY, How(again=True)).state == INSTALLED
    assert contents(edge.root / "active") == contents(second)


def test_nothing_to_roll_back_to_is_said(tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match="no former version"):
        roll_back(Edge(tmp_path, "demo"))
