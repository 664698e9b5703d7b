"""Source models whose heads are one shared head seen through each head's own gauge, so that sharing loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from uptrain.architectures import ARCHITECTURES, Position


def _phases(head_dim: int, interleaved: bool) -> torch.Tensor:
    """Return a random (head_dim, head_dim) map that scales and turns every rotary pair: it commutes with rotation."""
    pairs = head_dim // 2
    first = torch.arange(0, head_dim, 2) if interleaved else torch.arange(pairs)
    second = first + (1 if interleaved else pairs)
    size, angle = 0.5 + torch.rand(pairs), 6.28 * torch.rand(pairs)
    out = torch.zeros(head_dim, head_dim)
    out[first, first] = out[second, second] = size * angle.cos()
    out[second, first], out[first, second] = size * angle.sin(), -size * angle.sin()
    return out


def _invertible(head_dim: int) -> torch.Tensor:
    return torch.eye(head_dim) + 0.4 * torch.randn(head_dim, head_dim) / head_dim**0.5


@torch.no_grad()
def scatter_heads(model: PreTrainedModel, groups: int, seed: int = 0) -> PreTrainedModel:
    """Replace each group's key and value heads by gauge images of its first one, in place."""
    torch.manual_seed(seed)
    position = ARCHITECTURES[model.config.model_type].position
    for module in model.modules():
        if hasattr(module, "c_attn"):
            size = module.c_attn.weight.shape[0]
            head_dim = size // module.num_heads
            rows = torch.cat([module.c_attn.weight, module.c_attn.bias[None]]).T
            keys, values = (rows[start : start + size].unflatten(0, (-1, head_dim)) for start in (size, 2 * size))
            _scatter(keys, groups, _invertible)
            _scatter(values, groups, _invertible)
            module.c_attn.weight.copy_(rows[:, :-1].T)
            module.c_attn.bias.copy_(rows[:, -1])
        elif hasattr(module, "k_proj"):
            phases = partial(_phases, interleaved=position is Position.ROTARY_INTERLEAVED)
            for linear, gauge in ((module.k_proj, phases), (module.v_proj, _invertible)):
                biases = [] if linear.bias is None else [linear.bias[:, None]]
                rows = torch.cat([linear.weight, *biases], dim=1)
                _scatter(rows.unflatten(0, (-1, module.head_dim)), groups, gauge)
                linear.weight.copy_(rows[:, : linear.weight.shape[1]])
                if biases:
                    linear.bias.copy_(rows[:, -1])
    return model


def _scatter(heads: torch.Tensor, groups: int, gauge: Callable[[int], torch.Tensor]) -> None:
    per_group = len(heads) // groups
    for head in range(len(heads)):
        first = head - head % per_group
        if head != first:
            heads[head] = gauge(heads.shape[1]) @ heads[first]


@torch.no_grad()
def interleave_heads(model: PreTrainedModel) -> None:
    """Put four key/value heads in the order 0, 2, 1, 3, with their query heads and output columns, in place."""
    for module in model.modules():
        if hasattr(module, "c_attn"):
            size = module.c_attn.weight.shape[0]
            for start in range(0, 3 * size, size):
                _interleave(module.c_attn.weight[:, start : start + size].T)
                _interleave(module.c_attn.bias[start : start + size])
            _interleave(module.c_proj.weight)
        elif hasattr(module, "k_proj"):
            for linear in (module.q_proj, module.k_proj, module.v_proj):
                for parameter in linear.parameters():
                    _interleave(parameter)
            _interleave(module.o_proj.weight.T)


def _interleave(rows: torch.Tensor) -> None:
    heads = rows.unflatten(0, (4, -1))
    heads.copy_(heads[[0, 2, 1, 3]].clone())
