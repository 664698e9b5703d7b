"""Source models whose heads are one shared head seen through each head's own gauge, so that sharing loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from tests.oracle import head_views, linears_of
from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.schema import Position


def _phases(head_dim: int, rotated: int, interleaved: bool) -> torch.Tensor:
    """Return a random (head_dim, head_dim) map that commutes with rotation of the first `rotated` dims.

    It scales and turns every rotary pair, and does what it likes to the rest.
    """
    pairs = rotated // 2
    first = torch.arange(0, rotated, 2) if interleaved else torch.arange(pairs)
    second = first + (1 if interleaved else pairs)
    size, angle = 0.5 + torch.rand(pairs), 6.28 * torch.rand(pairs)
    out = torch.block_diag(torch.zeros(rotated, rotated), _invertible(head_dim - rotated))
    out[first, first] = out[second, second] = size * angle.cos()
    out[second, first], out[first, second] = size * angle.sin(), -size * angle.sin()
    return out


def _invertible(head_dim: int) -> torch.Tensor:
    return torch.eye(head_dim) + 0.4 * torch.randn(head_dim, head_dim) / max(1, head_dim) ** 0.5


@torch.no_grad()
def scatter_heads(model: PreTrainedModel, groups: int, seed: int = 0) -> PreTrainedModel:
    """Replace each group's key and value heads by gauge images of its first one, in place."""
    torch.manual_seed(seed)
    position = FAMILIES[model.config.model_type].position
    share = (getattr(model.config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1)
    counted = getattr(model.config, "rotary_dim", None)
    for module in filter(linears_of, model.modules()):
        views = head_views(module)
        rotated = (counted or int(views["k"][0].shape[1] * share)) if _rotates(module) else 0
        phases = partial(_phases, rotated=rotated, interleaved=position is Position.ROTARY_INTERLEAVED)
        for part, gauge in (("k", phases if position.rotates else _invertible), ("v", _invertible)):
            weight, *bias = views[part]
            rows = torch.cat([weight, *(one[..., None] for one in bias)], dim=2)
            _scatter(rows, groups, gauge)
            weight.copy_(rows[..., : weight.shape[2]])
            for one in bias:
                one.copy_(rows[..., -1])
    return model


@torch.no_grad()
def scatter_values(model: PreTrainedModel, groups: int, seed: int = 0) -> PreTrainedModel:
    """Replace each group's value heads by gauge images of its first one, in place."""
    torch.manual_seed(seed)
    for views in map(head_views, filter(linears_of, model.modules())):
        weight, *bias = views["v"]
        rows = torch.cat([weight, *(one[..., None] for one in bias)], dim=2)
        _scatter(rows, groups, _invertible)
        weight.copy_(rows[..., : weight.shape[2]])
        for one in bias:
            one.copy_(rows[..., -1])
    return model


def _rotates(module: torch.nn.Module) -> bool:
    """Tell whether a layer of a model that rotates does so itself: SmolLM 3 and Cohere 2 leave some out."""
    config = getattr(module, "config", None)
    if getattr(config, "model_type", "") == "cohere2":
        return module.sliding_window is not None
    return bool(getattr(module, "use_rope", True)) and not getattr(config, "alibi", False)


def _scatter(heads: torch.Tensor, groups: int, gauge: Callable[[int], torch.Tensor]) -> None:
    per_group = len(heads) // groups
    for head in range(len(heads)):
        first = head - head % per_group
        if head != first:
            heads[head] = gauge(heads.shape[1]) @ heads[first]


@torch.no_grad()
def interleave_heads(model: PreTrainedModel) -> None:
    """Put four key/value heads in the order 0, 2, 1, 3, with their query heads and output columns, in place."""
    for views in map(head_views, filter(linears_of, model.modules())):
        for view in (*views["q"], *views["k"], *views["v"], *(view.transpose(0, 1) for view in views["o"])):
            view.copy_(view[[0, 2, 1, 3]].clone())
