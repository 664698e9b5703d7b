"""Random layers and a slow, literal attention to compare against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uptrain.architectures.projections import Heads, LayerHeads
from uptrain.methods.grouping import move_heads
from uptrain.methods.head_conversion import heads_of, maps_of
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.rotary import Rotary, to_complex


def random_layer(
    heads: int, kv_heads: int, dims: int, hidden: int, seed: int, biases: bool = True, alike: float = 0.0
) -> HeadMaps:
    """Draw a layer in float64; `alike` in [0, 1] mixes one common head into all key/value heads."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    k, v = draw(kv_heads, dims, hidden), draw(kv_heads, dims, hidden)
    k, v = (alike * rows[:1] + (1 - alike) * rows for rows in (k, v))
    return HeadMaps(
        draw(heads, dims, hidden) * 2,
        k * 2,
        v,
        draw(hidden, heads, dims),
        draw(heads, dims) if biases else None,
        draw(kv_heads, dims) if biases else None,
        draw(kv_heads, dims) if biases else None,
    )


def random_moment(hidden: int, seed: int, tokens: int = 0) -> Tensor:
    """Return E[x̃x̃ᵀ] of `tokens` random inputs with a mean and a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 4 * hidden, hidden, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -2, hidden, dtype=torch.float64) + 0.3
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    return rows.mT @ rows / len(rows)


def attention(layer: HeadMaps, x: Tensor, position: Rotary | None, theta: float = 100.0) -> Tensor:
    """Run causal attention literally over x (tokens, d), rotating keys and queries by complex phases."""
    rows = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    per, tokens = layer.queries_per_kv, len(x)
    mask = torch.full((tokens, tokens), -torch.inf, dtype=x.dtype).triu(1)
    out = torch.zeros(tokens, layer.o.shape[0], dtype=x.dtype)
    for head in range(layer.query_heads):
        q, k, v = layer.q_rows[head] @ rows.T, layer.k_rows[head // per] @ rows.T, layer.v_rows[head // per] @ rows.T
        logits = q.T @ k
        if position is not None:
            speeds = theta ** (-torch.arange(position.pairs, dtype=x.dtype) / position.pairs)
            phases = torch.exp(1j * speeds[:, None] * torch.arange(tokens, dtype=x.dtype))
            zq, zk = to_complex(q, position) * phases, to_complex(k, position) * phases
            logits = (zq.mH @ zk).real + q[position.dims :].T @ k[position.dims :]
        weights = torch.softmax(logits / math.sqrt(q.shape[0]) + mask, dim=-1)
        out += weights @ v.T @ layer.o[:, head].mT
    return out


def reorder(layer: HeadMaps, order: list[int]) -> HeadMaps:
    """Move the key/value heads as a conversion moves them."""
    heads = heads_of(layer, LayerHeads(o=Heads(layer.o.numpy())))
    return maps_of(move_heads(heads, order))
