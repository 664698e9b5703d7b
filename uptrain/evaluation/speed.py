"""What a model costs to run: the bytes its cache really holds, and tokens per second."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uptrain.evaluation.progress import Progress, counted
from uptrain.evaluation.reading import cache_of, caches, prefill, step
from uptrain.models import devices

_CACHE_TOKENS = 64


@dataclass(frozen=True)
class SpeedCell:
    """Tokens per second of all `batch` sequences together, after a prefill of `context` tokens of each.

    Figures are medians over the runs, ranges the slowest and the fastest; `decode_ratio` is the model's speed over
    the baseline's in the same turn. None where nothing was timed, or a model's memory didn't suffice.
    """

    batch: int
    context: int
    prefill_tokens_per_second: float | None
    prefill_range: tuple[float, float] | None
    decode_tokens_per_second: float | None
    decode_range: tuple[float, float] | None
    baseline_prefill_tokens_per_second: float | None = None
    baseline_prefill_range: tuple[float, float] | None = None
    baseline_decode_tokens_per_second: float | None = None
    baseline_decode_range: tuple[float, float] | None = None
    decode_ratio: float | None = None
    decode_ratio_range: tuple[float, float] | None = None


@torch.no_grad()
def cache_bytes_per_token(model: Any) -> tuple[int, int]:
    """Run a short text through the model and count the bytes its cache holds per token, over all layers.

    Returns them for one token, of the target and of the source if there is one, and those of the source's alone.
    """
    ids = torch.arange(_CACHE_TOKENS, device=model.device)[None] % model.config.vocab_size
    own, cross = (_bytes(layers) / _CACHE_TOKENS for layers in caches(model, ids))
    return round(own + cross), round(cross)


def _bytes(layers: Sequence[Any]) -> int:
    return sum(value.nbytes for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor))


def time_cells(
    loaded: Sequence[Any], ids: Tensor, places: Sequence[tuple[int, int]], decode_tokens: int, repeats: int,
    on_progress: Progress | None = None,
) -> list[SpeedCell]:  # fmt: skip
    """Time one or two models at each of `places`, a batch and a context."""
    advance = counted("Speed", len(places) * (repeats + 1) * len(loaded), on_progress)
    return [time_cell(loaded, ids, *place, decode_tokens, repeats, advance) for place in places]


def time_cell(
    loaded: Sequence[Any], ids: Tensor, batch: int, context: int, decode_tokens: int, repeats: int,
    advance: Callable[[int], None] = lambda count: None,
) -> SpeedCell:  # fmt: skip
    """Time one or two models in turns: `batch` sequences of `context` tokens of `ids`, then `decode_tokens` more.

    Where there is an encoder, it reads the `context` tokens.
    """
    # Each sequence starts elsewhere in the text, which goes round.
    starts = [row * len(ids) // batch for row in range(batch)]
    shown = torch.stack([ids.roll(-start).repeat(math.ceil(context / len(ids)))[:context] for start in starts])
    runs: list[list[tuple[float, float]]] = [[] for _ in loaded]
    full: set[int] = set()
    for turn in range(repeats + 1):
        for position, each in enumerate(loaded):
            # One model's cache may fit where another's doesn't.
            if position not in full:
                try:
                    measured = _time(each, shown.to(each.device), decode_tokens)
                except (RuntimeError, MemoryError) as error:
                    if not devices.is_full(error):
                        raise
                    full.add(position)
                    runs[position].clear()
                else:
                    # The first turn warms up.
                    if turn:
                        runs[position].append(measured)
            advance(1)
    figures: list[Any] = []
    for times in runs:
        for part, count in enumerate((batch * context, batch * decode_tokens)):
            figures += _spread([count / run[part] for run in times])
    if len(runs) > 1:
        # A turn's two runs lie close together, so that what else the machine did cancels.
        figures += _spread([theirs / ours for (_, ours), (_, theirs) in zip(*runs, strict=False)])
    return SpeedCell(batch, context, *figures)


def _spread(values: Sequence[float]) -> tuple[float | None, tuple[float, float] | None]:
    return (statistics.median(values), (min(values), max(values))) if values else (None, None)


@torch.no_grad()
def _time(model: Any, ids: Tensor, decode_tokens: int) -> tuple[float, float]:
    """Return the seconds that `ids` (batch, tokens) take, and then `decode_tokens` more, one by one."""
    started = _now(model)
    out, again = prefill(model, ids)
    prefilled = _now(model)
    for _ in range(decode_tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = step(model, token, cache_of(out), again)
    return prefilled - started, _now(model) - prefilled


def _now(model: Any) -> float:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter()
