"""One thread: two fight with whatever else the machine does, and sums keep one order."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
