"""The whole model: causal, cacheable, the same under recomputation, and counted once."""

from typing import Any

import pytest
import torch

from moestro.core.errors import ConfigError
from moestro.core.specs import AttentionSpec, ModelSpec, MoESpec, RouterSpec
from moestro.nn.decoder import Decoder, parameter_counts
from moestro.nn.sampling import continue_text, pick

ATTENTION: dict[str, dict[str, Any]] = {
    "gqa": {"num_kv_heads": 2},
    "mla": {"kind": "mla", "head_dim": 8, "kv_rank": 12, "rope_head_dim": 4},
    "transformer_xl": {"kind": "transformer_xl", "memory_length": 64},
}


def model(attention: str = "gqa", rule: str = "gap", **fields: Any) -> Decoder:
    torch.manual_seed(0)
    router = RouterSpec(rule=rule, num_null=2)  # type: ignore[arg-type]
    spec = ModelSpec(
        num_layers=2,
        width=32,
        vocab_size=50,
        dense_layers=(0,),
        dense_width=48,
        attention=AttentionSpec(**ATTENTION[attention]),
        moe=MoESpec(num_experts=4, expert_width=16, shared_width=8, router=router),
        init_std=0.2,
        **fields,
    )
    made = Decoder(spec).initialise()
    for router_module in made.routers:
        router_module.budget.threshold.fill_(0.3)
    return made


TOKENS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("rule", ["gap", "topp", "relu"])
def test_token_by_token_equals_all_at_once(attention: str, rule: str) -> None:
    made = model(attention, rule).eval()
    caches = made.empty_caches()
    whole = made(TOKENS).logit_BSV
    parts = [made(part, caches).logit_BSV for part in TOKENS.split([5, 1, 1, 1, 4], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
def test_recomputation_changes_nothing_and_counts_once(attention: str) -> None:
    results = []
    for recompute in (False, True):
        made = model(attention)
        made.recompute = recompute
        caches = made.empty_caches() if attention == "transformer_xl" else None
        made.loss(TOKENS, caches)  # a segment before, so that there is memory
        loss, records = made.loss(TOKENS, caches)
        (loss + records[0].loss).backward()
        grads = [p.grad for p in made.parameters()]
        results.append((loss.detach(), records[0].count_E, grads, caches and caches[1].length))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][3] == results[1][3]
    for left, right in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_gshard_draws_the_same_experts_when_recomputed() -> None:
    made = model(rule="gshard")
    made.recompute = True
    torch.manual_seed(3)
    loss, _ = made.loss(TOKENS)
    loss.backward()
    kept = [p.grad.clone() for p in made.parameters() if p.grad is not None]
    made.zero_grad()
    made.recompute = False
    torch.manual_seed(3)
    made.loss(TOKENS)[0].backward()
    now = [p.grad for p in made.parameters() if p.grad is not None]
    assert all(torch.equal(left, right) for left, right in zip(kept, now, strict=True))


def test_the_loss_is_that_of_the_logits() -> None:
    made = model()
    logits = made(TOKENS[:, :-1]).logit_BSV
    right = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(made.loss(TOKENS)[0], right)


def test_a_tied_head_is_the_embedding() -> None:
    tied, free = model(), model(tied_head=False)
    assert tied.head_weight_VD is tied.embedding.weight
    assert free.head is not None
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == 50 * 32


def test_parameters_used_per_token_count_experts_by_the_budget() -> None:
    made = model()
    total, used = parameter_counts(made, made.spec)
    assert total == sum(p.numel() for p in made.parameters())
    assert total - used == pytest.approx(4 * 3 * 32 * 16 * (1 - 1.35 / 4))


def test_maps_that_write_to_the_stream_start_smaller() -> None:
    made = model()
    weights = made.state_dict()
    assert float(weights["blocks.0.attention.out.weight"].std()) == pytest.approx(0.2 / 2, rel=0.2)
    assert float(weights["blocks.0.attention.q.weight"].std()) == pytest.approx(0.2, rel=0.2)


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 0"):
        Decoder(ModelSpec(num_layers=1, width=32, dense_width=8))


def test_sampling() -> None:
    made = model().eval()
    again = [next(iter(continue_text(made, [1, 2], temperature=0.5, seed=7))) for _ in range(2)]
    assert again[0] == again[1]
    greedy = continue_text(made, [1, 2, 3], temperature=0)
    first, second = next(greedy), next(greedy)
    assert first == int(made(torch.tensor([[1, 2, 3]])).logit_BSV[0, -1].argmax())
    assert second == int(made(torch.tensor([[1, 2, 3, first]])).logit_BSV[0, -1].argmax())
    assert list(continue_text(made, [1, 2, 3], temperature=0, stop=first)) == []
    logits = torch.tensor([0.0, 5.0, 4.0])
    drawn = {pick(logits, 10.0, 2, torch.Generator().manual_seed(i)) for i in range(50)}
    assert drawn == {1, 2}
