"""What text says of a layer that becomes a latent: its inputs, its queries, and how far attention looks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from uptrain.methods.averages import AveragedMoment
from uptrain.methods.heads import HeadMaps
from uptrain.methods.layered import Layer
from uptrain.methods.mla import LatentWeights, calibrated_weights


@torch.no_grad()
def latent_weights(layer: Layer, maps: HeadMaps, hidden: Iterable[Tensor], frequencies: Tensor | None) -> LatentWeights:
    """Gather a layer's weights over blocks of hidden states (T, d), each run through the source's attention.

    One second moment must serve keys and values. It is the mean of two of unit trace: inputs as keys are felt, by the
    sensitivity p(1 − p) they receive, and inputs as attention averages them into values. `frequencies` (pairs,) are
    the keys' rotation in radians a token, None without; distances count by the same sensitivity.
    Source: the derivative of softmax, ∂p_s/∂z_s = p_s (1 − p_s).
    """
    size, width = maps.q.shape[1], maps.q.shape[2] + 1
    as_keys = torch.zeros(width, width, dtype=torch.float64)
    as_values = torch.zeros_like(as_keys)
    queries = torch.zeros(maps.query_heads, size, size, dtype=torch.float64)
    distances: Tensor | None = None
    for block in hidden:
        x, parts = layer.attention_weights(block)
        rows = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        averaged = AveragedMoment(rows, maps.query_heads)
        received, given = rows.new_zeros(len(rows)), list[Tensor]()
        spread = torch.zeros(maps.query_heads, len(rows), dtype=torch.float64)
        for probabilities in parts:
            averaged.add(probabilities)
            # In their place: nothing else needs them any more, and they may be larger than all else here.
            sensitivity = probabilities.addcmul_(probabilities, probabilities, value=-1)
            spread += by_distance(sensitivity, sum(part.shape[1] for part in given)).cpu().double()
            received += sensitivity.sum((0, 1))
            given.append(sensitivity.sum(2))
        projected = torch.einsum("td,hnd->htn", rows, maps.q_rows.to(rows))
        queries += (projected.mT @ (projected * torch.cat(given, dim=1)[..., None])).cpu().double() / size
        as_keys += (rows.mT @ (rows * received[:, None])).cpu().double()
        as_values += averaged.moment()
        distances = spread if distances is None else distances + spread
    if distances is None:
        raise ValueError("no blocks to gather weights on")
    moment = as_keys / as_keys.trace() + as_values / as_values.trace()
    return calibrated_weights(maps, queries, moment, distances, frequencies)


def by_distance(weights: Tensor, start: int = 0) -> Tensor:
    """Sum causal weights (H, R, T) of R queries from the one at `start`: entry Δ of (H, T) is Σ_t w[t, t − Δ]."""
    heads, queries, tokens = weights.shape
    rows = torch.arange(start, start + queries, device=weights.device)
    # Distance Δ of row t is column t − Δ. Gathered, not scattered: accelerators add what is scattered in any order.
    column = rows[:, None] - torch.arange(tokens, device=weights.device)[None]
    turned = weights.gather(2, column.clamp(min=0)[None].expand(heads, -1, -1))
    return turned.masked_fill_(column < 0, 0).sum(1)
