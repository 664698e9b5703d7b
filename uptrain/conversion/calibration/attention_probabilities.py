"""An attention's probabilities, a few queries at a time where the family's code lets itself be asked so."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

VALUES = 2**19
"""Probabilities at a time: those of a whole block can be many times as large as the layer's weights."""
CAPTURE = "uptrain_capture"
"""The attention implementation that computes nothing, and ends the run with what it was given."""
_OWN = "eager_attention_forward"
"""The function by which a family's code computes attention in the plain way; each has its own."""


class Reached(Exception):
    """Ends a layer's run where its rest would only cost time."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def in_parts(kind: type[nn.Module]) -> bool:
    """Tell whether a family, known by any class of it, leaves attention to a function that `CAPTURE` can stand for."""
    return _OWN in _code_of(kind)


def _code_of(kind: type[nn.Module]) -> dict[str, Any]:
    """Return what a class's own file defines."""
    found: dict[str, Any] = inspect.unwrap(kind.forward).__globals__
    return found


def _capture(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any) -> None:
    own = partial(_code_of(type(module))[_OWN], module)
    raise Reached(_parts(own, query, key, value, mask, rest))


def _parts(
    own: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rest: dict[str, Any]
) -> Iterator[Tensor]:
    """Yield the probabilities (H, R, T) of R queries (1, H, T, D) at a time, in order."""
    _, heads, tokens, _ = query.shape
    step = max(1, VALUES // (heads * tokens))
    value = value[..., :1]  # what is mixed isn't wanted
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        seen = mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]
        yield own(query[:, :, rows], key, value, seen, **rest)[1][0]


AttentionInterface.register(CAPTURE, _capture)
