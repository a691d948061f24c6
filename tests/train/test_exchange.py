"""Hugging Face folders in and out: bit for bit, or one line that says what does not fit.

Folders are made by transformers itself. That the mathematics is the same is `tests/nn/test_families.py`.
"""

import ast
import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moestro
from moestro.core.config import to_table
from moestro.core.errors import CheckpointError, FamilyError, StorageError
from moestro.core.specs import AttentionSpec, ModelSpec, MoESpec, RouterSpec
from moestro.core.tokens import ByteTokenizer
from moestro.nn.decoder import Decoder
from moestro.nn.families.upcycle import Upcycle
from moestro.train import export_folder as exporting
from moestro.train.checkpoint import find_checkpoint, load_model, load_weights, save_model
from moestro.train.evaluate_run import evaluate_run
from moestro.train.export_folder import export_folder
from moestro.train.import_folder import import_folder
from moestro.train.origin import load_origin
from moestro.train.recipe import load_recipe
from moestro.train.samples import open_sampler

VOCABULARY = 260
"""Rows of the embedding; the byte tokenizer has 257 entries."""
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 96,
    "bos_token_id": 3,
    "eos_token_id": 256,
    "pad_token_id": 5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 1.5},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 16,
        "mlp_only_layers": [1],
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 48},
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
    },
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "attention_bias": True},
}
Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Makes a Hugging Face folder with random weights."""
    transformers = pytest.importorskip("transformers")

    def make(name: str, dtype: torch.dtype = torch.float32, save: dict[str, Any] | None = None, **fields: Any) -> Path:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **SIZES | FAMILIES[name] | fields)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for tensor_name, tensor in model.state_dict().items():
                tensor.normal_(1.0 if "norm" in tensor_name else 0.0, 0.1)
        path = tmp_path / f"hf-{name}"
        model.to(dtype).save_pretrained(path, **save or {})
        ByteTokenizer().library().save(str(path / "tokenizer.json"))
        return path

    return make


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, right[name]))), name


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers reads it; it must find every weight and use all."""
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def edit_config(folder: Path, **fields: Any) -> None:
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | fields))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


TOKENS = torch.tensor([[72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_goes_out_as_it_came_in(folder: Folder, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source = folder(name, dtype)
    report = import_folder(source, tmp_path / "ours")
    assert sum(report.tensors.values()) == len(tensors_of(source))
    assert not report.left_out
    out = tmp_path / "out"
    exported = export_folder(tmp_path / "ours", out)
    assert (exported.family, exported.rounded) == (name, 0)
    assert_same_bits(tensors_of(source), tensors_of(out))
    before, after = loaded(source), loaded(out)
    with torch.no_grad():
        wanted = before(TOKENS).logits
        assert torch.equal(after(TOKENS).logits, wanted)
        ours, _ = load_model(tmp_path / "ours")
        torch.testing.assert_close(ours(TOKENS).logit_BSV, wanted, rtol=0, atol=1e-5)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "dtype"):
        assert getattr(after.config, key) == getattr(before.config, key), key


OWN = {
    "mixtral": (AttentionSpec(num_kv_heads=2), RouterSpec(rule="top2", weights="renormalise")),
    "olmoe": (AttentionSpec(qk_norm="row"), RouterSpec(rule="topk", k=3)),
    "qwen3_moe": (AttentionSpec(qk_norm="head", head_dim=12), RouterSpec(rule="top1")),
    "deepseek_v3": (
        AttentionSpec(kind="mla", head_dim=8, rope_head_dim=4, kv_rank=16),
        RouterSpec(rule="topk", score="sigmoid", weights="renormalise", weight_scale=1.5, selection_bias="quantile"),
    ),
    "llama": (AttentionSpec(), None),
    "qwen3": (AttentionSpec(qk_norm="head", window=4, window_layers=(0,)), None),
}


def own_model(folder: Path, name: str) -> tuple[Path, Decoder]:
    """A model made here, saved as training does."""
    attention, router = OWN[name]
    shared = 16 if name == "deepseek_v3" else 0
    moe = router and MoESpec(num_experts=4, expert_width=16, shared_width=shared, router=router)
    spec = ModelSpec(num_layers=2, width=32, vocab_size=257, dense_width=20, attention=attention, moe=moe)
    torch.manual_seed(0)
    model = Decoder(replace(spec, init_std=0.2)).initialise().eval()
    for own in model.routers if name == "deepseek_v3" else []:
        own.bias_E.normal_(0, 0.2)
    save_model(folder, model, ByteTokenizer())
    return folder, model


@pytest.mark.parametrize("name", OWN)
def test_transformers_gives_our_model_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    run, model = own_model(tmp_path / "run", name)
    report = export_folder(run, tmp_path / "out")
    assert (report.family, report.dtype, report.rounded) == (name, "fp32", 0)
    theirs = loaded(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logit_BSV, rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    shutil.copy(tmp_path / "out" / "tokenizer.json", tmp_path / "again")
    import_folder(tmp_path / "again", tmp_path / "back")
    back, _ = load_model(tmp_path / "back")
    assert_same_bits(dict(model.state_dict()), dict(back.state_dict()))


def test_a_bias_that_the_router_does_not_use_goes_out_as_zeros(tmp_path: Path) -> None:
    _, model = own_model(tmp_path / "run", "deepseek_v3")
    spec = model.spec
    assert spec.moe is not None
    unused = replace(spec, moe=replace(spec.moe, router=replace(spec.moe.router, selection_bias="none")))
    twin = Decoder(unused).eval()
    twin.load_state_dict(model.state_dict())
    save_model(tmp_path / "twin", twin, ByteTokenizer())
    export_folder(tmp_path / "twin", tmp_path / "out")
    assert not any(t.any() for name, t in tensors_of(tmp_path / "out").items() if name.endswith("correction_bias"))
    with torch.no_grad():
        logits = loaded(tmp_path / "out")(TOKENS).logits
        torch.testing.assert_close(logits, twin(TOKENS).logit_BSV, rtol=0, atol=1e-5)


def test_the_type_can_be_chosen_and_what_is_rounded_is_said(tmp_path: Path) -> None:
    run, _ = own_model(tmp_path / "run", "deepseek_v3")
    report = export_folder(run, tmp_path / "out", dtype="bf16")
    types = {str(tensor.dtype) for tensor in tensors_of(tmp_path / "out").values()}
    assert types == {"torch.bfloat16", "torch.float32"}  # the selection bias stays float32, as in transformers
    assert report.rounded > 0
    assert "tensors hold more digits than bf16 has" in "\n".join(report.lines())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_type_that_is_too_small_is_refused(tmp_path: Path) -> None:
    _, model = own_model(tmp_path / "run", "llama")
    model.norm.scale_D.data[3] = 1e6
    save_model(tmp_path / "large", model, ByteTokenizer())
    with pytest.raises(
        FamilyError, match=r"model.norm.weight has numbers beyond the range of torch.float16; give --dtype"
    ):
        export_folder(tmp_path / "large", tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_stacked_experts_are_read_like_single_ones(folder: Folder, tmp_path: Path, name: str) -> None:
    import_folder(folder(name), tmp_path / "single")
    shutil.rmtree(tmp_path / f"hf-{name}")
    source = folder(name, save={"save_original_format": False})
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in tensors_of(source))
    import_folder(source, tmp_path / "stacked")
    assert_same_bits(*(dict(load_model(tmp_path / kind)[0].state_dict()) for kind in ("single", "stacked")))


def test_shards_are_read_like_one_file(folder: Folder, tmp_path: Path) -> None:
    import_folder(folder("olmoe"), tmp_path / "whole")
    shutil.rmtree(tmp_path / "hf-olmoe")
    source = folder("olmoe", save={"max_shard_size": "20KB"})
    report = import_folder(source, tmp_path / "sharded")
    assert report.files > 3
    assert_same_bits(*(dict(load_model(tmp_path / kind)[0].state_dict()) for kind in ("whole", "sharded")))
    missing = next(iter(source.glob("model-00002*")))
    missing.unlink()
    with pytest.raises(FamilyError, match=rf"lacks 1 of {report.files} shards: {missing.name}"):
        import_folder(source, tmp_path / "never")


def test_shards_are_written_with_an_index(tmp_path: Path) -> None:
    run, model = own_model(tmp_path / "run", "mixtral")
    report = export_folder(run, tmp_path / "out", shard_bytes=20_000)
    assert len(report.files) > 3
    assert all((tmp_path / "out" / name).stat().st_size < 40_000 for name in report.files)
    with torch.no_grad():
        logits = loaded(tmp_path / "out")(TOKENS).logits
        torch.testing.assert_close(logits, model(TOKENS).logit_BSV, rtol=0, atol=1e-5)


def test_every_tensor_that_does_not_fit_is_listed(folder: Folder, tmp_path: Path) -> None:
    source = folder("mixtral")

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.extra"] = torch.zeros(3)
        tensors["lm_head.weight"] = torch.zeros(9, 32)
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 32, dtype=torch.int64)

    edit_tensors(source, spoil)
    with pytest.raises(FamilyError) as raised:
        import_folder(source, tmp_path / "ours")
    text = str(raised.value)
    assert "does not fit mixtral, 4 tensors differ" in text
    assert "model.norm.weight is missing; " in text.replace(", ", "; ")
    assert "model.extra is unknown" in text
    assert f"lm_head.weight is [9, 32], not [{VOCABULARY}, 32]" in text
    assert "q_proj.weight has type I64" in text
    assert not (tmp_path / "ours").exists()


def test_layers_that_predict_further_tokens_are_left_out_only_on_request(folder: Folder, tmp_path: Path) -> None:
    source = folder("deepseek_v3")
    edit_tensors(source, lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": torch.ones(32, 64)}))
    with pytest.raises(
        FamilyError, match=r"eh_proj.weight is unknown; .*further tokens.* --leave-out 'model.layers.2.\*'"
    ):
        import_folder(source, tmp_path / "ours")
    report = import_folder(source, tmp_path / "ours", leave_out=["model.layers.2.*"])
    assert report.left_out == ["model.layers.2.eh_proj.weight"]
    assert "left out on request  model.layers.2.eh_proj.weight" in report.lines()
    assert load_origin(tmp_path / "ours").left_out == report.left_out


def test_leaving_out_what_is_not_there_or_is_needed_is_an_error(folder: Folder, tmp_path: Path) -> None:
    source = folder("llama")
    with pytest.raises(FamilyError, match=r"--leave-out model.layer.9.\* matches no tensor and no setting"):
        import_folder(source, tmp_path / "ours", leave_out=["model.layer.9.*"])
    with pytest.raises(FamilyError, match=r"1 tensors differ: model.norm.weight is missing"):
        import_folder(source, tmp_path / "ours", leave_out=["model.norm.weight"])


def test_stored_rotary_frequencies_are_named(folder: Folder, tmp_path: Path) -> None:
    source, name = folder("llama"), "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(source, lambda tensors: tensors.update({name: torch.ones(4)}))
    with pytest.raises(FamilyError, match=r"inv_freq is unknown; inv_freq is computed .* --leave-out"):
        import_folder(source, tmp_path / "ours")
    assert import_folder(source, tmp_path / "ours", leave_out=["*.rotary_emb.inv_freq"]).left_out == [name]


def test_fp8_weights_are_refused(folder: Folder, tmp_path: Path) -> None:
    source = folder("deepseek_v3")
    edit_tensors(source, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}))
    with pytest.raises(FamilyError, match=r"fp8 weights with scales .*convert them to bf16 first"):
        import_folder(source, tmp_path / "ours")
    edit_config(source, quantization_config={"quant_method": "fp8", "fmt": "e4m3"})
    with pytest.raises(FamilyError, match=r"config.json: quantization_config is 'fp8'"):
        import_folder(source, tmp_path / "ours")


def test_a_stored_head_of_a_tied_model_must_be_the_embedding(folder: Folder, tmp_path: Path) -> None:
    source = folder("llama")
    edit_tensors(source, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 0}))
    import_folder(source, tmp_path / "ours")
    edit_tensors(source, lambda tensors: tensors["lm_head.weight"][3].add_(1))
    with pytest.raises(FamilyError, match=r"tie_word_embeddings true but lm_head.weight differs"):
        import_folder(source, tmp_path / "never")


def test_float64_is_rounded_and_says_so(folder: Folder, tmp_path: Path) -> None:
    source = folder("llama", torch.float64)
    edit_tensors(source, lambda tensors: tensors["model.norm.weight"].add_(1e-12))
    report = import_folder(source, tmp_path / "ours")
    assert report.rounded == ["model.norm.weight"]
    assert export_folder(tmp_path / "ours", tmp_path / "out").dtype == "fp32"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"has no config.json; it must be a Hugging Face model's"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config.json is not a model's config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), r"config.json is not a model's config.json"),
        (
            lambda folder: edit_config(folder, model_type="gpt2"),
            r"model_type is 'gpt2'; moestro reads deepseek_v3, llama,",
        ),
        (lambda folder: edit_config(folder, hidden_act="relu"), r"config.json: hidden_act is 'relu'"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), r"model.safetensors is truncated"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            r"tokenizer.json does not exist; give .* --tokenizer PATH",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("[]"),
            r"tokenizer.json is not a tokenizer.json; give one",
        ),
        (lambda folder: edit_config(folder, vocab_size=99), r"2 tensors differ|3 tensors differ|1 tensors differ"),
        (shutil.rmtree, r"is not a folder; download the model"),
    ],
)
def test_a_bad_folder_is_one_clear_line(
    folder: Folder, tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    source = folder("llama")
    spoil(source)
    with pytest.raises(FamilyError, match=message) as raised:
        import_folder(source, tmp_path / "ours")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ours").exists()


def test_one_of_our_own_folders_is_recognised(tmp_path: Path) -> None:
    run, _ = own_model(tmp_path / "run", "llama")
    with pytest.raises(FamilyError, match=r"has no config.json; it is a moestro model already"):
        import_folder(run, tmp_path / "ours")


def test_another_tokenizer_can_be_given_and_must_fit(folder: Folder, tmp_path: Path) -> None:
    source = folder("llama", vocab_size=257)
    (source / "tokenizer.json").rename(tmp_path / "other.json")
    import_folder(source, tmp_path / "ours", tokenizer=tmp_path / "other.json")
    assert load_model(tmp_path / "ours")[1].vocab_size == 257
    small = folder("qwen3", vocab_size=200, eos_token_id=None)
    with pytest.raises(FamilyError, match="has 257 entries but vocab_size is 200"):
        import_folder(small, tmp_path / "never", tokenizer=tmp_path / "other.json")


def test_nothing_is_overwritten(folder: Folder, tmp_path: Path) -> None:
    source, full = folder("llama"), tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("precious")
    run, _ = own_model(tmp_path / "run", "llama")
    for work in (lambda: import_folder(source, full), lambda: export_folder(run, full)):
        with pytest.raises(FamilyError, match=r"exists already; nothing is overwritten"):
            work()
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_a_full_disk_leaves_no_half_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = own_model(tmp_path / "run", "mixtral")

    def full(*_: Any) -> list[str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "write_tensors", full)
    with pytest.raises(StorageError, match="cannot be written: No space left on device"):
        export_folder(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_disk_that_lies_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = own_model(tmp_path / "run", "mixtral")
    honest = exporting.write_tensors

    def lie(folder: Path, *rest: Any) -> list[str]:
        names = honest(folder, *rest)
        with (folder / names[0]).open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\x00\x01\x02\x03")
        return names

    monkeypatch.setattr(exporting, "write_tensors", lie)
    with pytest.raises(CheckpointError, match=r"does not read back as written .*check the disk"):
        export_folder(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_family_holds_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    spec = ModelSpec(num_layers=1, width=32, vocab_size=257, moe=MoESpec(num_experts=4, expert_width=8))
    save_model(tmp_path / "run", Decoder(spec).initialise(), ByteTokenizer())
    with pytest.raises(FamilyError, match=r"mixtral cannot hold this model: model.moe.router.rule is 'gap'"):
        export_folder(tmp_path / "run", tmp_path / "out")
    with pytest.raises(FamilyError, match=r"--family is 'gpt2'; it must be deepseek_v3, llama"):
        export_folder(tmp_path / "run", tmp_path / "out", family="gpt2")
    with pytest.raises(FamilyError, match=r"--dtype is 'int8'; it must be bf16, fp16, fp32"):
        export_folder(tmp_path / "run", tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


def test_tokens_are_the_same_for_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run, _ = own_model(tmp_path / "run", "mixtral")
    export_folder(run, tmp_path / "out")
    theirs, text = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), "def f(x):\n\treturn 'été' + x  # ✓"
    assert theirs(text)["input_ids"] == ByteTokenizer().encode(text).tolist()
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|end|>", 256)


def test_texts_beside_the_model_come_back(folder: Folder, tmp_path: Path) -> None:
    source = folder("qwen3")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|end|>"}'
    )
    import_folder(source, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "out")
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (source / name).read_text()


def test_an_upcycled_folder_begins_as_the_dense_model_and_goes_out_as_a_sparse_one(
    folder: Folder, tmp_path: Path
) -> None:
    source = folder("qwen3", torch.bfloat16)
    report = import_folder(source, tmp_path / "ours", upcycle=Upcycle(num_experts=4))
    assert report.drawn == 2
    assert "drawn at random      2 routers" in report.lines()
    assert report.spec.moe is not None
    model, _ = load_model(tmp_path / "ours")
    with torch.no_grad():
        dense = loaded(source)(TOKENS).logits
        torch.testing.assert_close(model(TOKENS).logit_BSV, dense, rtol=0, atol=1e-5)
        exported = export_folder(tmp_path / "ours", tmp_path / "out")
        assert (exported.family, exported.dtype) == ("qwen3_moe", "fp32")
        torch.testing.assert_close(loaded(tmp_path / "out")(TOKENS).logits, dense, rtol=0, atol=1e-5)


def test_an_imported_model_evaluates_generates_and_trains_on(folder: Folder, tmp_path: Path) -> None:
    text, model, source = tmp_path / "text.txt", tmp_path / "ours", folder("olmoe", torch.bfloat16)
    import_folder(source, model, recipe=tmp_path / "recipe.toml")
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 60)
    assert evaluate_run(model, [str(text)], 32, "fp32").bits_per_byte > 1
    assert "".join(open_sampler(model).stream("The", 4, temperature=0.0, top_k=0, seed=0))
    spec = load_model(model)[0].spec
    settings = {"out": str(tmp_path / "run"), "data.source": str(text), "train.steps": 1, "train.length": 16}
    settings |= {"train.sequences": 2, "report.sample_tokens": 2, "train.threads": 1}
    recipe = load_recipe(tmp_path / "recipe.toml", [f"{key}={value}" for key, value in settings.items()])
    assert to_table(recipe.model) == to_table(spec)
    assert spec.moe is not None
    load_weights(Decoder(replace(spec, moe=replace(spec.moe, router=RouterSpec(rule="gap")))), model)  # another rule
    from moestro.train import loop

    assert loop.start(recipe).finished
    before, after = load_model(model)[0].state_dict(), load_model(find_checkpoint(tmp_path / "run"))[0].state_dict()
    assert max(float((after[name] - before[name]).abs().max()) for name in before if name.endswith("weight")) < 1e-3
    export_folder(tmp_path / "run", tmp_path / "out")  # changed weights, but still the original's token ids
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["max_position_embeddings"], config["torch_dtype"]) == (3, 96, "float32")
    with pytest.raises(FamilyError, match=r"recipe.toml exists already; nothing is overwritten"):
        import_folder(source, tmp_path / "again", recipe=tmp_path / "recipe.toml")


def test_transformers_is_never_imported_by_the_package() -> None:
    for path in Path(moestro.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == "transformers" for name in names), path
