"""Evaluate a run, a checkpoint or an imported model on its own held-out text or on any other."""

import tempfile
from pathlib import Path
from typing import Literal, cast

from moestro.core.errors import ConfigError
from moestro.train.checkpoint import find_checkpoint, load_model
from moestro.train.data import TokenData, encode_files, open_data
from moestro.train.device import pick_device, pick_dtype
from moestro.train.evaluate import Evaluation, evaluate
from moestro.train.run_folder import RunFolder

DEFAULT_LENGTH = 512


def evaluate_run(path: Path, sources: list[str], length: int, precision: str, device: str = "auto") -> Evaluation:
    """Evaluate the newest checkpoint.

    sources    files and folders; empty takes the run's held-out text
    length     tokens per window; 0 takes the run's, or 512
    precision  fp32, bf16 or auto
    """
    if precision not in ("fp32", "bf16", "auto"):
        raise ConfigError(f"--precision is {precision!r}; it must be fp32, bf16 or auto")
    if length < 0:
        raise ConfigError(f"--length is {length}; it must be 0 or more")
    found = find_checkpoint(path)
    model, tokenizer = load_model(found)
    where = pick_device(device)
    dtype = pick_dtype(cast(Literal["auto", "fp32", "bf16"], precision), where)
    run = _run_of(path)
    if not length:
        length = run.load_recipe().train.length if run else DEFAULT_LENGTH
    if sources:
        with tempfile.TemporaryDirectory() as folder:
            heldout = encode_files(tuple(sources), tokenizer, Path(folder))
            data = TokenData(heldout, heldout, tokenizer, {})
            return evaluate(model.to(where), data, length=length, dtype=dtype)
    if run is None:
        raise ConfigError(f"{path} is not a run and has no held-out text of its own; name text with --data PATH")
    return evaluate(model.to(where), open_data(run.data), length=length, dtype=dtype)


def _run_of(path: Path) -> RunFolder | None:
    """The run that a path is, or that a checkpoint belongs to."""
    candidates = (path, path.parent.parent)
    return next((RunFolder(root) for root in candidates if RunFolder(root).recipe.exists()), None)
