"""The probabilities of an attention, a few queries at a time where the family's code allows it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
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
    """Yield the probabilities (H, R, S) of R queries at a time, in order, for the first S keys: none sees a later one.

    - `own`: the family's function.
    - `query`, `key`, `value`: (1, H, T, D), (1, G, T, D) and (1, G, T, Dv).
    - `mask`: broadcasts to (1, H, T, T), None for none.
    - `rest`: the function's other arguments.
    """
    _, heads, tokens, _ = query.shape
    step = max(1, VALUES // (heads * tokens))
    value = value[..., :1]  # only the probabilities are wanted
    ends = _ends(mask, tokens)
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        end = max(ends[rows])
        seen = mask if mask is None else (mask if mask.shape[-2] == 1 else mask[..., rows, :])[..., :end]
        yield own(query[:, :, rows], key[:, :, :end], value[:, :, :end], seen, **rest)[1][0]


def _ends(mask: Tensor | None, tokens: int) -> list[int]:
    """Return after which key each of `tokens` queries sees nothing more, by a mask as of `_parts`."""
    if mask is None or mask.shape[-2] == 1:
        return [tokens] * tokens
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
    places = torch.arange(1, tokens + 1, device=mask.device)
    last = (~hidden.flatten(0, -3).all(0) * places).amax(-1)
    # Softmax spreads a query that sees no key over all of them.
    last = torch.where(last == 0, tokens, torch.maximum(last, places))
    found: list[int] = last.tolist()
    return found


AttentionInterface.register(CAPTURE, _capture)
