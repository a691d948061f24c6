"""`package.sources`: checkpoints of ours and folders of other projects go in and come out whole (annex X.7)."""

import json
from pathlib import Path

import numpy as np
import pytest
from package.samples import contents
from package.samples import save_model as save_folder

from moestro.core.errors import ConversionError
from moestro.core.specs import AttentionSpec, ModelSpec, MoESpec
from moestro.core.tokens import ByteTokenizer
from moestro.nn.decoder import Decoder
from moestro.package.api import Options, Release, pack, unpack, verify
from moestro.package.sources import CHECKPOINT
from moestro.train.checkpoint import TrainingState, load_model, save_model

FAMILIES = {
    "LlamaForCausalLM": "LlamaConfig",
    "MixtralForCausalLM": "MixtralConfig",
    "GPT2LMHeadModel": "GPT2Config",
    "BertForMaskedLM": "BertConfig",
    "T5ForConditionalGeneration": "T5Config",
    "ViTForImageClassification": "ViTConfig",
    "WhisperForConditionalGeneration": "WhisperConfig",
    "Qwen2ForCausalLM": "Qwen2Config",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one checkpoint, optimiser included."""
    spec = ModelSpec(
        num_layers=1,
        width=16,
        vocab_size=256,
        attention=AttentionSpec(num_heads=2),
        moe=MoESpec(num_experts=2, expert_width=8),
    )
    model = Decoder(spec).initialise()
    moments = {f"exp_avg.{name}": p.detach() for name, p in model.named_parameters()}
    save_model(tmp_path / "run/checkpoints/step-00000007", model, ByteTokenizer(), TrainingState(7, moments))
    return tmp_path / "run"


def test_a_run_is_packed_without_what_only_training_needs(run: Path, tmp_path: Path) -> None:
    packed = pack(run, tmp_path / "p", Options(release=Release(package_id="demo")))
    assert packed.left_out == ["optimizer.safetensors", "state.safetensors"]
    unpack(tmp_path / "p", tmp_path / "out")
    load_model(tmp_path / "out")
    kept = contents(run / "checkpoints/step-00000007")
    assert contents(tmp_path / "out")["model.safetensors"] == kept["model.safetensors"]
    technical = json.loads((tmp_path / "p/Meta-info/demo/technicalinfo.json").read_bytes())
    assert technical["PTM_info"]["num_experts"] == 2


def test_a_damaged_checkpoint_is_not_packed(run: Path, tmp_path: Path) -> None:
    file = run / "checkpoints/step-00000007/model.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ConversionError, match=r"model\.json truncated or changed"):
        pack(run, tmp_path / "p")


def test_tensors_in_two_files_are_refused(tmp_path: Path, run: Path) -> None:
    weights = run / "checkpoints/step-00000007/model.safetensors"
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(weights.read_bytes())
    with pytest.raises(ConversionError, match="both hold"):
        pack(folder, tmp_path / "p")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_folders_of_many_families_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 100,
    }
    sizes |= {
        "d_model": 32,
        "d_ff": 64,
        "d_kv": 16,
        "num_layers": 1,
        "num_heads": 2,
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 2,
    }
    sizes |= {"layer_types": ["full_attention"]}
    sizes |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    config = getattr(transformers, FAMILIES[name])()
    for key, value in sizes.items():
        if hasattr(config, key) and key not in config.attribute_map:
            setattr(config, key, value)
    config.architectures = [name]
    model = getattr(transformers, name)(config)
    model.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    pack(tmp_path / "m", tmp_path / "p", Options(release=Release(package_id="demo"), compact=True))
    unpack(tmp_path / "p", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "m")


@pytest.mark.parametrize(
    "config",
    [b'{"architectures": 1}', b'{"attention": {}, "num_layers": 1, "moe": null}', b"[" * 100_000, b'{"d_model": 1e99}',
     b'{"model_type": "\\ud800"}', b'{"vocab_size": 99999999999999999999}'],
)  # fmt: skip
def test_any_configuration_is_packed_and_can_be_read_again(tmp_path: Path, config: bytes) -> None:
    model = save_folder(tmp_path / "m", {"a": np.arange(3)})
    (model / "config.json").write_bytes(config)
    pack(model, tmp_path / "p")
    verify(tmp_path / "p")


@pytest.mark.parametrize("table", [{}, {"sha256": None}, {"sha256": []}])
def test_a_checkpoint_whose_manifest_lists_no_digests_is_damaged(tmp_path: Path, table: dict[str, object]) -> None:
    model = save_folder(tmp_path / "m", {"a": np.arange(3)})
    (model / "manifest.json").write_text(json.dumps({"format": CHECKPOINT, **table}))
    with pytest.raises(ConversionError, match="lists no digests"):
        pack(model, tmp_path / "p")
