"""A small model folder."""

from pathlib import Path

import pytest
from package.samples import save_model, tensors


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder."""
    return save_model(tmp_path / "model", tensors())
