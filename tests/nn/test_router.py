"""The router: choices are causal and on record, state moves only in `update`, and every rule holds what it promises."""

from typing import Any

import pytest
import torch

from moestro.core.specs import RouterSpec
from moestro.nn.router import Router, RoutingRecord, balancing_bias, merge

RULES = ["top1", "top2", "topk", "gap", "topp", "gshard", "null", "relu", "expert_choice", "quantile"]


def router(rule: str = "gap", experts: int = 8, **fields: Any) -> Router:
    torch.manual_seed(0)
    made = Router(16, experts, RouterSpec(rule=rule, num_null=8 if rule == "null" else 0, **fields))  # type: ignore[arg-type]
    with torch.no_grad():
        made.weight_ED.normal_(0, 0.5)
    return made


def tokens(number: int = 512, seed: int = 1) -> torch.Tensor:
    return torch.randn(number, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", RULES)
def test_a_record_counts_what_was_chosen(rule: str) -> None:
    choice, record = router(rule)(tokens())
    used = choice.expert_TK[choice.expert_TK < 8]
    assert torch.equal(record.count_E, torch.bincount(used, minlength=8).float())
    assert record.experts_T.sum() == len(used)
    assert (choice.weight_TK[choice.expert_TK == 8] == 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_record_counts_pairs_in_training_where_it_is_asked_to(rule: str) -> None:
    made, x = router(rule), tokens(64)
    assert made(x)[1].pair_X is None
    made.counts_pairs = True
    choice, record = made(x)
    chosen = [set(row) - {8} for row in choice.expert_TK.tolist()]
    pairs = [(one, other) for one in range(8) for other in range(one + 1, 8)]
    assert record.pair_X is not None
    assert record.pair_X.tolist() == [sum({*pair} <= experts for experts in chosen) for pair in pairs]
    assert made.eval()(x)[1].pair_X is None


@pytest.mark.parametrize("rule", RULES)
def test_a_forward_pass_changes_no_state(rule: str) -> None:
    made = router(rule)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made(tokens())
    for name, value in made.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", RULES)
def test_at_evaluation_a_tokens_experts_do_not_depend_on_the_other_tokens(rule: str) -> None:
    made = router(rule)
    for _ in range(3):
        made.update(made(tokens())[1], progress=1.0)
    made.eval()
    x = tokens(64, seed=2)
    together, alone = made(x)[0], [made(x[i : i + 1])[0] for i in range(64)]
    assert torch.equal(together.expert_TK, torch.cat([choice.expert_TK for choice in alone]))
    torch.testing.assert_close(together.weight_TK, torch.cat([choice.weight_TK for choice in alone]))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_the_router_a_gradient(rule: str) -> None:
    made = router(rule, aux_loss=0.0)
    made.budget.threshold.fill_(0.2)
    choice, _ = made(tokens())
    (choice.weight_TK * torch.randn_like(choice.weight_TK)).sum().backward()
    assert made.weight_ED.grad is not None
    assert made.weight_ED.grad.abs().sum() > 0.01


def test_scores_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        choice, record = router()(tokens().bfloat16())
    assert choice.weight_TK.dtype == record.loss.dtype == torch.float32


def run_steps(made: Router, steps: int, drift: float = 0.0) -> list[RoutingRecord]:
    """Steps of fresh tokens, while the router's weights grow: the distribution of gaps moves under the threshold."""
    records = []
    for step in range(steps):
        record = made(tokens(1024, seed=step))[1]
        made.update(record, progress=(step + 1) / steps)
        with torch.no_grad():
            made.weight_ED *= 1 + drift
        records.append(record)
    return records


@pytest.mark.parametrize("rule", ["gap", "topp"])
@pytest.mark.parametrize("target", [1.2, 1.35, 1.5])
def test_the_threshold_holds_the_budget_while_scores_drift(rule: str, target: float) -> None:
    records = run_steps(router(rule, mean_experts=target, start_experts=2.0, anneal_share=0.1), 600, drift=0.004)
    means = torch.tensor([record.mean_experts for record in records])
    assert float(means[0]) == 2.0
    windows = means[120:].unfold(0, 200, 1).mean(-1)
    assert float((windows - target).abs().max()) <= 0.01


def test_the_budget_is_annealed() -> None:
    made = router(mean_experts=1.2, start_experts=2.0, anneal_share=0.5, threshold_decay=0.5)
    records = run_steps(made, 200)
    assert records[50].mean_experts == pytest.approx(1.6, abs=0.05)
    assert records[190].mean_experts == pytest.approx(1.2, abs=0.03)


def lopsided(rule: str, **fields: Any) -> Router:
    made = router(rule, **fields)
    with torch.no_grad():
        made.weight_ED[0] *= 3  # its scores vary most: first choice far too often
    return made


def spread(record: RoutingRecord) -> float:
    return float(record.count_E.max() / record.count_E.mean())


@pytest.mark.parametrize(("balance", "rate", "steps"), [("loss_free", 0.003, 300), ("quantile", 0.001, 40)])
def test_a_bias_balances_loads_without_touching_weights(balance: str, rate: float, steps: int) -> None:
    made = lopsided("top2", weights="keep", selection_bias=balance, bias_rate=rate, aux_loss=0.0)
    records = run_steps(made, steps)
    assert spread(records[0]) > 1.4
    assert spread(merge(records[-10:])) < 1.15
    x = tokens()
    choice, _ = made(x)
    raw = (x @ made.weight_ED.T).softmax(-1).gather(1, choice.expert_TK)
    torch.testing.assert_close(choice.weight_TK, raw)


def test_balancing_bias_evens_a_hand_made_case() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])  # all prefer expert 0; half must move
    bias = balancing_bias(scores, mean_experts=1)
    assert (scores + bias).argmax(-1).tolist() == [0, 0, 1, 1]


def test_quantile_gives_every_expert_its_share() -> None:
    records = run_steps(lopsided("quantile", mean_experts=2.0), 60)
    assert spread(merge(records[-10:])) < 1.1
    assert records[-1].mean_experts == pytest.approx(2, abs=0.1)


def test_relu_sparsity_follows_the_budget() -> None:
    made = router("relu", mean_experts=2.0)
    records = [
        RoutingRecord(torch.full((8,), 8.0 * mean), 64, *[torch.zeros(())] * 3, torch.zeros(64)) for mean in (4, 4, 1)
    ]
    strengths = []
    for record in records:
        made.update(record, 0.5)
        strengths.append(float(made.l1) / 1e-8)
    assert strengths == pytest.approx([1.2, 1.44, 1.2])


def test_global_balance_sees_earlier_micro_batches() -> None:
    made = router("top1", aux_scope="global")
    x = tokens(64)
    _, first = made(x)
    made.count_micro_batch(first)
    _, second = made(x)
    assert float(second.loss.detach()) == pytest.approx(
        float(first.loss.detach())
    )  # twice the same counts: same shares
    made.step_count_E.zero_()
    made.step_count_E[0] = 1e6
    _, swayed = made(x)
    assert float(swayed.loss.detach()) != pytest.approx(float(first.loss.detach()), rel=0.01)


def test_records_of_parts_merge_to_the_record_of_the_whole() -> None:
    made, x = router(), tokens(96)
    made.budget.threshold.fill_(0.3)
    made.counts_pairs = True
    whole, parts = made(x)[1], merge([made(part)[1] for part in x.split([32, 64])])
    assert torch.equal(whole.count_E, parts.count_E)
    assert whole.pair_X is not None
    assert parts.pair_X is not None
    assert torch.equal(whole.pair_X, parts.pair_X)
    assert whole.decision_B is not None
    assert parts.decision_B is not None
    assert torch.equal(whole.decision_B, parts.decision_B)
    assert (whole.tokens, whole.mean_experts) == (parts.tokens, parts.mean_experts)
    assert float(whole.entropy) == pytest.approx(float(parts.entropy))


def test_input_noise_is_for_training_only() -> None:
    made, x = router(input_noise=0.5), tokens()
    assert not torch.equal(made.scores(x).logit_TE, made.scores(x).logit_TE)
    made.eval()
    assert torch.equal(made.scores(x).logit_TE, made.scores(x).logit_TE)
