"""The latent's compulsory norm in its neutral form, and its removal while a model trains.

A stock class has an RMSNorm on the latent. With rows so small that ε outweighs their energy, and a weight that undoes
both, it is the identity; but an optimizer can't train weights of 1e-9 and 1e6. So a model trains without the norm, its
latent at true scale, and the norm is put back when the model is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from uptrain.architectures.mla_projections import NEUTRAL_WEIGHT
from uptrain.errors import UsageError

PAIRS = (("kv_a_proj_with_mqa", "kv_a_layernorm"), ("q_a_proj", "q_a_layernorm"))
"""Each projection whose rows a norm follows, and that norm."""


class AbsentNorm(nn.Module):
    """Pass a latent on, and keep the ε and width of the norm that was there.

    Rows are unfolded by a power of two, which no dtype rounds, and not by weight/√ε; `gain` is the rest, near 1.
    """

    gain: float
    factor: float

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        whole = NEUTRAL_WEIGHT / eps**0.5
        self.factor = 2.0 ** round(math.log2(whole))
        self.gain = whole / self.factor

    def forward(self, latent: Tensor) -> Tensor:
        """Return the latent times `gain`."""
        return latent * self.gain


def is_neutral(norm: Any) -> bool:
    """Tell whether an RMSNorm is in the neutral form: every weight the one that conversion writes."""
    weight = getattr(norm, "weight", None)
    return isinstance(weight, Tensor) and bool((weight == NEUTRAL_WEIGHT).all())


@torch.no_grad()
def unfold(model: nn.Module) -> int:
    """Take neutral norms out of `model` in place, the latents' rows at true scale; return how many there were.

    Norms that are live, because the model was trained with them, stay.
    """
    found = [pair for pair in _pairs(model) if is_neutral(getattr(pair[0], pair[2]))]
    for owner, projection, norm in found:
        layer = getattr(owner, norm)
        width, eps = len(layer.weight), float(layer.variance_epsilon)
        absent = AbsentNorm(width, eps)
        _scale(getattr(owner, projection), width, absent.factor)
        setattr(owner, norm, absent)
    return len(found)


@torch.no_grad()
def fold(model: nn.Module, dtype: torch.dtype) -> None:
    """Put back in place the neutral norms that `unfold` took out of `model`, to be stored in `dtype`.

    Raises:
        UsageError: float16, which can't hold rows this small.
    """
    absent = [pair for pair in _pairs(model) if isinstance(getattr(pair[0], pair[2]), AbsentNorm)]
    if absent:
        check_dtype(dtype)
    for owner, projection, norm in absent:
        layer = getattr(owner, norm)
        rows = getattr(owner, projection)
        _scale(rows, layer.width, 1 / layer.factor)
        setattr(owner, norm, _norm_like(model, layer, rows.weight))


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse dtypes without the range of the neutral form.

    Raises:
        UsageError: float16.
    """
    if dtype is torch.float16:
        raise UsageError(
            "float16 can't hold the weights of 1e-9 that turn off the latent's norm.", "Use bfloat16 or float32."
        )


def check_loaded(model: nn.Module) -> None:
    """Refuse a model whose neutral norms have overflowed in the dtype that it was loaded in.

    Raises:
        UsageError: float16.
    """
    for owner, _, norm in _pairs(model):
        weight = getattr(getattr(owner, norm), "weight", None)
        if isinstance(weight, Tensor) and bool(weight.isinf().all()):
            check_dtype(weight.dtype)


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    for module in list(model.modules()):
        for projection, norm in PAIRS:
            if getattr(module, projection, None) is not None and getattr(module, norm, None) is not None:
                yield module, projection, norm


def _scale(projection: Any, rows: int, factor: float) -> None:
    """Multiply the first `rows` rows (and biases) by a power of two."""
    for value in (projection.weight, projection.bias):
        if value is not None:
            value[:rows] *= factor


def _norm_like(model: nn.Module, absent: AbsentNorm, weight: Tensor) -> nn.Module:
    """Make a norm of the class that the model's layers use, neutral."""
    kind: Any = next(type(module) for module in model.modules() if hasattr(module, "variance_epsilon"))
    norm: nn.Module = kind(absent.width, absent.eps).to(weight)
    nn.init.constant_(norm.get_parameter("weight"), NEUTRAL_WEIGHT)
    return norm
