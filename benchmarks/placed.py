"""What a placement's exchange takes over throttled links, beside what the cost model says.

    python benchmarks/placed.py [--repeats 5] [--out FILE]

One dispatch of a layer (16 experts, 2048 tokens a rank, top-2, 2 KB a token, Zipf loads, 6 slots a rank) on networks
of lab.py, for experts in a row, EPLB's plans, a greedy spread over hosts, and our solver's answer. Rows go through the
dispatcher's exchange, and in turn through torch's all_to_all_single. Then even exchanges of the probe's kind, between
two hosts of 1, 2 and 4 ranks: what the number of connections over a link does.

Prints tables, then one JSON line. Needs root and iproute2, see lab.py.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from exchange import show, turns_s
from lab import Host, Lab, skip_without_lab
from place import eplb_placement, near_placement
from streams import TOKENS, drawn, zipf

from moestro.dist.layout import Layout
from moestro.dist.mesh import Mesh
from moestro.place.cost import Layer, Placement, contiguous, exchange_bytes
from moestro.place.solve import solve, split, spread_start
from moestro.train.device import environment

NETWORKS = {
    "2+2, 200/200": [Host(2, 1000, 200), Host(2, 1000, 200)],
    "2+1+1, 200/100/25": [Host(2, 1000, 200), Host(1, 1000, 100), Host(1, 1000, 25)],
    "4 x 2, 200/200/200/50": [Host(2, 800, rate) for rate in (200, 200, 200, 50)],
}
TOKEN_BYTES, RANK_TOKENS, EXPERTS, SLOTS = 2048, 2048, 16, 6
Row = dict[str, Any]


def layer_in(lab: Lab) -> Layer:
    """The layer with its experts in a row."""
    token_SE = np.round(drawn(zipf(EXPERTS, 3)[None], lab.ranks, 2, 3)[0] * RANK_TOKENS / TOKENS)
    slot_G = np.full(lab.ranks, SLOTS)
    return Layer(
        links=lab.links(),
        token_SE=token_SE,
        tokens_per_s_G=np.full(lab.ranks, 1e9),
        slot_G=slot_G,
        token_bytes=TOKEN_BYTES,
        held_EG=contiguous(EXPERTS, slot_G),
    )


def placements(layer: Layer) -> dict[str, Placement]:
    """Whom we compare."""
    even = eplb_placement(layer)
    found = {"in a row": split(layer, layer.held_EG), "EPLB global, even": even}
    found["EPLB global, near"] = near_placement(layer, even.held_EG)
    if len(set(np.bincount(layer.links.host_G))) == 1:
        found["EPLB by host, even"] = eplb_placement(layer, hierarchical=True)
    found["host spread, near"] = near_placement(layer, spread_start(layer))
    return found | {"ours": solve(layer, effort=5).placement}


def exchanges_on_rank(rows_CRR: NDArray[np.int64], repeats: int) -> list[list[list[float]]]:
    """Seconds of every case, turn by turn: the dispatcher's exchange, and gloo's."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    axis = Mesh(Layout(dp_shard=ranks, ep=ranks), torch.device("cpu"))["ep"]
    found = []
    for rows_RR in rows_CRR:
        send, receive = rows_RR[rank].tolist(), rows_RR[:, rank].tolist()
        x_ND, y_ND = (torch.randn(sum(rows), TOKEN_BYTES // 4) for rows in (send, receive))

        def ours(send=send, receive=receive, x_ND=x_ND) -> None:  # type: ignore[no-untyped-def]
            axis.begin_swap(x_ND, send, receive).wait()

        def raw(send=send, receive=receive, x_ND=x_ND, y_ND=y_ND) -> None:  # type: ignore[no-untyped-def]
            dist.all_to_all_single(y_ND, x_ND, receive, send)

        found.append(turns_s([ours, raw], repeats))
    return found


def compare(lab: Lab, rows_CRR: NDArray[np.int64], names: list[str], model_s: list[float], repeats: int) -> list[Row]:
    """Measured beside modelled."""
    with lab:
        measured = lab.call(exchanges_on_rank, rows_CRR, repeats, timeout_s=500)[0]
    rows = []
    for name, seconds, (ours, raw) in zip(names, model_s, measured, strict=True):
        median = float(np.median(ours))
        rows.append({"case": name, "model_s": seconds, "measured_s": median, "off": median / seconds - 1})
        rows[-1] |= {"least_s": min(ours), "most_s": max(ours), "all_to_all_single_s": float(np.median(raw))}
        show(rows[-1])
    return rows


def dispatches(hosts: list[Host], repeats: int) -> list[Row]:
    """All placements on one network."""
    lab = Lab(hosts)
    layer = layer_in(lab)
    found = placements(layer)
    rows_CRR = np.array([np.round(placement.flow_SG(layer.token_SE)) for placement in found.values()]).astype(np.int64)
    rate_L = layer.links.bytes_per_s_L
    model_s = [float((exchange_bytes(layer, placement) / rate_L).max()) for placement in found.values()]
    return compare(lab, rows_CRR, list(found), model_s, repeats)


def even_exchanges(ranks: int, repeats: int) -> list[Row]:
    """Everybody to everybody on the other of two hosts."""
    lab = Lab([Host(ranks, 1000, 100)] * 2)
    host_R = np.array(lab.host_of)
    away_RR = (host_R[:, None] != host_R).astype(np.int64)
    sizes = (0.5e6, 2e6, 6e6)
    rows_CRR = np.array([away_RR * int(size / ranks**2 / TOKEN_BYTES) for size in sizes])
    links = lab.links()
    model_s = [float((links.sums(rows_RR * float(TOKEN_BYTES)) / links.bytes_per_s_L).max()) for rows_RR in rows_CRR]
    names = [f"{size / 1e6:g} MB from each host in {ranks**2} connections" for size in sizes]
    return compare(lab, rows_CRR, names, model_s, repeats)


def main() -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    skip_without_lab()
    torch.set_num_threads(1)
    result: Row = {"bench": "placed", "date": time.strftime("%Y-%m-%d"), **environment(torch.device("cpu"))}
    for name, hosts in NETWORKS.items():
        print(f"-- {name}")
        result[name] = dispatches(hosts, args.repeats)
    for ranks in (1, 2, 4):
        print(f"-- even, 2 hosts x {ranks}")
        result[f"even, 2 x {ranks}"] = even_exchanges(ranks, args.repeats)
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
