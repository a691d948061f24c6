"""The event log's curves as TensorBoard files, where the `tensorboard` package is installed."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

INSTALL = "TensorBoard files are not written: tensorboard is not installed (pip install 'moestro[tensorboard]')"


class Board:
    """Writes scalars, or nothing where there is no writer."""

    def __init__(self, writer: "SummaryWriter | None") -> None:
        self._writer = writer

    def add(self, prefix: str, values: Mapping[str, Any], step: int) -> None:
        """Every number in `values`, lists as one curve per layer."""
        if self._writer is None:
            return
        for name, value in values.items():
            numbers = enumerate(value) if isinstance(value, list) else [(None, value)]
            for layer, number in numbers:
                if isinstance(number, int | float):
                    tag = f"{prefix}/{name}" if layer is None else f"{prefix}/{name}/layer {layer}"
                    self._writer.add_scalar(tag, number, step)

    def close(self) -> None:
        """Flush to disk."""
        if self._writer is not None:
            self._writer.close()


def installed() -> bool:
    """True where TensorBoard files can be written."""
    return importlib.util.find_spec("tensorboard") is not None


def open_board(folder: Path, wanted: bool, from_step: int) -> Board:
    """A board that replaces what an earlier run wrote at or after `from_step`."""
    if not wanted or not installed():
        return Board(None)
    from torch.utils.tensorboard import SummaryWriter  # deferred: seconds to import

    return Board(SummaryWriter(str(folder), purge_step=from_step + 1))
