"""What a model costs to run: the bytes its cache really holds, and tokens per second."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CACHE_TOKENS = 64


@dataclass(frozen=True)
class Speed:
    """Median tokens per second over the repeats, and their slowest and fastest; None where nothing was timed."""

    prefill: float | None = None
    decode: float | None = None
    decode_range: tuple[float, float] | None = None


@torch.no_grad()
def cache_bytes_per_token(model: Any) -> int:
    """Run a short text through the model and count the bytes its cache holds per token, over all layers."""
    ids = torch.arange(_CACHE_TOKENS, device=model.device)[None] % model.config.vocab_size
    cache = model(input_ids=ids, use_cache=True).past_key_values
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return round(sum(tensor.nbytes for tensor in tensors) / _CACHE_TOKENS)


def speeds(loaded: Sequence[Any], ids: Tensor, context: int, decode_tokens: int, repeats: int) -> list[Speed]:
    """Time the models in turns on one sequence: `context` tokens of `ids`, then `decode_tokens` more."""
    if not repeats:
        return [Speed()] * len(loaded)
    ids = ids.repeat(math.ceil(context / len(ids)))[:context]
    runs: list[list[tuple[float, float]]] = [[] for _ in loaded]
    for turn in range(repeats + 1):
        for each, times in zip(loaded, runs, strict=True):
            measured = _time(each, ids[None].to(each.device), decode_tokens)
            # The first turn warms up.
            if turn:
                times.append(measured)
    out = []
    for times in runs:
        decode = [seconds for _, seconds in times]
        out.append(
            Speed(
                context / statistics.median(seconds for seconds, _ in times),
                decode_tokens / statistics.median(decode),
                (decode_tokens / max(decode), decode_tokens / min(decode)),
            )
        )
    return out


@torch.no_grad()
def _time(model: Any, ids: Tensor, decode_tokens: int) -> tuple[float, float]:
    started = _now(model)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefilled = _now(model)
    for _ in range(decode_tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return prefilled - started, _now(model) - prefilled


def _now(model: Any) -> float:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter()
