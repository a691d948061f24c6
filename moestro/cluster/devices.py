"""What is publicly known about accelerators, by family: for rows and clusters that name a device and little else.

find_device("GB200-NVL72") -> DeviceSpec of family GB200, or None
"""

import re
import tomllib
from functools import cache
from importlib.resources import files

from moestro.cluster.topology import DeviceSpec
from moestro.core.config import build


@cache
def known_devices() -> dict[str, tuple[str, DeviceSpec]]:
    """Family -> (pattern, device), in the order of devices.toml: the first pattern that matches counts."""
    table = tomllib.loads(files("moestro.cluster").joinpath("devices.toml").read_text(encoding="utf-8"))
    known = {}
    for family, entry in table.items():
        values = {key: value for key, value in entry.items() if key != "match"}
        known[family] = (entry["match"], build(DeviceSpec, {"name": family, "family": family, **values}))
    return known


def find_device(*names: str) -> DeviceSpec | None:
    """The known device that one of these names means, the first name first; None for an unknown one."""
    for name in names:
        for pattern, device in known_devices().values():
            if name and re.search(pattern, name):
                return device
    return None
