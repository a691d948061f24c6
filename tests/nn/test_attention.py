"""Attention: what a token sees, and that generating token by token sees the same."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moestro.core.specs import AttentionSpec, ModelSpec, RopeSpec
from moestro.nn.attention import Cache, GroupedQueryAttention, LatentAttention, attend
from moestro.nn.decoder import Decoder
from moestro.nn.norms import RMSNorm
from moestro.nn.recurrence import RecurrentAttention, shift_relative, sinusoids
from moestro.nn.rope import Rotary


def spec(**attention: Any) -> ModelSpec:
    return ModelSpec(num_layers=1, width=32, dense_width=8, attention=AttentionSpec(**attention))


KINDS = {
    "gqa": (GroupedQueryAttention, {"num_kv_heads": 2, "qk_norm": "head"}),
    "row norm": (GroupedQueryAttention, {"qk_norm": "row", "bias": True}),
    "window": (GroupedQueryAttention, {"window": 3}),
    "mla": (LatentAttention, {"kind": "mla", "head_dim": 8, "kv_rank": 12, "rope_head_dim": 4, "q_rank": 10}),
    "mla plain": (
        LatentAttention,
        {"kind": "mla", "head_dim": 8, "kv_rank": 12, "rope_head_dim": 4, "value_head_dim": 6},
    ),
    "xl": (RecurrentAttention, {"kind": "transformer_xl", "memory_length": 100}),
}


@pytest.fixture(params=KINDS)
def attention(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    kind, fields = KINDS[request.param]
    made = kind(spec(**fields))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def test_no_token_sees_a_later_one(attention: torch.nn.Module) -> None:
    x = torch.randn(1, 10, 32)
    changed = x.clone()
    changed[:, 6:] += 1
    torch.testing.assert_close(attention(x)[:, :6], attention(changed)[:, :6])
    assert not torch.allclose(attention(x)[:, 6:], attention(changed)[:, 6:])


@pytest.mark.parametrize("pieces", [[1] * 10, [4, 1, 5], [10]])
def test_a_cache_gives_what_the_whole_text_gives(attention: torch.nn.Module, pieces: list[int]) -> None:
    x, cache = torch.randn(2, 10, 32), Cache()
    parts = [attention(part, cache) for part in x.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), attention(x), rtol=1e-4, atol=1e-5)


def test_a_window_hides_what_is_further_back() -> None:
    q = k = torch.zeros(1, 1, 6, 4)
    v = torch.eye(6)[None, None]
    y = attend(q, k, v, window=2)  # equal scores: the mean of what is seen
    assert y[0, 0, 5].tolist() == [0, 0, 0, 0, 0.5, 0.5]
    assert y[0, 0, 0].tolist() == [1, 0, 0, 0, 0, 0]


def test_only_named_layers_have_the_window() -> None:
    two = replace(spec(), num_layers=2, vocab_size=4, attention=AttentionSpec(window=3, window_layers=(1,)))
    assert [block.attention.window for block in Decoder(two).blocks] == [0, 3]
    assert [spec(window=3).attention_at(0).window, spec().attention_at(0).window] == [3, 0]


def test_a_clip_limits_queries_keys_and_values() -> None:
    torch.manual_seed(0)
    limited = GroupedQueryAttention(spec(clip=0.5, num_kv_heads=2))
    seen = [limited._heads(torch.randn(1, 3, 32), 4, None).abs().max().item() for _ in range(3)]
    assert seen == [0.5] * 3
    free = GroupedQueryAttention(spec(num_kv_heads=2))
    free.load_state_dict(limited.state_dict())
    x = 10 * torch.randn(1, 3, 32)
    assert not torch.allclose(limited(x), free(x))


def test_query_groups_share_a_key_head() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    repeated = attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(attend(q, k, v), repeated)


def test_rotation_makes_scores_depend_on_distance_only() -> None:
    rotary = Rotary(RopeSpec(), 8)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i: int, j: int) -> float:
        return float((rotary(q, rotary.angles(i, 1)) * rotary(k, rotary.angles(j, 1))).sum())

    assert score(5, 3) == pytest.approx(score(102, 100), abs=1e-5)
    assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-3)


def test_neighbouring_pairs_turn_like_halves_after_reordering() -> None:
    x = torch.randn(1, 1, 3, 8)
    halves, pairs = (Rotary(RopeSpec(interleaved=kind), 8) for kind in (False, True))
    reordered = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
    torch.testing.assert_close(pairs(x, pairs.angles(4, 3)), halves(reordered, halves.angles(4, 3)))


def test_the_memory_is_cut_to_its_length_and_carries_no_gradient() -> None:
    made = RecurrentAttention(spec(kind="transformer_xl", memory_length=4))
    cache, x = Cache(), torch.randn(1, 6, 32, requires_grad=True)
    made(x, cache)
    assert cache.length == 4
    made(torch.randn(1, 6, 32), cache).sum().backward()
    assert x.grad is None


def test_recurrent_scores_equal_the_formula_written_out() -> None:
    torch.manual_seed(0)
    made = RecurrentAttention(spec(kind="transformer_xl", num_heads=2))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 5, 32)
    q, k, v = (linear(x).view(5, 2, 16) for linear in (made.q, made.k, made.v))
    r = made.position(sinusoids(torch.arange(5), 32)).view(5, 2, 16)
    y = torch.zeros(5, 2, 16)
    for head in range(2):
        u, w = made.content_bias_HC[head], made.position_bias_HC[head]
        for i in range(5):
            seen = [(q[i, head] + u) @ k[j, head] + (q[i, head] + w) @ r[i - j, head] for j in range(i + 1)]
            y[i, head] = (torch.stack(seen) / 4).softmax(0) @ v[: i + 1, head]
    torch.testing.assert_close(made(x)[0], made.out(y.flatten(1)), rtol=1e-4, atol=1e-5)


def test_shift_moves_distances_to_positions() -> None:
    by_distance = torch.tensor([[[[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]]])  # value = distance
    by_position = shift_relative(by_distance)[0, 0].tril()
    assert by_position.tolist() == [[0, 0, 0], [1, 0, 0], [2, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 30, 64])
def test_norm_equals_torchs(dtype: torch.dtype, width: int) -> None:
    norm, x = RMSNorm(width), torch.randn(5, 3, width).to(dtype).requires_grad_()
    torch.nn.init.normal_(norm.scale_D)
    right = F.rms_norm(x.float(), (width,), norm.scale_D, norm.eps)
    d_y = torch.randn(5, 3, width).to(dtype)
    mine = [norm(x), *torch.autograd.grad(norm(x), (x, norm.scale_D), d_y)]
    wanted = [right, *torch.autograd.grad(right, (x, norm.scale_D), d_y.float())]
    near = 1e-5 if dtype == torch.float32 else 0.05
    for left, value in zip(mine, wanted, strict=True):
        torch.testing.assert_close(left.float(), value.float(), rtol=near, atol=near)
