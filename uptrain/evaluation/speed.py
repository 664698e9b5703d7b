"""What a model costs to run: the bytes that its cache really holds, and tokens per second."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from uptrain.checkpoint.events import Events
from uptrain.evaluation.pair import ModelPair
from uptrain.evaluation.progress import counted
from uptrain.evaluation.reading import cache_of, caches, prefill, step
from uptrain.evaluation.settings import EvaluationSettings
from uptrain.models import devices

_CACHE_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class SpeedCell:
    """Tokens per second of all `batch` sequences together, after a prefill of `context` tokens per sequence.

    Values are medians over the runs; ranges are the slowest and the fastest run. `decode_ratio` is the model's speed
    over the baseline's in the same round. A value is None where nothing was timed or the device's memory was full.
    """

    batch: int
    context: int
    prefill_tokens_per_second: float | None = None
    prefill_range: tuple[float, float] | None = None
    decode_tokens_per_second: float | None = None
    decode_range: tuple[float, float] | None = None
    baseline_prefill_tokens_per_second: float | None = None
    baseline_prefill_range: tuple[float, float] | None = None
    baseline_decode_tokens_per_second: float | None = None
    baseline_decode_range: tuple[float, float] | None = None
    decode_ratio: float | None = None
    decode_ratio_range: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class SpeedPlan:
    """What one speed measurement runs.

    - `batch`: number of sequences.
    - `context`: tokens per sequence before decoding.
    - `decode_tokens`: tokens to decode per sequence.
    - `repeats`: timed rounds; one more round warms up.
    """

    batch: int
    context: int
    decode_tokens: int
    repeats: int


@torch.no_grad()
def cache_bytes_per_token(model: Any) -> tuple[int, int]:
    """Run a short text through a model and count the bytes per token that its cache holds, over all layers.

    Returns the bytes of one target token and, where there is an encoder, one source token; and those of the source
    token alone.
    """
    ids = torch.arange(_CACHE_TOKENS, device=model.device)[None] % model.config.vocab_size
    own, cross = (_bytes(layers) / _CACHE_TOKENS for layers in caches(model, ids))
    return round(own + cross), round(cross)


def _bytes(layers: Sequence[Any]) -> int:
    return sum(value.nbytes for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor))


def measure_speed(pair: ModelPair, settings: EvaluationSettings, events: Events) -> list[SpeedCell]:
    """Time the models at each batch size and context of the settings, in this order; empty for 0 repeats."""
    places = product(settings.speed_batches, settings.speed_contexts if settings.repeats else ())
    plans = [
        SpeedPlan(batch=batch, context=context, decode_tokens=settings.decode_tokens, repeats=settings.repeats)
        for batch, context in places
    ]
    advance = counted("Speed", len(plans) * (settings.repeats + 1) * len(pair.models), events)
    ids = torch.from_numpy(pair.first_text.ids)
    return [time_cell(pair.models, ids, plan, advance) for plan in plans]


def time_cell(
    models: Sequence[Any], ids: Tensor, plan: SpeedPlan, on_runs: Callable[[int], None] = lambda count: None
) -> SpeedCell:
    """Time one or two models, which alternate.

    - `models`: models of transformers, the baseline second.
    - `ids`: tokens of a text, int64 (tokens,); a longer context repeats it. An encoder reads the context.
    - `plan`: what to run.
    - `on_runs`: called with the number of runs that were just finished.
    """
    # Each sequence starts at another place of the text, whose end is followed by its begin.
    starts = [row * len(ids) // plan.batch for row in range(plan.batch)]
    text = [ids.roll(-start).repeat(math.ceil(plan.context / len(ids)))[: plan.context] for start in starts]
    runs = _rounds(models, torch.stack(text), plan, on_runs)
    tokens = {"prefill": plan.batch * plan.context, "decode": plan.batch * plan.decode_tokens}
    values: dict[str, Any] = {}
    for prefix, times in zip(("", "baseline_"), runs, strict=False):
        for position, (part, count) in enumerate(tokens.items()):
            median, ends = _summary([count / run[position] for run in times])
            values |= {f"{prefix}{part}_tokens_per_second": median, f"{prefix}{part}_range": ends}
    if len(runs) > 1:
        # The two runs of a round are close in time, so that other load on the machine cancels out.
        ratio, ends = _summary([theirs / ours for (_, ours), (_, theirs) in zip(*runs, strict=False)])
        values |= {"decode_ratio": ratio, "decode_ratio_range": ends}
    return SpeedCell(batch=plan.batch, context=plan.context, **values)


def _rounds(
    models: Sequence[Any], ids: Tensor, plan: SpeedPlan, on_runs: Callable[[int], None]
) -> list[list[tuple[float, float]]]:
    """Return the seconds of prefill and decoding of each model in each timed round.

    A model whose memory was full has no rounds.
    """
    runs: list[list[tuple[float, float]]] = [[] for _ in models]
    full: set[int] = set()
    for number in range(plan.repeats + 1):
        for position, model in enumerate(models):
            # The cache of one model may fit where the other's doesn't.
            if position not in full:
                try:
                    seconds = _time(model, ids.to(model.device), plan.decode_tokens)
                except (RuntimeError, MemoryError) as error:
                    if not devices.is_full(error):
                        raise
                    full.add(position)
                    runs[position].clear()
                else:
                    # The first round warms up.
                    if number:
                        runs[position].append(seconds)
            on_runs(1)
    return runs


def _summary(values: Sequence[float]) -> tuple[float | None, tuple[float, float] | None]:
    """Return the median, and the smallest and largest value; None for each where there are no values."""
    return (statistics.median(values), (min(values), max(values))) if values else (None, None)


@torch.no_grad()
def _time(model: Any, ids: Tensor, decode_tokens: int) -> tuple[float, float]:
    """Return the seconds for a prefill of `ids` (batch, tokens), and for `decode_tokens` more, one by one."""
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
