"""Let Triton's interpreter run beside numpy 2.4 and later, which refuse what it does to read a loop's bound.

Triton 3.6 takes int() of an array of one element, which numpy 2.4 allows for arrays without dimensions only. Only tests
and dry runs without a GPU come here.
"""

from typing import Any


def repair() -> None:
    """Read loop bounds in a way that every numpy takes."""
    from triton.runtime import interpreter

    scope = interpreter._LangPatchScope
    plain = scope.set_attr
    if getattr(plain, "repaired", False):
        return

    def set_attr(self: Any, owner: Any, name: str, value: Any) -> None:
        plain(self, owner, name, (lambda tensor: int(tensor.handle.data.item())) if name == "__index__" else value)

    set_attr.repaired = True  # type: ignore[attr-defined]
    scope.set_attr = set_attr
