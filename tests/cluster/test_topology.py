"""`cluster.toml`: levels from inside out, what-if settings, and one clear line for what is wrong."""

from importlib.resources import files
from pathlib import Path

import pytest

from moestro.cluster.devices import find_device, known_devices
from moestro.cluster.topology import Cluster, changed, read_cluster
from moestro.core.errors import ClusterError, ConfigError

TWO_LEVELS = """
name = "lab"
[device]
name = "Thing"
memory_gib = 10
memory_gb_per_s = 100
peak_tflops = { bf16 = 100 }
[[network]]
name = "host"
fan_out = 4
gb_per_s = 200
[[network]]
name = "spine"
gb_per_s = 50
sharing = 2
"""


@pytest.fixture
def lab(tmp_path: Path) -> Cluster:
    return read_cluster(write(tmp_path, TWO_LEVELS))


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.toml"
    path.write_text(text)
    return path


def test_units_grow_from_inside_out(lab: Cluster) -> None:
    assert lab.unit_sizes() == [4, float("inf")]
    assert lab.most_devices == float("inf")


def test_devices_that_share_a_link_get_their_part(lab: Cluster) -> None:
    assert lab.network[1].bytes_per_s == 25e9


def test_a_setting_multiplies_or_replaces(lab: Cluster) -> None:
    other = changed(lab, ["network.spine=2x", "device.memory_gib=20", "device.peak_tflops.bf16=0.5x"])
    assert other.network[1].gb_per_s == 100
    assert other.device.memory_gib == 20
    assert other.device.peak_tflops["bf16"] == 50


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("network.moon=2x", "network.moon is not a level of lab; it has host, spine"),
        ("network.spine", "is not a what-if"),
        ("device.power_w=much", "device.power_w"),
        ("device.name=2x", "cannot be applied"),
    ],
)
def test_a_wrong_setting_names_itself(lab: Cluster, setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        changed(lab, [setting])


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("gb_per_s = 50", "", "network.spine.gb_per_s is missing"),
        ("gb_per_s = 50", "gb_per_s = 0", "network.spine.gb_per_s is 0"),
        ("fan_out = 4", "", "network.host.fan_out is 0"),
        ('name = "spine"', 'name = "host"', "every level needs a name of its own"),
        ("memory_gib = 10", "memory_gib = -1", "device.memory_gib is -1"),
        ("bf16 = 100", "int3 = 100", "neither bf16 nor fp32"),
    ],
)
def test_a_wrong_file_says_what_and_how(tmp_path: Path, before: str, after: str, words: str) -> None:
    with pytest.raises((ClusterError, ConfigError), match=words):
        read_cluster(write(tmp_path, TWO_LEVELS.replace(before, after)))


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "h800", "b200", "b300", "gb200", "gb300", "mi300x", "cpu"])
def test_ready_made_clusters_can_be_read(name: str) -> None:
    cluster = read_cluster(Path(str(files("moestro").joinpath("specs", "clusters", f"{name}.toml"))))
    assert cluster.source
    assert cluster.device.memory_gib > 1


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("H100-SXM5-80GB", "H100"),
        ("GB200-NVL72", "GB200"),
        ("DGX-B200", "B200"),
        ("NVIDIA H200", "H200"),
        ("A100-SXM4-40GB", "A100-40GB"),
        ("H100-SXM (96GB HBM2e, 500W)", "H100-HBM2e-500W"),
    ],
)
def test_names_mean_families(name: str, family: str) -> None:
    found = find_device(name)
    assert found is not None
    assert found.family_name == family


def test_an_unknown_name_means_none() -> None:
    assert find_device("abacus") is None
    assert "H100" in known_devices()


def test_crowding_is_read_and_cannot_be_a_gain(tmp_path: Path) -> None:
    assert read_cluster(write(tmp_path, TWO_LEVELS.replace('"lab"', '"lab"\ncrowding = 1.2', 1))).crowding == 1.2
    with pytest.raises(ClusterError, match=r"crowding is 0\.9; it must be 1"):
        read_cluster(write(tmp_path, TWO_LEVELS.replace('"lab"', '"lab"\ncrowding = 0.9', 1)))
