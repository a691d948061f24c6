"""Recipes and specs: TOML in, checked frozen dataclasses out.

    recipe.toml + ["train.steps=30", ...]  ->  read_toml -> with_overrides -> build(Recipe, table)

Types and unknown keys are checked by pydantic, bounds by each dataclass's own `__post_init__`. Whatever is wrong
comes back as one ConfigError that names the key, its value, what is allowed and, for an unknown key, the nearest one.
"""

import dataclasses
import difflib
import functools
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any, TypeVar, cast

import tomli_w
from pydantic import ConfigDict, TypeAdapter, ValidationError

from moestro.core.errors import ConfigError
from moestro.core.files import write_text

Table = dict[str, Any]
Spec = TypeVar("Spec")


def read_toml(path: Path) -> Table:
    """Parse a TOML file; raises ConfigError with the line when it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give the path of a TOML file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def with_overrides(table: Table, overrides: Sequence[str]) -> Table:
    """Apply `key.path=value` settings, values as in TOML; a bare word counts as a string.

    returns  a new table; the old one is unchanged
    raises   ConfigError for a setting without `=` or one that goes through a value that is not a table
    """
    merged = _copy(table)
    for setting in overrides:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"'{setting}' is not a setting; write key=value, for example train.steps=30")
        *folders, last = name.split(".")
        place = merged
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{name} cannot be set: {folder} is a value, not a table")
        place[last] = parse_value(text)
    return merged


def parse_value(text: str) -> Any:
    """'30' -> 30, 'true' -> True, '[1, 2]' -> [1, 2]; else, and for times like 10:20:30, the string itself."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if isinstance(value, date | time) else value


def build(spec_type: type[Spec], table: Mapping[str, Any], where: str = "") -> Spec:
    """Make a checked dataclass from a table.

    where   what the table is, for the message, for example the recipe's path
    raises  ConfigError naming every wrong key
    """
    try:
        built: Spec = _adapter(cast(Any, spec_type)).validate_python(table)
        return built
    except ValidationError as error:
        problems = "; ".join(_sentence(spec_type, problem) for problem in error.errors())
        raise ConfigError(f"{where}: {problems}" if where else problems) from error


@functools.cache
def _adapter(spec_type: Any) -> TypeAdapter[Any]:
    """Making one takes longer than using it."""
    return TypeAdapter(spec_type)


STRICT = ConfigDict(extra="forbid")
"""Give it to every dataclass as `__pydantic_config__`, so that an unknown key is an error."""


def to_table(spec: Any) -> Table:
    """The inverse of `build`: plain tables, values that are None left out (TOML has no null)."""
    plain = _plain(dataclasses.asdict(spec))
    assert isinstance(plain, dict)
    return plain


def save_toml(path: Path, spec: Any) -> None:
    """Write a dataclass as TOML, whole or not at all."""
    write_text(path, tomli_w.dumps(to_table(spec)))


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items() if item is not None}
        case list() | tuple():
            return [_plain(item) for item in value]
        case Path():
            return str(value)
    return value


def _copy(table: Mapping[str, Any]) -> Table:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in table.items()}


def _sentence(spec_type: type, problem: Mapping[str, Any]) -> str:
    """One pydantic problem in our words."""
    path = [part for part in problem["loc"] if isinstance(part, str) and not part.startswith(("function-", "literal["))]
    name = ".".join(path)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown_key(spec_type, path)
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{name} is missing; set it in the recipe or as {name}=VALUE"
    wanted = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{name} is {problem['input']!r}; it must be {wanted}"


def _unknown_key(spec_type: type, path: Sequence[str]) -> str:
    known = list(all_keys(spec_type))
    name = ".".join(path)
    beside = [key for key in known if key.rpartition(".")[0] == name.rpartition(".")[0]]
    near = difflib.get_close_matches(name, known, n=1) or [key for key in known if key.rpartition(".")[2] == path[-1]]
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(beside) or ', '.join(known)}"
    return f"{name} is not a known key; {hint}"


def all_keys(spec_type: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key a recipe of this type may have."""
    hints = typing.get_type_hints(spec_type)
    for field in dataclasses.fields(spec_type):
        if field.name.startswith("_"):
            continue
        name = f"{prefix}{field.name}"
        nested = _dataclass_in(hints[field.name])
        if nested is None:
            yield name
        else:
            yield from all_keys(nested, f"{name}.")


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass in `Spec` or `Spec | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)
