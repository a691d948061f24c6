"""Planning, packaging, shipping and `moestro --help` must work on a machine without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

TORCH_FREE = ["core", "cluster", "jobs", "plan", "place", "package", "ship", "cli"]
PACKAGE = Path(__file__).parents[1] / "moestro"


@pytest.mark.parametrize("folder", [name for name in TORCH_FREE if (PACKAGE / name).is_dir()])
def test_imports_no_torch(folder: str) -> None:
    walk = (
        "import importlib, pkgutil, sys; "
        f"top = importlib.import_module('moestro.{folder}'); "
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(top.__path__, top.__name__ + '.')]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", walk], check=False).returncode == 0
