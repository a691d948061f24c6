"""Let Triton's interpreter run beside numpy 2.4 and later, which refuse what it does to read a loop's bound; and round.

Triton 3.6 takes int() of an array of one element, which numpy 2.4 allows for arrays without dimensions only. Its
conversion of float32 to 8 bits loses the carry where a number rounds up to the next power of two (0.99 becomes 0.5), so
torch's is used. Only tests and dry runs without a GPU come here.
"""

from typing import Any

import torch


def repair() -> None:
    """Read loop bounds in a way that every numpy takes, and convert to 8 bits as torch does."""
    from triton.runtime import interpreter

    scope = interpreter._LangPatchScope
    plain, convert = scope.set_attr, interpreter._convert_float
    if getattr(plain, "repaired", False):
        return

    def set_attr(self: Any, owner: Any, name: str, value: Any) -> None:
        plain(self, owner, name, (lambda tensor: int(tensor.handle.data.item())) if name == "__index__" else value)

    def convert_float(numbers: Any, before: Any, after: Any, rounding: Any) -> Any:
        if (before.name, after.name) != ("fp32", "fp8e4nv"):
            return convert(numbers, before, after, rounding)
        return torch.tensor(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    set_attr.repaired = True  # type: ignore[attr-defined]
    scope.set_attr, interpreter._convert_float = set_attr, convert_float
