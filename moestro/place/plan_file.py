"""placement.toml: where every expert of every layer lives, and who is served by which replica.

    save_placements / read_placements      one Placement per sparse layer, in order

Shares are written in millionths of a source group's tokens, so that they sum exactly and read back the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from moestro.core.config import read_toml
from moestro.core.errors import PlacementError
from moestro.core.files import write_text
from moestro.place.cost import Placement

FORMAT = "moestro-placement-1"
PARTS = 1_000_000


def save_placements(path: Path, placements: Sequence[Placement]) -> None:
    """Write whole or not at all."""
    first = placements[0]
    table = {
        "format": FORMAT,
        "devices": first.devices,
        "experts": len(first.device_EP),
        "group_of_source": first.group_S.tolist(),
        "layer": [_layer_table(placement) for placement in placements],
    }
    write_text(path, tomli_w.dumps(table))


def _layer_table(placement: Placement) -> dict[str, Any]:
    count_E = (placement.device_EP >= 0).sum(axis=1)
    holders = [row[row >= 0].tolist() for row in placement.device_EP]
    shares = [
        [_parts(share_P[:count]) if count > 1 else [PARTS] for share_P, count in zip(share_EP, count_E, strict=True)]
        for share_EP in placement.share_AEP
    ]
    return {"holders": holders, "shares": shares}


def _parts(share_P: NDArray[np.float64]) -> list[int]:
    """Millionths that sum exactly, the rounding on the largest."""
    part_P = np.rint(share_P * PARTS).astype(np.int64)
    part_P[np.argmax(part_P)] += PARTS - part_P.sum()
    return [int(part) for part in part_P]


def read_placements(path: Path, *, num_layers: int = 0, num_experts: int = 0, devices: int = 0) -> list[Placement]:
    """Placements of all layers.

    num_layers, num_experts, devices   what is expected; 0 takes what is there
    raises   PlacementError for another format, model or cluster, or shares without holders
    """
    table = read_toml(path)
    if table.get("format") != FORMAT:
        raise PlacementError(f"{path} is not a placement ({table.get('format')!r}, expected {FORMAT!r})")
    for name, wanted, found in (
        ("layers", num_layers, len(table["layer"])),
        ("experts", num_experts, table["experts"]),
        ("devices", devices, table["devices"]),
    ):
        if wanted and wanted != found:
            raise PlacementError(f"{path} has {found} {name}, {wanted} are needed: it is of another model or cluster")
    group_S = np.array(table["group_of_source"], np.int64)
    return [_placement(path, layer, group_S, int(table["devices"])) for layer in table["layer"]]


def _placement(path: Path, layer: dict[str, Any], group_S: NDArray[np.int64], devices: int) -> Placement:
    holders, shares = layer["holders"], layer["shares"]
    most = max(map(len, holders))
    device_EP = np.full((len(holders), most), -1, np.int64)
    share_AEP = np.zeros((len(shares), len(holders), most))
    for expert, held in enumerate(holders):
        if any(not 0 <= device < devices for device in held):
            raise PlacementError(f"{path}: expert {expert} is on device {max(held)}; there are 0..{devices - 1}")
        device_EP[expert, : len(held)] = held
        for group, share_E in enumerate(shares):
            if len(share_E[expert]) != len(held) or sum(share_E[expert]) != PARTS:
                raise PlacementError(f"{path}: shares of expert {expert} do not sum to {PARTS} over its holders")
            share_AEP[group, expert, : len(held)] = np.array(share_E[expert]) / PARTS
    return Placement(device_EP=device_EP, share_AEP=share_AEP, group_S=group_S, devices=devices)
