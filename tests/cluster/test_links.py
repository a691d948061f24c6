"""`cluster.links`: ways through the levels, on parks one can draw."""

import numpy as np
import pytest

from moestro.cluster.draw import draw
from moestro.cluster.links import exception, links_of
from moestro.cluster.topology import Cluster, DeviceSpec, ExceptionSpec, LevelSpec
from moestro.core.errors import ClusterError

DEVICE = DeviceSpec(name="D", memory_gib=80, memory_gb_per_s=1000, peak_tflops={"bf16": 100})


def park(*levels: LevelSpec, exceptions: tuple[ExceptionSpec, ...] = ()) -> Cluster:
    return Cluster(name="park", device=DEVICE, network=levels, exception=exceptions)


HOST = LevelSpec(name="host", fan_out=2, gb_per_s=300)
NET = LevelSpec(name="net", fan_out=2, gb_per_s=50, sharing=2)


def way(cluster: Cluster, source: int, to: int) -> list[str]:
    links = links_of(cluster)
    return [links.names[link] for link in links.route_GGR[source, to] if link >= 0]


def test_inside_a_host_only_ports_are_used() -> None:
    assert way(park(HOST, NET), 0, 1) == ["device0.out", "device1.in"]


def test_between_hosts_the_shared_cards_come_in() -> None:
    assert way(park(HOST, NET), 0, 3) == ["device0.out", "device3.in", "host0.out", "host1.in"]
    links = links_of(park(HOST, NET))
    assert links.bytes_per_s_L[links.names.index("host0.out")] == 50e9


def test_a_rail_hops_inside_the_host_first() -> None:
    rails = LevelSpec(name="net", fan_out=2, gb_per_s=12.5, rails=True)
    assert sorted(way(park(HOST, rails), 0, 3)) == ["card1.out", "card3.in", "device0.out", "device1.in"]
    assert sorted(way(park(HOST, rails), 0, 2)) == ["card0.out", "card2.in"]


def test_exceptions_slow_a_link_in_one_direction_and_shrink_a_host() -> None:
    slow = exception("net", 1, gb_per_s=10, gb_per_s_in=20)
    links = links_of(park(HOST, NET, exceptions=(slow, exception("net", 1, fan_out=1))))
    assert links.host_G.tolist() == [0, 0, 1]
    assert links.bytes_per_s_L[links.names.index("host1.out")] == 10e9
    assert links.bytes_per_s_L[links.names.index("host1.in")] == 20e9


def test_slow_devices_have_a_speed() -> None:
    links = links_of(park(HOST, NET, exceptions=(exception("net", 1, speed=0.5),)))
    assert links.speed_G.tolist() == [1, 1, 0.5, 0.5]


def test_sums_count_what_each_link_carries() -> None:
    links = links_of(park(HOST, NET))
    amount_GG = np.zeros((4, 4))
    amount_GG[0, 2], amount_GG[1, 0] = 5, 3
    carried = dict(zip(links.names, links.sums(amount_GG), strict=True))
    assert (carried["device0.out"], carried["device0.in"], carried["host0.out"], carried["host1.out"]) == (5, 3, 5, 0)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_rates_that_are_none_are_refused(rate: float) -> None:
    with pytest.raises(ClusterError, match="must be above 0"):
        LevelSpec(name="net", gb_per_s=rate)
    with pytest.raises(ClusterError, match="must be above 0"):
        exception("net", 0, gb_per_s=rate)


def test_too_few_devices_and_unknown_units_are_named() -> None:
    with pytest.raises(ClusterError, match="park has 4 devices, 9 are asked for"):
        links_of(park(HOST, NET), 9)
    with pytest.raises(ClusterError, match=r"names unit 7; there are 0\.\.1"):
        links_of(park(HOST, NET, exceptions=(exception("net", 7, gb_per_s=1),)))
    with pytest.raises(ClusterError, match="'rack'; the network's levels are host, net"):
        park(HOST, NET, exceptions=(exception("rack", 0, gb_per_s=1),))


def test_a_drawing_names_what_differs() -> None:
    text = "\n".join(draw(park(HOST, NET, exceptions=(exception("net", 1, gb_per_s=10),))))
    assert "except net unit 1: gb per s 10" in text
    assert "host1" in text
    assert "out 10 GB/s" in text
