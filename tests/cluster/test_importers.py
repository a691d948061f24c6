"""`cluster.importers` on real samples where ../shared is there, and on small texts one can read."""

from pathlib import Path

import pytest

from moestro.cluster.host_importers import read_hwloc, read_nccl, read_nvidia_smi
from moestro.cluster.importers import hostlist, import_cluster, read_kubernetes, read_slurm, read_slurm_yaml
from moestro.cluster.links import links_of
from moestro.core.errors import ClusterError

SAMPLES = Path(__file__).parents[3] / "shared" / "placement" / "topo_samples"
SPEEDS = {"host": 450.0, "leaf": 50.0, "spine": 25.0}
MATRIX = "\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\n" + "\n".join(
    f"GPU{row}\t" + "\t".join(cells) + "\t0-7"
    for row, cells in enumerate(
        [
            ["X", "NV12", "SYS", "SYS"],
            ["NV12", "X", "SYS", "SYS"],
            ["SYS", "SYS", "X", "NV12"],
            ["SYS", "SYS", "NV12", "X"],
        ]
    )
)


@pytest.fixture
def samples() -> Path:
    if not SAMPLES.exists():
        pytest.skip("needs ../shared")
    return SAMPLES


def test_nvidia_smi_with_nvswitch_is_one_level(samples: Path) -> None:
    inside = read_nvidia_smi((samples / "nvidia_smi_topo_8gpu_nics.txt").read_text())
    assert [(level.name, level.fan_out, level.gb_per_s) for level in inside.levels] == [
        ("host", 8, pytest.approx(18 * 20.6))
    ]
    assert inside.cards == 4


def test_nvidia_smi_with_bridged_pairs_is_two_levels(samples: Path) -> None:
    inside = read_nvidia_smi((samples / "nvidia_smi_topo_pcie_pairs.txt").read_text())
    assert [(level.fan_out, level.gb_per_s) for level in inside.levels] == [(2, 12 * 20.0), (2, 10.0)]


def test_escapes_in_a_header_are_ignored() -> None:
    assert read_nvidia_smi(MATRIX.replace("\tGPU0", "\t\x1b[4mGPU0", 1)).devices == 4


def test_a_matrix_that_disagrees_with_itself_is_refused() -> None:
    wrong = MATRIX.replace("GPU3\tSYS\tSYS", "GPU3\tNV12\tSYS")
    with pytest.raises(ClusterError, match="devices 0 and 3 see each other"):
        read_nvidia_smi(wrong)


def test_nccl_xml_gives_nvlink_and_card(samples: Path) -> None:
    inside = read_nccl((samples / "nccl_topo_dump.xml").read_text())
    assert inside.devices == 2
    assert inside.levels[0].gb_per_s == pytest.approx(18 * 20.6)
    assert (inside.card_gb_per_s, inside.cards, inside.device) == (50.0, 1, "H100")


def test_nccl_xml_without_gpu_elements_goes_by_pci_class() -> None:
    pci = '<pci busid="{0}" class="0x030200" link_speed="16.0 GT/s PCIe" link_width="16"/>'
    inside = read_nccl(f'<system version="1"><cpu numaid="0">{pci.format(1)}{pci.format(2)}</cpu></system>')
    assert (inside.devices, inside.levels[0].gb_per_s) == (2, 24.0)


def test_hwloc_reads_nvlink_distances(samples: Path) -> None:
    inside = read_hwloc((samples / "hwloc_gpu_snippet.xml").read_text())
    assert [(level.fan_out, level.gb_per_s) for level in inside.levels] == [(2, 300.0)]
    assert inside.device == "NVIDIA H100 80GB HBM3"


def test_host_lists_keep_their_zeros() -> None:
    assert hostlist("gpu[001-003,010],login") == ["gpu001", "gpu002", "gpu003", "gpu010", "login"]
    with pytest.raises(ClusterError, match="open bracket"):
        hostlist("gpu[1-3")


def test_slurm_tree_with_unequal_leaves(samples: Path) -> None:
    cluster = import_cluster(samples / "slurm_tree.conf", speeds=SPEEDS, devices_per_host=8, device="H100")
    assert cluster.hosts[:5] == ("gpu001", "gpu002", "gpu003", "gpu004", "gpu009")
    assert [level.fan_out for level in cluster.network] == [8, 5, 2]
    links = links_of(cluster)
    assert (links.devices, links.hosts) == (72, 9)


def test_slurm_blocks(samples: Path) -> None:
    nesting = read_slurm((samples / "slurm_block.conf").read_text())
    assert nesting.units["gb19"] == ("nvl72b", "all")
    assert len(nesting.units) == 36


def test_slurm_yaml_takes_the_default_topology(samples: Path) -> None:
    nesting = read_slurm_yaml((samples / "slurm_topology.yaml").read_text())
    assert nesting.units["gpu005"] == ("leaf2", "spine1")


def test_slurm_speeds_are_asked_for_not_invented(samples: Path) -> None:
    with pytest.raises(ClusterError, match="give --speed host=50 --speed leaf=50 --speed spine=50"):
        import_cluster(samples / "slurm_tree.conf", devices_per_host=8, device="H100")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SwitchName=a Switches=b", "switch b, which is not described"),
        ("SwitchName=a Nodes=n1\nSwitchName=b Nodes=n1", "node n1 hangs below a and b"),
        ("SwitchName=a Switches=b\nSwitchName=b Switches=a Nodes=n", "lies below itself"),
        ("Switch=a Nodes=n", "line 1"),
    ],
)
def test_slurm_trees_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        read_slurm(text)


def test_kubernetes_nodes_by_kueue_levels(samples: Path) -> None:
    nesting = read_kubernetes((samples / "k8s_nodes.json").read_text(), (samples / "kueue_topology.yaml").read_text())
    assert nesting.level_names == ("rack", "block")
    assert nesting.units == {"gpu001": ("r7", "b1"), "gpu005": ("r8", "b1")}
    assert (nesting.devices_per_host, nesting.device) == (8, "NVIDIA-H100-80GB-HBM3")


def test_kubernetes_nodes_by_old_and_new_labels(samples: Path) -> None:
    nesting = read_kubernetes((samples / "k8s_nodes.json").read_text())
    assert nesting.units == {"gpu001": ("nvl1", "leaf1", "spine1"), "gpu005": ("nvl2", "leaf2", "spine1")}


def test_a_file_of_no_known_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(ClusterError, match=r"x\.txt is none of nvidia-smi"):
        import_cluster(tmp_path / "x.txt")
