"""Bits per byte are right by arithmetic, and do not depend on how text is cut into batches."""

import gzip
import math
from pathlib import Path

import pytest
import torch

from moestro.core.specs import AttentionSpec, ModelSpec, MoESpec, RouterSpec
from moestro.nn.decoder import Decoder
from moestro.train.data import TokenData, open_data, prepare
from moestro.train.evaluate import class_of, compressors, evaluate, token_classes
from moestro.train.recipe import DataSpec


@pytest.fixture
def data(corpus: Path, tmp_path: Path) -> TokenData:
    prepare(DataSpec(source=str(corpus), heldout_share=0.2), tmp_path / "data")
    return open_data(tmp_path / "data")


def model(kind: str = "gqa", rule: str = "gap") -> Decoder:
    torch.manual_seed(0)
    spec = ModelSpec(
        num_layers=2,
        width=16,
        vocab_size=257,
        attention=AttentionSpec(kind=kind, num_heads=2, memory_length=64 if kind == "transformer_xl" else 0),  # type: ignore[arg-type]
        moe=MoESpec(num_experts=4, expert_width=8, router=RouterSpec(rule=rule)),  # type: ignore[arg-type]
        init_std=0.3,
    )
    made = Decoder(spec).initialise()
    for router in made.routers:
        router.budget.threshold.fill_(0.3)
    return made


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary(data: TokenData) -> None:
    blank = model()
    with torch.no_grad():
        blank.embedding.weight.zero_()
    found = evaluate(blank, data, length=32)
    assert found.loss == pytest.approx(math.log(257))
    assert found.tokens == len(data.heldout.token_N) - 1
    ends = len(data.heldout.names)
    assert found.text_bytes == found.tokens - ends
    assert found.bits_per_byte == pytest.approx(math.log2(257) * found.tokens / found.text_bytes)


@pytest.mark.parametrize("rule", ["gap", "expert_choice", "quantile"])
def test_batching_does_not_matter(data: TokenData, rule: str) -> None:
    made = model(rule=rule)
    one, many = (evaluate(made, data, length=32, sequences=n) for n in (1, 7))
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    assert one.mean_experts_per_layer == many.mean_experts_per_layer


def test_recurrent_models_read_in_order_with_memory(data: TokenData) -> None:
    made = model("transformer_xl")
    assert evaluate(made, data, length=16).loss == pytest.approx(evaluate(made, data, length=16, sequences=4).loss)
    forgetful = model("transformer_xl")
    for block in forgetful.blocks:
        block.attention.memory_length = 0
    assert evaluate(made, data, length=16).loss != pytest.approx(evaluate(forgetful, data, length=16).loss, abs=1e-4)


def test_a_limit_reads_that_many_windows_spread_over_the_text(data: TokenData) -> None:
    assert evaluate(model(), data, length=32, limit=5).tokens == 5 * 32


def test_evaluation_leaves_the_mode_as_it_was(data: TokenData) -> None:
    made = model()
    made.train()
    evaluate(made, data, length=32, limit=1)
    assert made.training


def test_experts_are_counted_by_the_kind_of_token(data: TokenData) -> None:
    found = evaluate(model(), data, length=32)
    shares = found.share_per_class
    assert sum(shares.values()) == pytest.approx(1.0)
    total = sum(found.mean_experts_per_class[name] * share for name, share in shares.items())
    assert total == pytest.approx(found.mean_experts, rel=1e-6)
    assert 1 < found.mean_experts < 2


@pytest.mark.parametrize(
    ("piece", "name"),
    [
        (b"\n    ", "line break"),
        (b"   ", "space"),
        (b" self", "word"),
        (b"__x", "word"),
        (b" 42", "number"),
        (b"):", "sign"),
        (b"", "end or special"),
        ("ü".encode(), "word"),
    ],
)
def test_token_classes(piece: bytes, name: str) -> None:
    assert class_of(piece) == name


def test_every_token_has_a_class(data: TokenData) -> None:
    assert len(token_classes(data.tokenizer)) == 257


def test_compressors_see_the_same_files_one_by_one(data: TokenData, corpus: Path) -> None:
    packed = sum(len(gzip.compress((corpus / name).read_bytes(), 9)) for name in data.heldout.names)
    assert compressors(data)["gzip -9"] == pytest.approx(8 * packed / data.heldout.text_bytes)
    assert compressors(data)["xz -9e"] > 0
