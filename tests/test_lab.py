"""benchmarks/lab.py: what the benchmarks over throttled links stand on."""

import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from lab import PAYLOAD_SHARE, Host, Lab, LabError, missing

from moestro.dist.layout import Layout
from moestro.dist.mesh import Mesh

NO_LAB = missing()
pytestmark = pytest.mark.skipif(bool(NO_LAB), reason=NO_LAB)
SEND = """
import os, socket, time
if os.environ["RANK"] == "0":
    server = socket.create_server((os.environ["MASTER_ADDR"], 5000))
    print("listening", flush=True)
    link, _ = server.accept()
    came, began = 0, time.perf_counter()
    while part := len(link.recv(1 << 18)):
        came += part
    print(came, time.perf_counter() - began)
else:
    for _ in range(200):
        try:
            link = socket.create_connection((os.environ["MASTER_ADDR"], 5000))
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    link.sendall(bytes(4_000_000))
"""


def test_uplinks_carry_what_is_sent_at_the_rate_they_are_given() -> None:
    with Lab([Host(1, 1000, 100), Host(1, 1000, 100)]) as lab:
        result = lab.run([sys.executable, "-S", "-c", SEND], timeout_s=20)
    came, seconds = map(float, result.outputs[0].stdout.split()[1:])
    assert came == 4e6
    for carried in (result.uplinks[0].in_bytes, result.uplinks[1].out_bytes):
        assert carried == pytest.approx(4e6, rel=0.002)
    fluid_s = 4e6 * 8 / (100e6 * PAYLOAD_SHARE)
    assert 0.9 * fluid_s < seconds < 2 * fluid_s


def test_a_rank_that_fails_ends_the_others_and_says_what_it_said() -> None:
    with (
        Lab([Host(2)]) as lab,
        pytest.raises(LabError, match=r"(?s)rank 1 ended with status 3.*no luck"),
    ):
        lab.run(["sh", "-c", "test $RANK = 0 && sleep 60; echo no luck; exit 3"], timeout_s=20)


def exchange_s(rows: int) -> float:
    """Seconds of an exchange of so many KiB each way, which the second rank enters a little later."""
    axis = Mesh(Layout(dp_shard=2, ep=2), torch.device("cpu"))["ep"]
    rows_R = [rows * (rank != axis.index) for rank in range(2)]
    dist.barrier()
    began = time.perf_counter()
    time.sleep(0.02 * axis.index)
    axis.begin_swap(torch.ones(rows, 256), rows_R, rows_R).wait()
    return time.perf_counter() - began


@pytest.mark.slow
def test_an_exchange_uses_both_directions_of_a_link_at_once() -> None:
    with Lab([Host(1, 1000, 50)] * 2) as lab:
        seconds = max(lab.call(exchange_s, 2048, timeout_s=30))
    fluid_s = 2048 * 1024 * 8 / (50e6 * PAYLOAD_SHARE)
    assert seconds < 1.5 * fluid_s  # one direction after the other takes twice as long
