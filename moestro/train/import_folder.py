"""Other people's models in: a Hugging Face folder becomes a model folder of ours.

    config.json -> spec -> Decoder <- tensors, one by one -> save_model

Every tensor of the folder is used and every parameter is filled, or nothing is made: what stands in the way is listed
from headers before any weight is read. Which tensor goes where is `nn/families`; transformers is not needed.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moestro.core.config import save_toml
from moestro.core.errors import DataError, FamilyError
from moestro.core.specs import ModelSpec
from moestro.core.tensors import ITEM_BYTES, Stored, shown, stored_tensors
from moestro.core.tokens import Tokenizer, load_tokenizer
from moestro.core.units import count_text
from moestro.nn.decoder import Decoder, parameter_counts
from moestro.nn.families.family import Family
from moestro.nn.families.known import FAMILIES
from moestro.nn.families.names import Piece, differences, not_covered, pieces, stacked_experts
from moestro.nn.families.settings import Table
from moestro.nn.families.upcycle import Upcycle, copied_to_experts, start_routers, upcycled
from moestro.train.checkpoint import save_model
from moestro.train.origin import Origin, check_free
from moestro.train.recipe import DataSpec, OptimizerSpec, Recipe, TrainSpec

HEAD, EMBEDDING = "lm_head.weight", "embedding.weight"
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Texts that an import keeps for the next export."""
TUNING_LR = 1e-4
"""Learning rate of a written recipe: low, the model is trained already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """What came in."""

    family: str
    spec: ModelSpec
    numbers: int
    """Parameters, counted in numbers."""
    tensors: dict[str, int]
    """How many tensors were read of each type."""
    files: int
    parameters: int
    """Parameters, counted in tensors; all are filled."""
    left_out: list[str]
    rounded: list[str]
    """float64 tensors that float32 does not hold exactly."""
    own_state: list[str]
    """State of routers that has no counterpart there and is as in a new model."""
    drawn: int
    """Routers that upcycling drew at random."""

    def lines(self) -> list[str]:
        """For people."""
        total, types = sum(self.tensors.values()), ", ".join(self.tensors)
        experts = f", {self.spec.moe.num_experts} experts" if self.spec.moe else ""
        lines = [
            f"{self.family}: {self.spec.num_layers} layers{experts}, {count_text(self.numbers)} parameters",
            f"tensors read         {total} of {total} ({types}) from {self.files} file{'s' * (self.files > 1)}",
            f"parameters filled    {self.parameters} of {self.parameters}",
        ]
        if self.drawn:
            lines.append(f"drawn at random      {self.drawn} routers")
        if self.own_state:
            lines.append(f"as in a new model    router state: {', '.join(self.own_state)}")
        if self.rounded:
            lines.append(f"rounded to fp32      {shown(self.rounded)}")
        return lines + [f"left out on request  {shown(self.left_out)}"] * bool(self.left_out)


@dataclass(frozen=True, slots=True)
class _Source:
    """A folder whose settings and headers have been read, and fit."""

    folder: Path
    family: Family
    spec: ModelSpec
    config: Table
    stored: dict[str, Stored]
    pieces: list[Piece]
    left_out: list[str]


def import_folder(
    folder: Path,
    out: Path,
    *,
    leave_out: Sequence[str] = (),
    tokenizer: Path | None = None,
    upcycle: Upcycle | None = None,
    recipe: Path | None = None,
) -> ImportReport:
    """Make a model folder of a Hugging Face folder; raises FamilyError and writes nothing where anything does not fit.

    leave_out  patterns of tensors and settings that may stay behind; each must match something
    tokenizer  a tokenizer.json to take instead of the folder's
    upcycle    how to make experts of a dense model
    recipe     where to write a recipe that goes on training the model
    """
    check_free(out)
    if recipe and recipe.exists():
        raise FamilyError(f"--recipe {recipe} exists already; nothing is overwritten: choose another file")
    source = _open(folder, tuple(leave_out))
    tokens = _tokenizer(source, tokenizer)
    model = Decoder(upcycled(source.spec, upcycle) if upcycle else source.spec)
    plan = list(copied_to_experts(source.pieces)) if upcycle else source.pieces
    rounded = _fill(model, plan, source)
    _check_tied(source, model)
    if upcycle:
        start_routers(model, upcycle)
    origin = _origin(source, own_tokens=tokenizer is None, upcycle=upcycle is not None)
    save_model(out, model, tokens, origin=origin.table())
    if recipe:
        _write_recipe(recipe, model.spec, out)
    return _report(source, model, plan, rounded)


def _report(source: _Source, model: Decoder, plan: Sequence[Piece], rounded: list[str]) -> ImportReport:
    parameters, filled = [name for name, _ in model.named_parameters()], {piece.ours for piece in plan}
    state = {name.partition(".router.")[2] for name in model.state_dict().keys() - filled - set(parameters)}
    return ImportReport(
        family=source.family.name,
        spec=model.spec,
        numbers=parameter_counts(model, model.spec)[0],
        tensors=dict(Counter(stored.dtype for stored in source.stored.values())),
        files=len({stored.file for stored in source.stored.values()}),
        parameters=len(filled.intersection(parameters)),
        left_out=source.left_out,
        rounded=rounded,
        own_state=sorted({name.partition(".")[0] for name in state}),
        drawn=len(set(parameters) - filled),
    )


def read_config(folder: Path) -> tuple[Family, Table]:
    """The family and the config.json of a folder."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise FamilyError(f"{folder} is not a folder; download the model and give the folder that has its config.json")
    if not path.is_file():
        own = (folder / "model.json").is_file()
        why = "it is a moestro model already" if own else "it must be a Hugging Face model's folder"
        raise FamilyError(f"{folder} has no config.json; {why}")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        kind = table["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FamilyError(f"{path} is not a model's config.json ({error!r}); download it again") from error
    if kind not in FAMILIES:
        raise FamilyError(f"{path}: model_type is {kind!r}; moestro reads {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind], table


def _open(folder: Path, leave_out: tuple[str, ...]) -> _Source:
    """Settings, headers and names, all checked; no weight is read."""
    family, table = read_config(folder)
    settings = family.settings(table, leave_out)
    try:
        spec = family.read(settings)
    except FamilyError as error:
        raise FamilyError(f"{folder / 'config.json'}: {error}") from error
    found = stored_tensors(folder)
    dropped = [name for name in found if any(fnmatchcase(name, pattern) for pattern in leave_out)]
    stored = {name: tensor for name, tensor in found.items() if name not in set(dropped)}
    names = dropped + [text.partition(" ")[0] for text in settings.left_out]
    idle = [pattern for pattern in leave_out if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        raise FamilyError(
            f"--leave-out {shown(idle)} matches no tensor and no setting of {folder} that may be left out; take it away"
        )
    expected = list(pieces(spec, family, stacked_experts(stored)))
    _check_tensors(folder, family, spec, expected, stored)
    return _Source(folder, family, spec, table, stored, expected, settings.left_out + sorted(dropped))


def _check_tensors(
    folder: Path, family: Family, spec: ModelSpec, expected: Sequence[Piece], stored: Mapping[str, Stored]
) -> None:
    """Names, shapes and types as the config promises, or one error that lists what is not."""
    scales = sorted(name for name in stored if name.endswith("weight_scale_inv"))
    if scales:
        raise FamilyError(
            f"{folder} holds fp8 weights with scales ({shown(scales, 2)}); convert them to bf16 first, for DeepSeek-V3 "
            "with the fp8_cast_bf16.py of its repository"
        )
    found = {name: tensor.shape for name, tensor in stored.items()}
    if spec.tied_head and found.get(HEAD) == (spec.vocab_size, spec.width):
        del found[HEAD]  # a second copy of the embedding, compared with it later
    wrong = differences(expected, found)
    wrong += [f"{name} has type {t.dtype}" for name, t in sorted(stored.items()) if t.dtype not in ITEM_BYTES]
    if wrong:
        unknown = [text.partition(" ")[0] for text in wrong if text.endswith(" is unknown")]
        hint = _hint(unknown, spec.num_layers if family.kind == "mla" else None)
        raise FamilyError(f"{folder} does not fit {family.name}, {len(wrong)} tensors differ: {shown(wrong)}{hint}")


def _hint(unknown: Sequence[str], num_layers: int | None) -> str:
    """What to do about tensors that other programs leave out silently; num_layers where a family has more of them."""
    numbers = {int(found[1]) for name in unknown if (found := re.match(r"model\.layers\.(\d+)\.", name))}
    beyond = sorted(number for number in numbers if num_layers is not None and number >= num_layers)
    hints = []
    if beyond:
        options = " ".join(f"--leave-out 'model.layers.{number}.*'" for number in beyond)
        hints.append(
            f"layers from {num_layers} on predict further tokens and moestro has none: to go without, {options}"
        )
    if any(name.endswith(".rotary_emb.inv_freq") for name in unknown):
        hints.append("inv_freq is computed from config.json here: --leave-out '*.rotary_emb.inv_freq'")
    return "".join(f"; {hint}" for hint in hints)


def _tokenizer(source: _Source, other: Path | None) -> Tokenizer:
    """The folder's tokenizer or the one named; its ids must be rows of the embedding."""
    path = other or source.folder / "tokenizer.json"
    if not path.is_file():
        raise FamilyError(f"{path} does not exist; give a tokenizer.json with --tokenizer PATH")
    try:
        tokens = load_tokenizer(path)
    except DataError as error:
        raise FamilyError(f"{path} is not a tokenizer.json; give one with --tokenizer PATH ({error})") from error
    if tokens.vocab_size > source.spec.vocab_size:
        raise FamilyError(
            f"{path} has {tokens.vocab_size} entries but vocab_size is {source.spec.vocab_size}; "
            "give the model's own with --tokenizer PATH"
        )
    return tokens


@torch.no_grad()
def _fill(model: Decoder, plan: Sequence[Piece], source: _Source) -> list[str]:
    """Read file by file, tensor by tensor, until all parameters are full; returns tensors that had to be rounded."""
    own, rounded = model.state_dict(), []
    wanted = [name for name, _ in model.named_parameters() if source.spec.moe or ".router." not in name]
    empty = not_covered(plan, own, wanted)
    if empty:
        raise FamilyError(f"{source.folder} leaves {len(empty)} parameters empty: {shown(empty)}; please report it")
    by_file: dict[Path, list[Piece]] = {}
    for piece in plan:
        by_file.setdefault(source.stored[piece.name].file, []).append(piece)
    for file, here in by_file.items():
        for piece, tensor in _read(file, here):
            piece.part(own[piece.ours]).copy_(tensor)
            if tensor.dtype == torch.float64 and not torch.equal(tensor.float().double(), tensor):
                rounded.append(piece.name)
    return rounded


def _read(file: Path, wanted: Sequence[Piece]) -> Iterator[tuple[Piece, Tensor]]:
    """One tensor in memory at a time."""
    try:
        with safe_open(file, framework="pt") as opened:
            for piece in wanted:
                yield piece, opened.get_tensor(piece.name)
    except (SafetensorError, OSError) as error:
        raise FamilyError(f"{file} cannot be read ({error}); download it again") from error


def _check_tied(source: _Source, model: Decoder) -> None:
    """A stored head of a tied model must be the embedding."""
    if not source.spec.tied_head or HEAD not in source.stored:
        return
    with safe_open(source.stored[HEAD].file, framework="pt") as opened:
        head_VD: Tensor = opened.get_tensor(HEAD)
    if not torch.equal(head_VD.float(), model.state_dict()[EMBEDDING]):
        raise FamilyError(
            f"{source.folder} has tie_word_embeddings true but {HEAD} differs from model.embed_tokens.weight; "
            "set tie_word_embeddings to false in config.json if the head is meant"
        )


def _origin(source: _Source, own_tokens: bool, upcycle: bool) -> Origin:
    """What to keep for an export; types only where the tensors are still the family's."""
    texts = COMPANIONS if own_tokens else COMPANIONS[-1:]
    found = {name: source.folder / name for name in texts if (source.folder / name).is_file()}
    dtypes = {name: tensor.dtype for name, tensor in source.stored.items()}
    numbers: Counter[str] = Counter()
    for tensor in source.stored.values():
        numbers[tensor.dtype] += torch.Size(tensor.shape).numel()
    most = "" if upcycle else numbers.most_common(1)[0][0]
    return Origin(
        family=source.family.name,
        dtype=most,
        other_dtypes={} if upcycle else {name: dtype for name, dtype in dtypes.items() if dtype != most},
        config=source.config,
        files={name: _text(path) for name, path in found.items()},
        left_out=source.left_out,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FamilyError(f"{path} is not a text in UTF-8 ({error}); download it again, or take it away") from error


def _write_recipe(path: Path, spec: ModelSpec, model: Path) -> None:
    """A recipe that goes on training the model, on the default text."""
    recipe = Recipe(
        model=spec,
        train=TrainSpec(steps=1000, init=str(model)),
        out=Path("runs") / model.name,
        data=DataSpec(tokenizer=str(model / "tokenizer.json")),
        optimizer=OptimizerSpec(lr=TUNING_LR),
    )
    save_toml(path, recipe)
