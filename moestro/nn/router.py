"""Choose experts for tokens, and keep the choice on budget and in balance.

    x_TD -> logits (float32) -> Scores -> rule (routing_rules) -> Choice, RoutingRecord
    records of a step -> merge -> Router.update   the threshold, the bias, the cut-offs for the next step

`forward` changes nothing: what it saw leaves in the record, so a forward pass repeated under activation recomputation
counts once, and the record of several micro-batches or ranks is their sum. State lives in buffers, so it is in
checkpoints; at evaluation nobody calls `update`, so it is frozen.

Dimension key:  T tokens   D width   E experts   K slots per token   B histogram bins
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.core.specs import RouterSpec
from moestro.nn import losses
from moestro.nn import routing_rules as rules
from moestro.nn.kernels import gpu
from moestro.nn.peers import Alone, Peers
from moestro.nn.permute import count_of, pairs_of
from moestro.nn.routing_budget import Budget, budget_at, histogram
from moestro.nn.routing_rules import Choice, Scores

L1_STEP = 1.2
"""relu: factor by which the sparsity weight follows the budget (ReMoE, Wang 2024)."""
L1_START = 1e-8
LOGGED = ("count_E", "loss", "balance", "entropy", "pair_X", "source_SE")
"""What is wanted of a record on the host."""
BIAS_ROUNDS = 4
"""quantile balancing: alternations of the dual solution."""


@dataclass(frozen=True, slots=True)
class RoutingRecord:
    """What one layer's router did with some tokens; additive over micro-batches and ranks."""

    count_E: Tensor
    """Realised assignments per expert."""
    tokens: int
    loss: Tensor
    """Weighted router losses, differentiable, mean over tokens; with peers, this rank's share of it."""
    balance: Tensor
    """Unweighted load-balancing loss: 1 when even."""
    entropy: Tensor
    """Mean entropy of the router's distribution, nats."""
    experts_T: Tensor
    """Experts of each token."""
    decision_B: Tensor | None = None
    """Histogram (routing_budget) of what the budget's threshold decides on."""
    decisions: int = 1
    """Decisions per token in that histogram."""
    cutoff_E: Tensor | None = None
    """The score at which each expert's share of tokens ends; expert_choice and quantile."""
    solved_bias_E: Tensor | None = None
    """The bias that would have balanced these tokens; quantile balancing."""
    pair_X: Tensor | None = None
    """How many tokens chose both of two experts (`permute.pairs_of`); in steps that count them."""
    source_SE: Tensor | None = None
    """The counts by where tokens come from; known once several ranks have told each other."""

    @property
    def mean_experts(self) -> float:
        """Assignments per token."""
        return float(self.count_E.sum()) / max(self.tokens, 1)


def merge(records: Sequence[RoutingRecord]) -> RoutingRecord:
    """The record of all tokens together; means are weighted by tokens, evenly where there are none here."""
    tokens = sum(record.tokens for record in records)
    weights = [record.tokens / tokens if tokens else 1 / len(records) for record in records]

    def mean(name: str) -> Tensor:
        parts = [getattr(record, name).detach() * weight for record, weight in zip(records, weights, strict=True)]
        return torch.stack(parts).sum(0)

    first = records[0]
    return RoutingRecord(
        count_E=torch.stack([record.count_E for record in records]).sum(0),
        tokens=tokens,
        loss=mean("loss"),
        balance=mean("balance"),
        entropy=mean("entropy"),
        experts_T=torch.cat([record.experts_T for record in records]),
        decision_B=None
        if first.decision_B is None
        else torch.stack([r.decision_B for r in records if r.decision_B is not None]).sum(0),
        decisions=first.decisions,
        cutoff_E=None if first.cutoff_E is None else mean("cutoff_E"),
        solved_bias_E=None if first.solved_bias_E is None else mean("solved_bias_E"),
        pair_X=None
        if first.pair_X is None
        else torch.stack([r.pair_X for r in records if r.pair_X is not None]).sum(0),
    )


def read_back(numbers: Sequence[Tensor], records: Sequence[RoutingRecord]) -> tuple[list[float], list[RoutingRecord]]:
    """Numbers, and what is logged of records, in one copy from the device; on a CPU the records themselves."""
    if all(number.device.type == "cpu" for number in numbers):
        return [float(number) for number in numbers], list(records)
    wanted = [{name: tensor for name in LOGGED if (tensor := getattr(record, name)) is not None} for record in records]
    parts = [*numbers, *(tensor.detach() for row in wanted for tensor in row.values())]
    flat = torch.cat([part.double().flatten() for part in parts]).cpu()
    values = [piece.view(part.shape) for piece, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
    left = iter(values[len(numbers) :])
    known = [
        replace(record, **{name: next(left).to(tensor.dtype) for name, tensor in row.items()})
        for record, row in zip(records, wanted, strict=True)
    ]
    return [float(value) for value in values[: len(numbers)]], known


class Router(nn.Module):
    """One linear map to expert scores, a rule, a budget and a balance."""

    bias_E: Tensor
    cutoff_E: Tensor
    updates: Tensor
    l1: Tensor
    step_count_E: Tensor

    def __init__(self, width: int, num_experts: int, spec: RouterSpec) -> None:
        super().__init__()
        self.spec, self.num_experts = spec, num_experts
        columns = num_experts + (spec.num_null if spec.rule == "null" else 0)
        self.weight_ED = nn.Parameter(torch.empty(columns, width))
        self.peers: Peers = Alone()
        self.fused: bool | None = None
        """By the Triton kernels: None where they know the rule and run."""
        self.counts_pairs = False
        """Whether records say which experts were chosen together."""
        self.budget = Budget(spec.threshold_decay, spec.integral_gain)
        if spec.rule == "topp" and spec.threshold:
            self.budget.threshold.fill_(spec.threshold)
        self.register_buffer("bias_E", torch.zeros(columns))
        self.register_buffer("cutoff_E", torch.full((num_experts,), 1 / columns if spec.score == "softmax" else 0.5))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("l1", torch.full((), L1_START))
        self.register_buffer("step_count_E", torch.zeros(num_experts), persistent=False)

    @property
    def steered(self) -> bool:
        """True where a threshold is moved to hold the budget."""
        return self.spec.rule == "gap" or (self.spec.rule == "topp" and not self.spec.threshold)

    def forward(self, x_TD: Tensor, sequences: int = 1) -> tuple[Choice, RoutingRecord]:
        """Choose experts.

        x_TD       tokens, sequence after sequence
        sequences  how many sequences of equal length they are
        returns    the choice, weights scaled by spec.weight_scale, and the record
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.fused if self.fused is not None else self._fusible(x_TD):
                return self._fused(x_TD.float())
            scores = self.scores(x_TD.float())
            choice, cutoff_E = self._choose(scores)
            record = self._record(scores, choice, cutoff_E, sequences)
            if self.spec.weights in ("renormalise", "straight"):
                choice = rules.renormalised(choice, straight=self.spec.weights == "straight")
        if self.spec.weight_scale != 1.0:
            choice = Choice(choice.expert_TK, choice.weight_TK * self.spec.weight_scale, choice.decision_TJ)
        return choice, record

    def scores(self, x_TD: Tensor) -> Scores:
        """Logits, scores in 0..1 and selection scores, all float32."""
        spec, logit_TE = self.spec, self._logits(x_TD)
        score_TE = logit_TE.softmax(-1) if spec.score == "softmax" else logit_TE.sigmoid()
        select_TE = score_TE.detach() + self.bias_E if spec.selection_bias != "none" else score_TE.detach()
        select_TE = rules.within_groups(select_TE, spec.num_groups, spec.groups_per_token, spec.group_score)
        return Scores(logit_TE, score_TE, select_TE)

    def _logits(self, x_TD: Tensor) -> Tensor:
        if self.training and self.spec.input_noise:
            x_TD = x_TD * (1 + self.spec.input_noise * (2 * torch.rand_like(x_TD) - 1))
        return F.linear(x_TD, self.weight_ED.float())

    def _fusible(self, x_TD: Tensor) -> bool:
        """True on a GPU where nn/kernels/gpu/routing.py knows the rule and no other rank has to be asked."""
        spec = self.spec
        weights = ("keep", "pair") if spec.rule == "gap" else ("keep", "renormalise", "straight")
        known = spec.rule in ("top1", "top2", "topk", "gap") and spec.weights in weights
        plain = spec.num_groups in (1, spec.groups_per_token) and spec.selection_bias != "quantile"
        alone = not self.training or isinstance(self.peers, Alone)
        return known and plain and alone and spec.aux_scope != "sequence" and x_TD.is_cuda and gpu.usable(x_TD)

    def _fused(self, x_TD: Tensor) -> tuple[Choice, RoutingRecord]:
        """`forward` in two launches after the linear map."""
        from moestro.nn.kernels.gpu.route import route

        spec = self.spec
        gap = spec.rule == "gap"
        found = route(
            self._logits(x_TD),
            self.bias_E if spec.selection_bias != "none" else None,
            self.budget.threshold,
            self.step_count_E if spec.aux_scope == "global" else torch.zeros_like(self.step_count_E),
            slots=2 if gap else spec.max_experts,
            softmax=spec.score == "softmax",
            gap=gap,
            weights=spec.weights,
            scale=spec.weight_scale,
            aux=spec.aux_loss,
            z=spec.z_loss,
        )
        record = RoutingRecord(
            count_E=found.count_E,
            tokens=len(x_TD),
            loss=found.loss,
            balance=found.balance,
            entropy=found.entropy,
            experts_T=found.used_T,
            decision_B=found.decision_B.float() if gap and self.training else None,
            pair_X=self._pairs(found.expert_TK),
        )
        return Choice(found.expert_TK, found.weight_TK, found.gap_T[:, None] if gap else None), record

    def _choose(self, scores: Scores) -> tuple[Choice, Tensor | None]:
        """Apply the rule; also the cut-offs that rules with one per expert would have wanted."""
        spec, threshold = self.spec, self.budget.threshold
        match spec.rule:
            case "top1" | "top2" | "topk":
                return rules.top_k(scores, spec.max_experts), None
            case "gap":
                return rules.gap(scores, threshold, spec.score == "softmax", spec.weights, spec.ramp_width), None
            case "topp":
                return rules.top_p(scores, threshold, spec.k), None
            case "gshard":
                return rules.gshard(scores, self.training, spec.weights), None
            case "null":
                return rules.null_experts(scores, spec.k, self.num_experts), None
            case "relu":
                weight_TE = scores.logit_TE.relu()
                return rules.by_mask(weight_TE > 0, weight_TE), None
            case "expert_choice":
                if not self.training:  # a token's experts may not depend on later tokens
                    return rules.by_mask(scores.select_TE >= self.cutoff_E, scores.score_TE), None
                every_TE, own = self.peers.gather(scores.select_TE)
                taken_TE, cutoff_E = rules.best_tokens(every_TE, spec.mean_experts)
                return rules.by_mask(taken_TE[own], scores.score_TE), cutoff_E
            case "quantile":
                share = max(1 - spec.mean_experts / self.num_experts, 0.0)
                wanted_E = (
                    torch.quantile(self.peers.gather(scores.select_TE)[0], share, dim=0) if self.training else None
                )
                return rules.by_mask(scores.select_TE > self.cutoff_E, scores.score_TE), wanted_E

    def _record(self, scores: Scores, choice: Choice, cutoff_E: Tensor | None, sequences: int) -> RoutingRecord:
        used_TK = choice.expert_TK < self.num_experts
        count_E = count_of(choice.expert_TK.flatten(), self.num_experts + 1)[: self.num_experts].float()
        prob_TE = scores.score_TE if self.spec.score == "softmax" else F.normalize(scores.score_TE, p=1, dim=-1)
        whole_E, tokens = self._whole(count_E, len(prob_TE))
        balance = self._balance(prob_TE, choice.expert_TK, whole_E, sequences, tokens)
        decisions = None if choice.decision_TJ is None or not self.training else choice.decision_TJ
        return RoutingRecord(
            count_E=count_E,
            tokens=len(choice.expert_TK),
            loss=self._loss(scores, choice, balance, whole_E, tokens),
            balance=balance.detach(),
            entropy=losses.mean_entropy(prob_TE.detach(), tokens),
            experts_T=used_TK.sum(-1),
            decision_B=None if decisions is None else histogram(decisions),
            decisions=1 if decisions is None else decisions.shape[1],
            cutoff_E=cutoff_E,
            solved_bias_E=self._solved_bias(scores) if self.training else None,
            pair_X=self._pairs(choice.expert_TK),
        )

    def _pairs(self, expert_TK: Tensor) -> Tensor | None:
        return pairs_of(expert_TK.long(), self.num_experts) if self.counts_pairs and self.training else None

    def _whole(self, count_E: Tensor, tokens: int) -> tuple[Tensor, Tensor | None]:
        """Counts and tokens of the micro-batch on all ranks; None where the tokens here are all there are."""
        if not self.training or isinstance(self.peers, Alone):
            return count_E, None
        whole = self.peers.sum(torch.cat([count_E, count_E.new_tensor([tokens])]))
        return whole[:-1], whole[-1]

    def _balance(
        self, prob_TE: Tensor, expert_TK: Tensor, count_E: Tensor, sequences: int, tokens: Tensor | None
    ) -> Tensor:
        if self.spec.aux_scope == "sequence":
            return losses.sequence_balance_loss(prob_TE[:, : self.num_experts], expert_TK, sequences, tokens)
        if self.spec.aux_scope == "global":
            count_E = count_E + self.step_count_E
        idle = prob_TE.shape[1] - self.num_experts
        if idle:  # idle experts count as equal shares of all that went to any of them
            slots = expert_TK.numel() if tokens is None else expert_TK.shape[1] * tokens
            rest = (slots - count_E.sum()).clamp(min=0) / idle
            count_E = torch.cat([count_E, rest.expand(idle)])
        return losses.balance_loss(prob_TE, count_E, tokens)

    def _loss(self, scores: Scores, choice: Choice, balance: Tensor, count_E: Tensor, tokens: Tensor | None) -> Tensor:
        spec = self.spec
        if spec.rule == "relu":
            return self.l1 * losses.sparsity_loss(choice.weight_TK, count_E, spec.mean_experts, tokens)
        loss = spec.aux_loss * balance
        return loss + spec.z_loss * losses.z_loss(scores.logit_TE, tokens) if spec.z_loss else loss

    @torch.no_grad()
    def _solved_bias(self, scores: Scores) -> Tensor | None:
        if self.spec.selection_bias != "quantile":
            return None
        return balancing_bias(self.peers.gather(scores.score_TE)[0], self.spec.expected_experts)

    @torch.no_grad()
    def update(self, record: RoutingRecord, progress: float) -> None:
        """Move thresholds and biases after an optimiser step, without asking the device for anything.

        record    all tokens of the step, merged over micro-batches and ranks
        progress  share of the run that is done, 0..1
        """
        spec = self.spec
        self.forget_step()
        if self.steered and record.decision_B is not None:
            wanted = budget_at(progress, spec.start_experts, spec.mean_experts, spec.anneal_share)
            used = record.count_E.sum() / max(record.tokens, 1)
            self.budget.update(record.decision_B, record.decisions, used, wanted)
        if spec.selection_bias == "loss_free":
            error_E = record.count_E.mean() - record.count_E
            self.bias_E[: self.num_experts] += spec.bias_rate * error_E.sign()
        decay = (self.updates / (self.updates + 1)).clamp(max=spec.threshold_decay)
        if record.solved_bias_E is not None:
            self.bias_E.lerp_(record.solved_bias_E, 1 - decay)
        if record.cutoff_E is not None:
            self.cutoff_E.lerp_(record.cutoff_E, 1 - decay)
        if spec.rule == "relu":
            over = record.count_E.sum() > spec.mean_experts * max(record.tokens, 1)
            self.l1 *= torch.where(over, L1_STEP, 1 / L1_STEP)
        self.updates += 1

    def forget_step(self) -> None:
        """Drop what was counted for a step that is not applied."""
        self.step_count_E.zero_()

    @torch.no_grad()
    def count_micro_batch(self, record: RoutingRecord) -> None:
        """Let later micro-batches of the same step see this one's loads; for aux_scope global."""
        if self.spec.aux_scope == "global":
            self.step_count_E += self.peers.sum(record.count_E)


def balancing_bias(score_TE: Tensor, mean_experts: float) -> Tensor:
    """The bias per expert under which top-k over score + bias gives every expert the same load.

    Dual of the balanced assignment problem, solved by alternating quantiles (Su 2026): the token's price is its
    (k+1)-th best adjusted score, the expert's the (1 - k/E) quantile of score minus token price.
    """
    num_experts = score_TE.shape[1]
    rank = min(max(round(mean_experts) + 1, 1), num_experts)
    share = min(max(1 - mean_experts / num_experts, 0.0), 1.0)
    price_E = torch.zeros_like(score_TE[0])
    for _ in range(BIAS_ROUNDS):
        price_T1 = (score_TE - price_E).topk(rank, dim=-1).values[:, -1:]
        price_E = torch.quantile(score_TE - price_T1, share, dim=0)
    return -price_E
