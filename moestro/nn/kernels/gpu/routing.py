"""Router scores to a choice of experts, its losses and counts: two launches forward, one backward.

    logit_TE -> route_tokens   scores, best experts, threshold, weights; sums of every block of tokens
             -> sum_blocks     counts, balance, z and entropy, in the order of blocks
    d_weight_TK, d_loss -> route_backward -> d_logit_TE     scores are made again from the logits

Equal to nn/router.py for the rules it knows (top1, top2, topk and gap, scores by softmax or sigmoid); others stay in
plain torch. The histogram of decisions is counted with integer atomics, whose sum has no order; nothing else is atomic.

Dimension key:  T tokens   E experts   K slots   B histogram bins
"""

import triton
import triton.language as tl

from moestro.nn.routing_budget import BINS, LOWEST, PER_UNIT

EDGE = tl.constexpr(LOWEST)
SCALE = tl.constexpr(float(PER_UNIT))
LAST = tl.constexpr(BINS - 1)
KEEP, PAIR, RENORMALISE, STRAIGHT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
MODES = {"keep": 0, "pair": 1, "renormalise": 2, "straight": 3}
"""How weights follow from scores; see nn/routing_rules.py."""


@triton.jit
def load_scores(logit_ptr, token, tokens, EXPERTS: tl.constexpr, WIDE: tl.constexpr, SOFTMAX: tl.constexpr):
    """Logits (-inf beyond the experts), their log-partition and softmax, and the scores."""
    expert = tl.arange(0, WIDE)[None, :]
    inside = (token < tokens)[:, None] & (expert < EXPERTS)
    place = token[:, None].to(tl.int64) * EXPERTS + expert
    logit = tl.load(logit_ptr + place, mask=inside, other=0.0)
    logit = tl.where(expert < EXPERTS, logit, float("-inf"))
    highest = tl.max(logit, axis=1)
    power = tl.exp(logit - highest[:, None])
    total = tl.sum(power, axis=1)
    soft = power / total[:, None]
    score = soft if SOFTMAX else tl.where(expert < EXPERTS, tl.sigmoid(logit), 0.0)
    return logit, highest + tl.log(total), soft, score


@triton.jit
def route_block(
    block, logit_ptr, bias_ptr, threshold_ptr, expert_ptr, weight_ptr, used_ptr, gap_ptr, second_ptr, histogram_ptr,
    tokens,
    EXPERTS: tl.constexpr, WIDE: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr,
    BIASED: tl.constexpr, GAP: tl.constexpr, MODE: tl.constexpr, WEIGHT_SCALE: tl.constexpr,
):  # fmt: skip
    """Choose for ROWS tokens; returns counts and sums of probabilities by expert, of squared z, and of entropies."""
    token = block * ROWS + tl.arange(0, ROWS)
    live = token < tokens
    column = tl.arange(0, WIDE)[None, :]
    logit, partition, _, score = load_scores(logit_ptr, token, tokens, EXPERTS, WIDE, SOFTMAX)
    select = score
    if BIASED:
        select += tl.load(bias_ptr + column, mask=column < EXPERTS, other=0.0)
    select = tl.where(column < EXPERTS, select, float("-inf"))
    target = token.to(tl.int64) * SLOTS
    if GAP:
        first = tl.minimum(tl.argmax(select, axis=1), EXPERTS - 1)
        is_first = column == first[:, None]
        second = tl.minimum(tl.argmax(tl.where(is_first, float("-inf"), select), axis=1), EXPERTS - 1)
        is_second = column == second[:, None]
        best = tl.sum(tl.where(is_first, score, 0.0), axis=1)
        next = tl.sum(tl.where(is_second, score, 0.0), axis=1)
        if SOFTMAX:
            apart = tl.sum(tl.where(is_first, logit, 0.0), axis=1) - tl.sum(tl.where(is_second, logit, 0.0), axis=1)
            gap = 2.0 * tl.sigmoid(apart) - 1.0  # tanh of half of it
        else:
            gap = (best - next) / (best + next + 1e-20)
        gap = tl.maximum(gap, 0.0)
        taken = gap <= tl.load(threshold_ptr)
        tl.store(gap_ptr + token, gap, mask=live)
        tl.store(second_ptr + token, second, mask=live)
        bounded = tl.minimum(tl.maximum(gap, 1e-7), 1.0 - 1e-7)
        bin = ((tl.log(bounded / (1.0 - bounded)) - EDGE) * SCALE).to(tl.int32)
        bin = tl.minimum(tl.maximum(bin, 0), LAST)
        tl.atomic_add(histogram_ptr + bin, tl.full([ROWS], 1, dtype=tl.int32), mask=live)
        whole = best + next + 1e-20 if MODE == PAIR else tl.full([ROWS], 1.0, dtype=tl.float32)
        tl.store(expert_ptr + target, first.to(tl.int64), mask=live)
        tl.store(expert_ptr + target + 1, tl.where(taken, second, EXPERTS).to(tl.int64), mask=live)
        tl.store(weight_ptr + target, best / whole * WEIGHT_SCALE, mask=live)
        tl.store(weight_ptr + target + 1, tl.where(taken, next / whole * WEIGHT_SCALE, 0.0), mask=live)
        tl.store(used_ptr + token, tl.where(taken, 2, 1).to(tl.int64), mask=live)
        chosen = is_first.to(tl.float32) + tl.where(taken[:, None], is_second.to(tl.float32), 0.0)
    else:
        chosen = tl.zeros([ROWS, WIDE], dtype=tl.float32)
        whole = tl.full([ROWS], 1e-20, dtype=tl.float32)
        for slot in tl.static_range(SLOTS):
            best_expert = tl.minimum(tl.argmax(select, axis=1), EXPERTS - 1)
            here = column == best_expert[:, None]
            best = tl.sum(tl.where(here, score, 0.0), axis=1)
            tl.store(expert_ptr + target + slot, best_expert.to(tl.int64), mask=live)
            tl.store(weight_ptr + target + slot, best * WEIGHT_SCALE, mask=live)
            whole += best
            chosen += here.to(tl.float32)
            select = tl.where(here, float("-inf"), select)
        if MODE == RENORMALISE or MODE == STRAIGHT:
            tl.debug_barrier()  # what was just stored is read back
            for slot in tl.static_range(SLOTS):
                weight = tl.load(weight_ptr + target + slot, mask=live, other=0.0)
                tl.store(weight_ptr + target + slot, weight / whole, mask=live)
        tl.store(used_ptr + token, tl.full([ROWS], SLOTS, dtype=tl.int64), mask=live)
    probability = score if SOFTMAX else score / tl.maximum(tl.sum(score, axis=1), 1e-12)[:, None]
    probability = tl.where(live[:, None], probability, 0.0)
    entropy = -tl.sum(probability * tl.log(tl.maximum(probability, 1e-20)), axis=1)
    count = tl.sum(tl.where(live[:, None], chosen, 0.0), axis=0)
    squared = tl.sum(tl.where(live, partition * partition, 0.0), axis=0)
    return count, tl.sum(probability, axis=0), squared, tl.sum(entropy, axis=0)


@triton.jit(do_not_specialize=["tokens", "programs"])
def route_tokens(
    logit_ptr, bias_ptr, threshold_ptr, expert_ptr, weight_ptr, used_ptr, gap_ptr, second_ptr, histogram_ptr, block_ptr,
    tokens, programs,
    EXPERTS: tl.constexpr, WIDE: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr,
    BIASED: tl.constexpr, GAP: tl.constexpr, MODE: tl.constexpr, WEIGHT_SCALE: tl.constexpr,
):  # fmt: skip
    """Every so many'th block of tokens; block_ptr gets [2 WIDE + 2]: counts, probabilities, squared z, entropy."""
    count = tl.zeros([WIDE], dtype=tl.float32)
    probability = tl.zeros([WIDE], dtype=tl.float32)
    squared = 0.0
    entropy = 0.0
    for block in range(tl.program_id(0), tl.cdiv(tokens, ROWS), programs):
        more_count, more_probability, more_squared, more_entropy = route_block(
            block, logit_ptr, bias_ptr, threshold_ptr, expert_ptr, weight_ptr, used_ptr, gap_ptr, second_ptr,
            histogram_ptr, tokens, EXPERTS, WIDE, SLOTS, ROWS, SOFTMAX, BIASED, GAP, MODE, WEIGHT_SCALE,
        )  # fmt: skip
        count += more_count
        probability += more_probability
        squared += more_squared
        entropy += more_entropy
    out = block_ptr + tl.program_id(0) * (2 * WIDE + 2)
    tl.store(out + tl.arange(0, WIDE), count)
    tl.store(out + WIDE + tl.arange(0, WIDE), probability)
    tl.store(out + 2 * WIDE, squared)
    tl.store(out + 2 * WIDE + 1, entropy)


@triton.jit(do_not_specialize=["blocks", "tokens"])
def sum_blocks(
    block_ptr, seen_ptr, count_ptr, share_ptr, number_ptr, blocks, tokens, aux, z,
    EXPERTS: tl.constexpr, WIDE: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Counts, each expert's share, and loss, balance, entropy; seen_ptr: counts of earlier micro-batches."""
    expert = tl.arange(0, WIDE)
    count = tl.zeros([WIDE], dtype=tl.float32)
    probability = tl.zeros([WIDE], dtype=tl.float32)
    squared = 0.0
    entropy = 0.0
    for start in range(0, blocks, HIGH):
        block = start + tl.arange(0, HIGH)
        place = block_ptr + block * (2 * WIDE + 2)
        inside = block < blocks
        count += tl.sum(tl.load(place[:, None] + expert[None, :], mask=inside[:, None], other=0.0), axis=0)
        probability += tl.sum(tl.load(place[:, None] + WIDE + expert[None, :], mask=inside[:, None], other=0.0), axis=0)
        squared += tl.sum(tl.load(place + 2 * WIDE, mask=inside, other=0.0), axis=0)
        entropy += tl.sum(tl.load(place + 2 * WIDE + 1, mask=inside, other=0.0), axis=0)
    live = expert < EXPERTS
    tl.store(count_ptr + expert, count, mask=live)
    seen = tl.where(live, count + tl.load(seen_ptr + expert, mask=live, other=0.0), 0.0)
    share = seen / tl.maximum(tl.sum(seen, axis=0), 1.0)
    tl.store(share_ptr + expert, share, mask=live)
    balance = EXPERTS * tl.sum(share * probability, axis=0) / tokens
    tl.store(number_ptr, aux * balance + z * (squared / tokens))
    tl.store(number_ptr + 1, balance)
    tl.store(number_ptr + 2, entropy / tokens)


@triton.jit(do_not_specialize=["tokens"])
def route_backward(
    logit_ptr, expert_ptr, weight_ptr, second_ptr, share_ptr, d_weight_ptr, d_loss_ptr, d_logit_ptr, tokens, aux, z,
    EXPERTS: tl.constexpr, WIDE: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, SOFTMAX: tl.constexpr,
    MODE: tl.constexpr, WEIGHT_SCALE: tl.constexpr,
):  # fmt: skip
    """d_logit from the weights' gradient and the loss's."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = token < tokens
    column = tl.arange(0, WIDE)[None, :]
    _, partition, soft, score = load_scores(logit_ptr, token, tokens, EXPERTS, WIDE, SOFTMAX)
    d_loss = tl.load(d_loss_ptr)
    d_chosen = tl.zeros([ROWS, WIDE], dtype=tl.float32)
    chosen = tl.zeros([ROWS, WIDE], dtype=tl.float32)
    drawn = tl.zeros([ROWS], dtype=tl.float32)  # sum over slots of d_weight times weight
    for slot in tl.static_range(SLOTS):
        place = token.to(tl.int64) * SLOTS + slot
        expert = tl.load(expert_ptr + place, mask=live, other=EXPERTS)
        here = (column == expert[:, None]) & (expert < EXPERTS)[:, None]
        d_weight = tl.load(d_weight_ptr + place, mask=live & (expert < EXPERTS), other=0.0)
        drawn += d_weight * tl.load(weight_ptr + place, mask=live, other=0.0)
        d_chosen += tl.where(here, d_weight[:, None] * WEIGHT_SCALE, 0.0)
        chosen += here.to(tl.float32)
    if MODE == PAIR:  # the sum is of the two best, taken or not
        chosen = (column == tl.load(expert_ptr + token.to(tl.int64) * SLOTS, mask=live, other=0)[:, None]).to(
            tl.float32
        )
        chosen += (column == tl.load(second_ptr + token, mask=live, other=0)[:, None]).to(tl.float32)
    whole = tl.sum(chosen * score, axis=1) + 1e-20
    if MODE == KEEP:
        d_score = d_chosen
    elif MODE == STRAIGHT:
        d_score = d_chosen / whole[:, None]
    else:
        d_score = tl.where(chosen > 0, d_chosen - drawn[:, None], 0.0) / whole[:, None]
    d_probability = d_loss * aux * EXPERTS / tokens * tl.load(share_ptr + column, mask=column < EXPERTS, other=0.0)
    if SOFTMAX:
        d_score += d_probability
        d_logit = soft * (d_score - tl.sum(soft * d_score, axis=1)[:, None])
    else:
        total = tl.maximum(tl.sum(score, axis=1), 1e-12)[:, None]
        mean = tl.sum(d_probability * score / total, axis=1)[:, None]
        d_score += (d_probability - mean) / total
        d_logit = d_score * score * (1.0 - score)
    d_logit += d_loss * z * 2.0 / tokens * partition[:, None] * soft
    place = token[:, None].to(tl.int64) * EXPERTS + column
    tl.store(d_logit_ptr + place, d_logit, mask=live[:, None] & (column < EXPERTS))
