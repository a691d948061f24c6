"""Small layers for the tests of `place`."""

from typing import Any

import numpy as np

from moestro.cluster.links import exception, links_of
from moestro.cluster.topology import Cluster, DeviceSpec, LevelSpec
from moestro.place.cost import Layer, contiguous

DEVICE = DeviceSpec(name="D", memory_gib=80, memory_gb_per_s=1000, peak_tflops={"bf16": 100})


def park(hosts: int, per_host: int, card: float = 10.0, slow: float = 0.0) -> Cluster:
    """Hosts with ports of 100 GB/s and one card each; the last one's card may be slower."""
    levels = (
        LevelSpec(name="host", fan_out=per_host, gb_per_s=100),
        LevelSpec(name="net", fan_out=hosts, gb_per_s=card, sharing=per_host),
    )
    slower = (exception("net", hosts - 1, gb_per_s=slow),) if slow else ()
    return Cluster(name="park", device=DEVICE, network=levels, exception=slower)


def layer(cluster: Cluster, token_SE: np.ndarray, slots: int, **values: Any) -> Layer:
    """10 kB a token, 1 M tokens/s, contiguous."""
    links = links_of(cluster)
    slot_G = np.full(links.devices, slots)
    costs = {"token_bytes": 1e4, "tokens_per_s_G": np.full(links.devices, 1e6)}
    held_EG = contiguous(token_SE.shape[1], slot_G)
    return Layer(**{"links": links, "token_SE": token_SE, "slot_G": slot_G, "held_EG": held_EG, **costs, **values})


def skewed(sources: int, experts: int, seed: int = 0, slope: float = 1.0) -> np.ndarray:
    """Counts drawn from a Zipf popularity."""
    rng = np.random.default_rng(seed)
    share_E = rng.permutation(np.arange(1, experts + 1.0) ** -slope)
    return rng.multinomial(4096, share_E / share_E.sum(), size=sources).astype(float)
