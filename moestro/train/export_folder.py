"""Our models out: a checkpoint becomes a Hugging Face folder that transformers loads to the same logits.

    checkpoint -> Decoder -> config.json, tensors one by one, tokenizer.json -> folder, whole or not at all

A model that the family cannot express is an error that names every setting in the way. An imported model goes out as
it came in, bit for bit: the types of its tensors, its token ids and its tokenizer's files are in its origin.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moestro.core.errors import CheckpointError, FamilyError
from moestro.core.files import folder_aside
from moestro.core.tensors import SHARD_BYTES, Entry, shown, stored_tensors, write_tensors
from moestro.core.tokens import Tokenizer
from moestro.core.units import bytes_text
from moestro.nn.decoder import Decoder
from moestro.nn.families.family import Family
from moestro.nn.families.fit import check_fit, family_for, training_settings
from moestro.nn.families.known import FAMILIES
from moestro.nn.families.names import not_covered, pieces
from moestro.nn.families.settings import Table
from moestro.train.checkpoint import find_checkpoint, load_model, load_spec
from moestro.train.origin import Origin, check_free, load_origin
from moestro.train.run_folder import RunFolder

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
BIAS = ".e_score_correction_bias"
"""transformers keeps it in float32 whatever the model's type."""
PASSED_ON = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "output_router_logits")
"""Keys of the original config.json that a spec has no place for and that change nothing we compute."""
CONTEXT = 4096
"""max_position_embeddings where nobody knows better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What went out."""

    family: str
    dtype: str
    tensors: int
    files: list[str]
    size_bytes: int
    rounded: int
    """Tensors whose numbers the type does not hold exactly."""
    not_written: list[str]
    """Settings for training that the family has no place for."""

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"{self.family}: {self.tensors} tensors in {self.dtype}, {bytes_text(self.size_bytes)}",
            f"files        {', '.join(self.files)}",
        ]
        if self.rounded:
            lines.append(f"rounded      {self.rounded} tensors hold more digits than {self.dtype} has")
        if self.not_written:
            lines.append(
                f"not written  {', '.join(self.not_written)}: for training only, the family has no place for it"
            )
        return lines


def export_folder(
    run: Path,
    out: Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    context: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ExportReport:
    """Write a Hugging Face folder; raises FamilyError where the family cannot hold the model.

    run          a run folder, a checkpoint or an imported model
    family       `model_type`; None takes the one the model's shape belongs to
    dtype        fp32, bf16 or fp16; None takes what the model was imported with, else fp32
    context      max_position_embeddings; None takes the original's, the run's train.length, or 4096
    shard_bytes  largest weight file
    """
    check_free(out)
    for name, value, known in (("--dtype", dtype, STORED), ("--family", family, FAMILIES)):
        if value not in (None, *known):
            raise FamilyError(f"{name} is {value!r}; it must be {', '.join(sorted(known))}")
    folder, origin = find_checkpoint(run), load_origin(run)
    spec = load_spec(folder)
    target = FAMILIES[family] if family else family_for(spec)
    check_fit(spec, target)  # before weights are read
    model, tokenizer = load_model(folder)
    weights = _Weights(model, target, origin, STORED[dtype] if dtype else None)
    config = _config(model, target, origin, tokenizer) | {
        "max_position_embeddings": context or _context(run, origin),
        "torch_dtype": TORCH_NAMES[weights.dtype],
    }
    with folder_aside(out) as aside:
        (aside / "config.json").write_text(json.dumps(config, indent=2))
        files = write_tensors(aside, weights.entries, weights.content, shard_bytes)
        _write_tokenizer(aside, tokenizer, origin)
        _verify(aside, weights)
    return ExportReport(
        family=target.name,
        dtype=next(name for name, stored in STORED.items() if stored == weights.dtype),
        tensors=len(weights.entries),
        files=files,
        size_bytes=sum(entry.size_bytes for entry in weights.entries),
        rounded=len(weights.rounded),
        not_written=training_settings(spec, target),
    )


class _Weights:
    """The model's tensors under the family's names, in the types they go out in."""

    def __init__(self, model: Decoder, family: Family, origin: Origin, dtype: str | None) -> None:
        """Check that nothing of the model would stay behind; dtype None takes the origin's types."""
        self.state = model.state_dict()
        self.pieces = {piece.name: piece for piece in pieces(model.spec, family)}
        left = not_covered(list(self.pieces.values()), self.state, [name for name, _ in model.named_parameters()])
        if left:
            raise FamilyError(f"{family.name} has no place for {len(left)} parameters: {shown(left)}")
        as_before = dtype is None and origin.family == family.name and origin.dtype in TYPES
        self.as_before, self.before = as_before, origin.other_dtypes if as_before else {}
        self.dtype = dtype or (origin.dtype if as_before else "F32")
        self.unbiased = model.spec.moe is not None and model.spec.moe.router.selection_bias == "none"
        self.entries = [Entry(piece.name, piece.shape, self._type(piece.name)) for piece in self.pieces.values()]
        self.type_of = {entry.name: TYPES[entry.dtype] for entry in self.entries}
        self.rounded: set[str] = set()

    def _type(self, name: str) -> str:
        usual = "F32" if name.endswith(BIAS) and not self.as_before else self.dtype
        found = self.before.get(name, usual)
        return found if found in TYPES else "F32"

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is written."""
        piece = self.pieces[name]
        part = piece.part(self.state[piece.ours])
        if name.endswith(BIAS) and self.unbiased:
            part = torch.zeros_like(part)  # a bias that the router does not use
        tensor = part.to(self.type_of[name]).contiguous()
        if tensor.dtype != part.dtype and not torch.equal(tensor.to(part.dtype), part):
            if part.isfinite().all() and not tensor.isfinite().all():
                raise FamilyError(f"{name} has numbers beyond the range of {tensor.dtype}; give --dtype fp32")
            self.rounded.add(name)
        return tensor

    def content(self, name: str) -> memoryview:
        """Its bytes."""
        return _bits(self.tensor(name)).numpy().data


def _config(model: Decoder, family: Family, origin: Origin, tokenizer: Tokenizer) -> Table:
    """config.json; token ids as in the original, else the end token we know."""
    table: Table = {"bos_token_id": None, "eos_token_id": tokenizer.end_id, "pad_token_id": None, "use_cache": True}
    if origin.family:
        table |= {key: origin.config[key] for key in PASSED_ON if key in origin.config}
    return family.write(model.spec) | table


def _context(run: Path, origin: Origin) -> int:
    """The positions an imported model was made for, or the context a run was trained with."""
    if origin.family:
        return int(FAMILIES[origin.family].settings(origin.config).integer("max_position_embeddings"))
    for root in (run, run.parent.parent):
        if RunFolder(root).recipe.exists():
            return RunFolder(root).load_recipe().train.length
    return CONTEXT


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, origin: Origin) -> None:
    """tokenizer.json, and enough beside it for AutoTokenizer."""
    library = tokenizer.library()
    (folder / "tokenizer.json").write_text(library.to_str(pretty=False), encoding="utf-8")
    for name, text in origin.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if "tokenizer_config.json" not in origin.files:
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if tokenizer.end_id is not None:
            config["eos_token"] = library.id_to_token(tokenizer.end_id)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _verify(folder: Path, weights: _Weights) -> None:
    """Read back and compare every tensor; raises CheckpointError when the disk lies."""
    stored = stored_tensors(folder)
    wrong: list[str] = sorted({entry.name for entry in weights.entries} ^ stored.keys())
    for file in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(file, framework="pt") as opened:
            here = [name for name, tensor in stored.items() if tensor.file == file]
            wrong += [name for name in here if not _same(opened.get_tensor(name), weights.tensor(name))]
    if wrong:
        raise CheckpointError(f"{folder} does not read back as written ({shown(wrong, 3)}); check the disk")


def _same(left: Tensor, right: Tensor) -> bool:
    """Equal type, shape and bits."""
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(_bits(left), _bits(right))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
