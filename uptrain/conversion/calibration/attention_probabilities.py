"""The probabilities of an attention, a few queries at a time where the family's code allows it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

VALUES = 2**19
"""Probabilities computed at a time: those of a whole block can be many times as large as the layer's weights."""
CAPTURE = "uptrain_capture"
"""The attention implementation that computes nothing: it ends the run and returns its inputs."""
_OWN = "eager_attention_forward"
"""The function in each family's own file that computes attention with explicit probabilities."""


class Reached(Exception):
    """Ends a layer's run early, with the `value` that was wanted: the rest of the run would only cost time."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def in_parts(kind: type[nn.Module]) -> bool:
    """Return whether a family, given by any class of it, calls a function for attention that `CAPTURE` can replace."""
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
    """Yield the probabilities (H, R, T) of R queries at a time, in order.

    - `own`: the family's function.
    - `query`, `key`, `value`: (1, H, T, D), (1, G, T, D) and (1, G, T, Dv).
    - `mask`: broadcasts to (1, H, T, T), None for none.
    - `rest`: the function's other arguments.
    """
    _, heads, tokens, _ = query.shape
    step = max(1, VALUES // (heads * tokens))
    value = value[..., :1]  # only the probabilities are wanted
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        seen = mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]
        yield own(query[:, :, rows], key, value, seen, **rest)[1][0]


AttentionInterface.register(CAPTURE, _capture)
