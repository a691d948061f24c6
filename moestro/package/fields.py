"""Take checked values out of parsed JSON, so that a descriptor or manifest is either right or refused by name.

fields = Fields(table, "descriptor"); fields.text("model_id"); ...; fields.finish()   # unknown keys fail here
"""

import re
from typing import Any

from moestro.core.errors import FormatError, LimitExceeded

HEX32 = re.compile(r"[0-9a-f]{64}")
DATE = re.compile(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])T([01]\d|2[0-3]):[0-5]\d:[0-5]\dZ")
"""RFC 3339 in UTC, whole seconds."""


class Fields:
    """One JSON object."""

    def __init__(self, table: Any, where: str) -> None:
        if not isinstance(table, dict):
            raise FormatError(f"{where} is not a JSON object")
        self.table, self.where = table, where
        self._taken: set[str] = set()

    def has(self, key: str) -> bool:
        """True where the key is present."""
        return key in self.table

    def any(self, key: str) -> Any:
        """Any value; the key must be there."""
        self._taken.add(key)
        if key not in self.table:
            raise FormatError(f"{self.where} lacks {key}")
        return self.table[key]

    def text(self, key: str, longest: int = 4096) -> str:
        """Text of at most so many characters."""
        value = self.any(key)
        if not isinstance(value, str) or len(value) > longest:
            raise FormatError(
                f"{self.where}: {key} is {str(value)[:40]!r}; it must be text of at most {longest} characters"
            )
        return value

    def whole(self, key: str, low: int, high: int) -> int:
        """A whole number in low..high."""
        value = self.any(key)
        if type(value) is not int or not low <= value <= high:
            raise FormatError(f"{self.where}: {key} is {str(value)[:40]}; it must be a whole number in {low}..{high}")
        return value

    def hex32(self, key: str) -> str:
        """64 lower-case hexadecimal digits."""
        value = self.any(key)
        if not isinstance(value, str) or not HEX32.fullmatch(value):
            raise FormatError(
                f"{self.where}: {key} is {str(value)[:40]!r}; it must be 64 lower-case hexadecimal digits"
            )
        return value

    def date(self, key: str) -> str:
        """An RFC 3339 time in UTC."""
        value = self.any(key)
        if not isinstance(value, str) or not DATE.fullmatch(value):
            raise FormatError(f"{self.where}: {key} is {str(value)[:40]!r}; it must be like 2026-11-21T00:00:00Z")
        return value

    def items(self, key: str, most: int) -> list[Any]:
        """A list of at most so many items."""
        value = self.any(key)
        if not isinstance(value, list):
            raise FormatError(f"{self.where}: {key} is not a list")
        if len(value) > most:
            raise LimitExceeded(f"{self.where}: {key} has {len(value)} items; at most {most} are allowed")
        return value

    def finish(self) -> dict[str, Any]:
        """Refuse keys nobody took, except those that begin with x_, which are returned (R-8.2.2-3)."""
        rest = {key: value for key, value in self.table.items() if key not in self._taken}
        unknown = [key for key in rest if not key.startswith("x_")]
        if unknown:
            raise FormatError(f"{self.where} has the unknown key {unknown[0][:40]!r}; a newer moestro may know it")
        return rest
