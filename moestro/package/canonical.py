"""Canonical JSON: one spelling per value, so that bytes can be hashed and signed.

    dumps(value) -> bytes        loads(bytes) -> value, or FormatError

RFC 8785 restricted further: no floats, whole numbers below 2^53, ASCII keys, depth at most 32 (specification 0.3). A
reader writes what it parsed once more and compares: duplicate keys, other spellings and trailing bytes all fail there.
"""

import itertools
import json
from typing import Any, NoReturn

from moestro.core.errors import FormatError, LimitExceeded
from moestro.package.limits import MAX_JSON_DEPTH, MAX_JSON_INT


def dumps(value: Any) -> bytes:
    """The canonical spelling; the value must hold only what canonical JSON can."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def loads(data: bytes, limit_bytes: int, where: str) -> Any:
    """Parse canonical JSON.

    limit_bytes   longest input
    where         what the bytes are, for messages
    raises        FormatError where the spelling is not the canonical one, LimitExceeded for too long or too deep
    """
    value = _parse(data, limit_bytes, where, allow_float=False)
    again = _spelled(value, where)
    if again != data:
        place = next(
            (i for i, (a, b) in enumerate(zip(again, data, strict=False)) if a != b), min(len(again), len(data))
        )
        raise FormatError("the JSON is not spelled canonically (RFC 8785)", offset=place, where=where)
    return value


def loads_loosely(data: bytes, limit_bytes: int, where: str) -> Any:
    """Parse ordinary JSON (RFC 8259) within our limits; floats are allowed, duplicate keys are not."""
    return _parse(data, limit_bytes, where, allow_float=True)


def _parse(data: bytes, limit_bytes: int, where: str, allow_float: bool) -> Any:
    if len(data) > limit_bytes:
        raise LimitExceeded(f"{where}: {len(data)} bytes of JSON; at most {limit_bytes} are allowed")

    def refuse(text: str) -> NoReturn:
        raise FormatError(f"the JSON holds {text[:20]}; only whole numbers below 2^53 are allowed", where=where)

    def whole(text: str) -> int:
        if len(text) > 17 or abs(number := int(text)) > MAX_JSON_INT:
            refuse(text)
        return number

    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_float=float if allow_float else refuse,
            parse_int=whole,
            parse_constant=refuse,
            object_pairs_hook=_unique_keys if allow_float else None,
        )
    except RecursionError as error:
        raise LimitExceeded(f"{where}: JSON nested deeper than {MAX_JSON_DEPTH}") from error
    except UnicodeDecodeError as error:
        raise FormatError("the JSON is not UTF-8", offset=error.start, where=where) from error
    except json.JSONDecodeError as error:
        raise FormatError(f"not JSON ({error.msg})", offset=error.pos, where=where) from error
    except _DuplicateKeyError as error:
        raise FormatError(f"the key {error.args[0]!r} occurs twice in one object", where=where) from error
    _check_depth(value, where, ascii_keys=not allow_float)
    if allow_float and b"\\u" in data:
        _spelled(value, where)
    return value


def _spelled(value: Any, where: str) -> bytes:
    """Canonical bytes; escapes can spell halves of characters, which nobody could write again."""
    try:
        return dumps(value)
    except (UnicodeEncodeError, ValueError) as error:
        raise FormatError("the JSON holds a lone surrogate", where=where) from error


class _DuplicateKeyError(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = sorted(name for name, _ in pairs)
        raise _DuplicateKeyError(next(a for a, b in itertools.pairwise(names) if a == b))
    return found


def _check_depth(value: Any, where: str, ascii_keys: bool) -> None:
    level, depth = [value] if isinstance(value, (dict, list)) else [], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise LimitExceeded(f"{where}: JSON nested deeper than {MAX_JSON_DEPTH}")
        if ascii_keys and not all(all(map(str.isascii, node)) for node in level if type(node) is dict):
            raise FormatError("a key of the JSON is not ASCII", where=where)
        below: list[Any] = []
        for node in level:
            below += [item for item in (node.values() if type(node) is dict else node) if type(item) in (dict, list)]
        level = below
