"""How tokens see earlier tokens: grouped-query attention (Ainslie 2023) and latent attention (DeepSeek-V2).

    x_BSD -> queries, keys, values -> rotary positions -> (cache) -> softmax(q k) v -> out projection

Segment recurrence with relative positions (Transformer-XL) is in `nn/recurrence.py`. With a cache, a call sees what
earlier calls put there, so text can be generated token by token; without one, each row is a text of its own.

Dimension key:  B sequences   S new positions   L all positions   D width   H query heads   G key heads   C head width
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.core.specs import ModelSpec
from moestro.nn.kernels import causal_attention
from moestro.nn.norms import RMSNorm
from moestro.nn.rope import Rotary, yarn_scale


@dataclass(slots=True)
class Cache:
    """What one layer remembers of earlier calls; empty at first."""

    parts: tuple[Tensor, ...] = ()
    """Tensors whose second-last dimension is the position."""

    @property
    def length(self) -> int:
        """Positions remembered."""
        return self.parts[0].shape[-2] if self.parts else 0

    def extend(self, *news: Tensor) -> tuple[Tensor, ...]:
        """Append along positions; returns the whole."""
        self.parts = tuple(torch.cat(pair, -2) for pair in zip(self.parts, news, strict=True)) if self.parts else news
        return self.parts


def causal_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """True where query i, the last of them at key position keys - 1, may see key j."""
    distance_SL = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen_SL = distance_SL >= 0
    return seen_SL & (distance_SL < window) if window else seen_SL


def attend(q_BHSC: Tensor, k_BGLC: Tensor, v_BGLC: Tensor, window: int = 0, scale: float | None = None) -> Tensor:
    """Causal softmax(q k scale) v; queries are the last S of the L positions."""
    queries, keys = q_BHSC.shape[-2], k_BGLC.shape[-2]
    if not window and causal_attention.takes(q_BHSC, k_BGLC, v_BGLC):
        return causal_attention.causal_attention(q_BHSC, k_BGLC, v_BGLC, scale)
    grouped = q_BHSC.shape[1] != k_BGLC.shape[1]
    plain = queries == keys and not 0 < window < keys
    mask_SL = (
        None if plain or (queries == 1 and not 0 < window < keys) else causal_mask(queries, keys, window, q_BHSC.device)
    )
    return F.scaled_dot_product_attention(
        q_BHSC, k_BGLC, v_BGLC, attn_mask=mask_SL, is_causal=plain and queries > 1, scale=scale, enable_gqa=grouped
    )


def heads(x_BSD: Tensor, num: int) -> Tensor:
    """[B, S, H*C] -> [B, H, S, C]."""
    return x_BSD.unflatten(-1, (num, -1)).transpose(1, 2)


class GroupedQueryAttention(nn.Module):
    """Query heads share fewer key and value heads."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        attention, head_dim = spec.attention, spec.head_dim
        self.num_heads, self.kv_heads, self.window = attention.num_heads, attention.kv_heads, attention.window
        self.norm_rows, self.clip = attention.qk_norm == "row", attention.clip
        q_width, kv_width = self.num_heads * head_dim, self.kv_heads * head_dim
        self.q = nn.Linear(spec.width, q_width, bias=attention.bias)
        self.k = nn.Linear(spec.width, kv_width, bias=attention.bias)
        self.v = nn.Linear(spec.width, kv_width, bias=attention.bias)
        self.out = nn.Linear(q_width, spec.width, bias=attention.bias)
        normed = attention.qk_norm != "none"
        self.q_norm = RMSNorm(q_width if self.norm_rows else head_dim, spec.norm_eps) if normed else None
        self.k_norm = RMSNorm(kv_width if self.norm_rows else head_dim, spec.norm_eps) if normed else None
        self.rotary = Rotary(attention.rope, head_dim)

    def forward(self, x_BSD: Tensor, cache: Cache | None = None) -> Tensor:
        """x_BSD normalised; returns the same shape."""
        q_BHSC = self._heads(self.q(x_BSD), self.num_heads, self.q_norm)
        k_BGSC = self._heads(self.k(x_BSD), self.kv_heads, self.k_norm)
        v_BGLC = self._heads(self.v(x_BSD), self.kv_heads, None)
        angles = self.rotary.angles(cache.length if cache else 0, x_BSD.shape[1])
        q_BHSC, k_BGLC = self.rotary(q_BHSC, angles), self.rotary(k_BGSC, angles)
        if cache is not None:
            k_BGLC, v_BGLC = cache.extend(k_BGLC, v_BGLC)
        y_BSD: Tensor = self.out(attend(q_BHSC, k_BGLC, v_BGLC, self.window).transpose(1, 2).flatten(2))
        return y_BSD

    def _heads(self, x_BSD: Tensor, num: int, norm: nn.Module | None) -> Tensor:
        if norm is not None and self.norm_rows:
            x_BSD = norm(x_BSD)
        x_BSHC = x_BSD.unflatten(-1, (num, -1))
        if norm is not None and not self.norm_rows:
            x_BSHC = norm(x_BSHC)
        return (x_BSHC.clamp(-self.clip, self.clip) if self.clip else x_BSHC).transpose(1, 2)


class LatentAttention(nn.Module):
    """Keys and values from one low-rank latent; the cache holds the latent and the shared rotary key only."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        attention = spec.attention
        self.num_heads, self.plain_dim, self.rope_dim = attention.num_heads, spec.head_dim, attention.rope_head_dim
        self.kv_rank = attention.kv_rank
        value_dim = attention.value_head_dim or spec.head_dim
        q_width = self.num_heads * (self.plain_dim + self.rope_dim)
        self.q_down = nn.Linear(spec.width, attention.q_rank, bias=attention.bias) if attention.q_rank else None
        self.q_norm = RMSNorm(attention.q_rank) if attention.q_rank else None
        self.q = nn.Linear(attention.q_rank or spec.width, q_width, bias=False)
        self.kv_down = nn.Linear(spec.width, self.kv_rank + self.rope_dim, bias=attention.bias)
        self.kv_norm = RMSNorm(self.kv_rank)
        self.kv_up = nn.Linear(self.kv_rank, self.num_heads * (self.plain_dim + value_dim), bias=False)
        self.out = nn.Linear(self.num_heads * value_dim, spec.width, bias=attention.bias)
        self.rotary = Rotary(attention.rope, self.rope_dim)
        self.scale = 1 / math.sqrt(self.plain_dim + self.rope_dim)
        if attention.rope.scaling == "yarn" and attention.rope.mscale_all_dim:
            self.scale *= yarn_scale(attention.rope.factor, attention.rope.mscale_all_dim) ** 2

    def forward(self, x_BSD: Tensor, cache: Cache | None = None) -> Tensor:
        """x_BSD normalised; returns the same shape."""
        angles = self.rotary.angles(cache.length if cache else 0, x_BSD.shape[1])
        small_BSD = x_BSD if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x_BSD))
        q_plain, q_turned = heads(self.q(small_BSD), self.num_heads).split([self.plain_dim, self.rope_dim], -1)
        q_BHSC = torch.cat([q_plain, self.rotary(q_turned, angles)], -1)
        latent_BSR, k_turned_BSR = self.kv_down(x_BSD).split([self.kv_rank, self.rope_dim], -1)
        latent_BLR, k_turned_BLR = self.kv_norm(latent_BSR), self.rotary(k_turned_BSR, angles)
        if cache is not None:
            latent_BLR, k_turned_BLR = cache.extend(latent_BLR, k_turned_BLR)
        kv_BHLC = heads(self.kv_up(latent_BLR), self.num_heads)
        k_plain, v_BHLC = kv_BHLC.split([self.plain_dim, kv_BHLC.shape[-1] - self.plain_dim], -1)
        k_BHLC = torch.cat([k_plain, k_turned_BLR[:, None].expand(-1, self.num_heads, -1, -1)], -1)
        y_BSD: Tensor = self.out(attend(q_BHSC, k_BHLC, v_BHLC, scale=self.scale).transpose(1, 2).flatten(2))
        return y_BSD
