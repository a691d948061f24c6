"""EPLB's two policies, re-implemented from the description in its README (DeepSeek, 2025), as a baseline.

    global        replicate the experts with most load per replica, pack all replicas onto devices
    hierarchical  pack groups of experts onto hosts, replicate inside every host, pack onto the host's devices

Packing: heaviest first onto the least loaded pack that has room. Replicas of one
expert may land on one device, as there.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def replicate(load_E: NDArray[np.floating], slots: int) -> Ints:
    """Replica counts: one each, every further slot to the expert with most load per replica."""
    count_E = np.ones(len(load_E), np.int64)
    for _ in range(slots - len(load_E)):
        count_E[np.argmax(load_E / count_E)] += 1
    return count_E


def pack(weight_N: NDArray[np.floating], packs: int) -> Ints:
    """Which pack each item goes to, equally many in each."""
    room, load_P, used_P = len(weight_N) // packs, np.zeros(packs), np.zeros(packs, np.int64)
    pack_N = np.zeros(len(weight_N), np.int64)
    for item in np.argsort(-weight_N, kind="stable"):
        best = min((p for p in range(packs) if used_P[p] < room), key=lambda p: (load_P[p], p))
        pack_N[item] = best
        load_P[best] += weight_N[item]
        used_P[best] += 1
    return pack_N


def place_global(load_E: NDArray[np.floating], devices: int, slots_per_device: int) -> Ints:
    """copies_EG: how many copies of an expert each device holds."""
    count_E = replicate(load_E, devices * slots_per_device)
    expert_R = np.repeat(np.arange(len(load_E)), count_E)
    device_R = pack((load_E / count_E)[expert_R], devices)
    copies_EG = np.zeros((len(load_E), devices), np.int64)
    np.add.at(copies_EG, (expert_R, device_R), 1)
    return copies_EG


def place_hierarchical(load_E: NDArray[np.floating], hosts: int, per_host: int, slots_per_device: int) -> Ints:
    """The same for equal hosts, every expert a group of its own."""
    host_E = pack(np.asarray(load_E, float), hosts)
    copies_EG = np.zeros((len(load_E), hosts * per_host), np.int64)
    for host in range(hosts):
        mine = np.flatnonzero(host_E == host)
        copies_EG[mine, host * per_host : (host + 1) * per_host] = place_global(
            load_E[mine], per_host, slots_per_device
        )
    return copies_EG
