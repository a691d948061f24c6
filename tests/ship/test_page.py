"""The web page in a real browser: what it lists, what an update would transfer, that names are text."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from package.samples import save_model, tensors
from ship.browser import CHROMIUM, Browser
from ship.conftest import Serve

from moestro.package.api import Options, Release, pack
from moestro.package.residual import diff
from moestro.ship.push import push

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


def packages(folder: Path) -> list[Path]:
    """Two releases, the second with a changed expert, and the update between them."""
    weights, found = tensors(), []
    for sequence in (1, 2):
        weights["experts.w"][2] += np.float32(0.001 * (sequence - 1))
        info = {"description": "<img src=x onerror=alert(1)>", "license": "MIT"}
        options = Options(release=Release(package_id="demo", sequence=sequence), info=info)
        found.append(folder / f"demo-{sequence}")
        pack(save_model(folder / f"model-{sequence}", weights), found[-1], options)
    diff(found[:1], found[1], folder / "update")
    return [*found, folder / "update"]


def test_the_page_lists_releases_and_says_what_an_update_would_transfer(
    serve: Serve, browser: Browser, tmp_path: Path
) -> None:
    running = serve(names=["example.test"])
    for package in packages(tmp_path):
        push(running.server(), package)
    browser.open(running.url + "/")
    assert "without a token" in browser.wait_for("document.querySelector('#message').textContent")

    browser.run(f"document.querySelector('#token').value = '{running.token}'")
    browser.run("document.querySelector('#login button').click()")
    browser.wait_for("document.querySelectorAll('.bar').length === 3")
    rows = browser.run("[...document.querySelectorAll('tbody tr')].map(row => row.textContent)")
    assert [row[:5] for row in rows] == ["2full", "2upda", "1full"]
    assert "exact" in rows[1]
    widths = browser.run("[...document.querySelectorAll('.bar div')].map(bar => parseFloat(bar.style.width))")
    assert widths[0] == 100 > widths[1] > widths[2] > 0
    assert browser.run("document.querySelectorAll('.lineage .edge').length") == 1
    assert browser.run("document.querySelector('.about').textContent").startswith("<img src=x")
    assert browser.run("document.querySelectorAll('img').length") == 0
    if "MOESTRO_SCREENSHOT" in os.environ:
        browser.screenshot(Path(os.environ["MOESTRO_SCREENSHOT"]))

    browser.run(
        "const list = document.querySelector('.base'); list.value = '2'; list.dispatchEvent(new Event('change'))"
    )
    browser.wait_for("document.querySelectorAll('.bar.unknown').length === 1")
    errors = [entry for entry in browser.logs if '"error"' in entry or "exception" in entry]
    assert not errors, errors
