"""Transformer-XL attention (Dai 2019): segments see hidden states of earlier segments, positions are relative.

    score(i, j) = (q_i + u) . k_j + (q_i + v) . r_{i-j}

u and v are learned per head; r is a projected sinusoid of the distance. The memory carries no gradient.

Dimension key:  B sequences   S new positions   M memory   L = M + S   D width   H heads   C head width
"""

import math

import torch
from torch import Tensor, nn

from moestro.core.specs import ModelSpec
from moestro.nn.attention import Cache, causal_mask, heads


def sinusoids(distance_L: Tensor, width: int) -> Tensor:
    """[L, D]: sines then cosines of distances at geometric frequencies (Vaswani 2017)."""
    frequency_P = 1.0 / 10_000 ** (torch.arange(0, width, 2, device=distance_L.device).float() / width)
    angle_LP = distance_L[:, None].float() * frequency_P
    return torch.cat([angle_LP.sin(), angle_LP.cos()], -1)[:, :width]


def shift_relative(score_BHSL: Tensor) -> Tensor:
    """From scores by distance (column L-1-d holds distance d) to scores by key position (Dai 2019, appendix B)."""
    batch, num_heads, queries, keys = score_BHSL.shape
    padded = torch.cat([score_BHSL.new_zeros(batch, num_heads, queries, 1), score_BHSL], -1)
    return padded.view(batch, num_heads, keys + 1, queries)[:, :, 1:].reshape(score_BHSL.shape)


class RecurrentAttention(nn.Module):
    """Attention over this segment and a memory of the layer's earlier inputs."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.num_heads, self.memory_length = spec.attention.num_heads, spec.attention.memory_length
        inner = self.num_heads * spec.head_dim
        self.scale = 1 / math.sqrt(spec.head_dim)
        self.q, self.k, self.v, self.position = (nn.Linear(spec.width, inner, bias=False) for _ in range(4))
        self.out = nn.Linear(inner, spec.width, bias=False)
        self.content_bias_HC = nn.Parameter(torch.zeros(self.num_heads, spec.head_dim))
        self.position_bias_HC = nn.Parameter(torch.zeros(self.num_heads, spec.head_dim))

    def forward(self, x_BSD: Tensor, cache: Cache | None = None) -> Tensor:
        """x_BSD normalised; `cache` is the memory, cut to memory_length afterwards."""
        past_BLD = cache.extend(x_BSD)[0] if cache is not None else x_BSD
        if cache is not None:
            past_BLD = torch.cat([past_BLD[:, : -x_BSD.shape[1]].detach(), x_BSD], 1)
            cache.parts = (past_BLD[:, max(past_BLD.shape[1] - self.memory_length, 0) :].detach(),)
        length = past_BLD.shape[1]
        distance_L = torch.arange(length - 1, -1, -1, device=x_BSD.device)
        r_LD = self.position(sinusoids(distance_L, x_BSD.shape[-1]).to(x_BSD.dtype))
        q_BHSC, k_BHLC, v_BHLC = (
            heads(f(x), self.num_heads) for f, x in ((self.q, x_BSD), (self.k, past_BLD), (self.v, past_BLD))
        )
        r_HLC = heads(r_LD[None], self.num_heads)[0]
        by_content = (q_BHSC + self.content_bias_HC[:, None].to(q_BHSC.dtype)) @ k_BHLC.transpose(-1, -2)
        by_distance = (q_BHSC + self.position_bias_HC[:, None].to(q_BHSC.dtype)) @ r_HLC.transpose(-1, -2)
        score_BHSL = (by_content + shift_relative(by_distance)) * self.scale
        hidden_SL = ~causal_mask(x_BSD.shape[1], length, 0, x_BSD.device)
        share_BHSL = score_BHSL.float().masked_fill(hidden_SL, -torch.inf).softmax(-1).to(v_BHLC.dtype)
        y_BSD: Tensor = self.out((share_BHSL @ v_BHLC).transpose(1, 2).flatten(2))
        return y_BSD
