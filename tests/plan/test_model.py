"""Shapes, operations and bytes against published counts and sums done by hand."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from moestro.core.errors import ConfigError, PlanError
from moestro.plan.explain import flops_per_token
from moestro.plan.huggingface import read_config
from moestro.plan.loads import imbalance_of_ranks, read_loads
from moestro.plan.machine import precision_of
from moestro.plan.memory import GIB, memory
from moestro.plan.published import Row, read_rows
from moestro.plan.shape import ModelShape, read_model
from moestro.plan.stacks import find_stack, version_year

ROWS = Path(__file__).parents[2] / "benchmarks" / "published_rows.json"


def known(name: str) -> ModelShape:
    return read_model(Path(str(files("moestro").joinpath("specs", "models", f"{name}.toml"))))


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.id: row for row in read_rows(ROWS)}


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("llama3-8b", 8.03, 7.5),
        ("llama3-405b", 405.8, 403.7),
        ("mixtral-8x7b", 46.7, 12.7),
        ("qwen3-30b-a3b", 30.5, 3.04),
    ],
)
def test_weights_are_those_of_the_model_cards(name: str, total: float, active: float) -> None:
    shape = known(name)
    assert float(shape.total_params) / 1e9 == pytest.approx(total, rel=0.005)
    assert float(shape.active_params) / 1e9 == pytest.approx(active, rel=0.01)


def test_deepseek_v3_has_671_billion_weights_and_one_extra_module_beside() -> None:
    shape = known("deepseek-v3")
    assert float(replace(shape, extra_heads=0).total_params) / 1e9 == pytest.approx(671, rel=0.002)
    assert float(replace(shape, extra_heads=0).active_params) / 1e9 == pytest.approx(36.6, rel=0.02)


def test_operations_a_token_agree_with_published_counts(rows: dict[str, Row]) -> None:
    entries = {entry["id"]: entry for entry in json.loads(ROWS.read_text())["entries"]}
    off = []
    for name, row in rows.items():
        said = entries[name]["derived"]["model_gflops_per_token_causal"]
        off.append(flops_per_token(row.case.shape, float(row.case.length)) / 1e9 / said - 1)
    assert np.quantile(np.abs(off), 0.9) < 0.01


def test_a_gpt3_layer_keeps_34_bytes_per_token_and_width(rows: dict[str, Row]) -> None:
    """2205.05198: s b h (34 + 5 a s / h) without, 34 s b h with selective recomputation, both over tp."""
    row = next(row for row in rows.values() if row.group == "korthikanti-t5-seqsel")
    shape, layout = row.case.shape, replace(row.case.layout, pp=1, virtual=1, micro_batch=1, devices=8)
    parts = memory(replace(row.case, layout=layout)).parts
    counted = 34 * 2048 * shape.width / layout.tp * shape.num_layers
    assert float(parts["activations"]) == pytest.approx(counted, rel=0.01)


def test_an_expert_stage_counts_experts_apart(rows: dict[str, Row]) -> None:
    """Qwen3-30B on 16 devices, ep 16: an expert's optimiser is sharded over no one else."""
    parts = memory(rows["bridge-skill-qwen3-30b-16h100-final"].case).parts
    experts = 48 * 128 * 3 * 2048 * 768 / 16
    assert float(parts["expert weights"]) == pytest.approx(2 * experts)
    assert float(parts["expert optimiser"]) == pytest.approx(12 * experts)


def test_measured_peaks_are_met_within_seven_percent(rows: dict[str, Row]) -> None:
    known_rows = [row for row in rows.values() if row.memory_gib]
    errors = [abs(float(memory(row.case).total_gib) / row.memory_gib - 1) for row in known_rows]
    assert len(errors) >= 30
    assert max(errors) < 0.07
    assert np.median(errors) < 0.03


def test_zero_shards_what_it_says(rows: dict[str, Row]) -> None:
    case = rows["simumax-b200-llama3_70b_l12_tp4_pp1_dp2_mbc4_cef"].case
    states = {}
    for zero in (0, 1, 2, 3):
        parts = memory(replace(case, layout=replace(case.layout, zero=zero))).parts
        states[zero] = [float(parts[name]) / GIB for name in ("weights", "gradients", "optimiser")]
    assert states[1][2] == pytest.approx(states[0][2] / 2)
    assert states[2][1] == pytest.approx(states[1][1] / 2)
    assert states[3][0] == 0


CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}


def config(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in {**CONFIG, **changes}.items() if value is not None}))
    return path


def test_a_config_json_says_the_same_as_the_spec(tmp_path: Path) -> None:
    ours, theirs = known("qwen3-30b-a3b"), read_config(config(tmp_path))
    assert float(theirs.total_params) == float(ours.total_params)
    assert float(theirs.active_params) == float(ours.active_params)


def test_a_config_with_latent_attention_and_dense_layers(tmp_path: Path) -> None:
    latent = {
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
        "sliding_window": 4096,
        "layer_types": None,
    }
    shape = read_config(config(tmp_path, **latent))
    assert (float(shape.num_dense), float(shape.shared_width), float(shape.qk_dim)) == (3, 768, 192)
    assert shape.windowed_share == 1


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_config_without_a_size_names_it(tmp_path: Path, key: str) -> None:
    with pytest.raises(PlanError, match=key):
        read_config(config(tmp_path, **{key: None}))


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PlanError, match="is not a config"):
        read_model(tmp_path)
    (tmp_path / "x.toml").write_text("[train]\nsteps = 1\n")
    with pytest.raises(PlanError, match=r"has no \[model\] table"):
        read_model(tmp_path / "x.toml")
    with pytest.raises(ConfigError, match="does not exist"):
        read_model(tmp_path / "none.toml")


def test_precisions_by_any_of_their_names() -> None:
    assert precision_of("MXFP8").block == 1
    assert precision_of("nvfp4").four == 1
    assert precision_of("fp8_e4m3").narrow == 1
    assert precision_of("fp32").single == 1
    with pytest.raises(PlanError, match="precision is 'int3'"):
        precision_of("int3")


def test_software_is_known_by_name_and_year() -> None:
    assert find_stack("NeMo 24.07").name == "nemo-24.07"
    assert find_stack("torchtitan v0.2").family == "torch-fsdp"
    assert find_stack("something else").effects == "unknown"
    assert version_year("NeMo 25.04") == pytest.approx(2025.33, abs=0.01)


def test_imbalance_of_ranks_follows_from_expert_loads(tmp_path: Path) -> None:
    assert imbalance_of_ranks([2, 0, 1, 1], np.array([1.0, 2.0, 4.0])).tolist() == [1.0, 1.0, 2.0]
    trace = tmp_path / "loads.json"
    trace.write_text(json.dumps({"loads": [[3, 1], [1, 1]]}))
    assert read_loads(trace, 2).tolist() == [[3, 1], [1, 1]]
    assert imbalance_of_ranks(read_loads(trace, 2), 2.0) == 1.25
    with pytest.raises(PlanError, match="loads of 2 experts; the model has 4"):
        read_loads(trace, 4)
