"""One thread: two fight with whatever else the machine does, and sums keep one order. And a disk that fills up."""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported, by whatever test that is


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU here")


FullDisk = Callable[[int], AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def full_disk() -> FullDisk:
    """`with full_disk(1024):` the system refuses to let any file of this process grow beyond so many bytes.

    Keep the block short: pytest's own output is such a file where it does not go to a terminal.
    """

    @contextmanager
    def limited(most_bytes: int) -> Iterator[None]:
        old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, handler)

    return limited
