"""What models predict on the same tokens, window by window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uptrain.errors import UsageError
from uptrain.evaluation.intervals import interval
from uptrain.evaluation.reading import has_encoder, predicted
from uptrain.evaluation.reference import Reference
from uptrain.models import devices

_LOGITS = 2**24
"""Logits held at once for one model."""
TOP = 5


@dataclass(frozen=True)
class WindowSums:
    """Sums over one window's scored tokens: each model's nats, and how the first differs from the second."""

    tokens: int
    nats: tuple[float, ...]
    divergence: float = 0.0
    top1: int = 0
    top5: float = 0.0
    flips: int = 0


@dataclass(frozen=True)
class QualityRow:
    """Quality on one text, or on `all` of them, at one context; what needs a baseline is None without one.

    Intervals are (low, high) at 95 %, blocked over windows, None where there is only one. `top5_agreement` is the
    mean share of the baseline's five likeliest tokens that are among the model's; `flip_rate` the share of tokens
    that exactly one of the two ranks first rightly.

    Source: Dutta et al. 2024, "Accuracy is Not All You Need", section 3 (flips).
    """

    text: str
    context: int
    stride: int
    tokens: int
    windows: int
    perplexity: float
    baseline_perplexity: float | None
    bits_per_byte: float
    baseline_bits_per_byte: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_interval: tuple[float, float] | None = None
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    flip_rate: float | None = None
    perplexity_interval: tuple[float, float] | None = None
    baseline_perplexity_interval: tuple[float, float] | None = None


def make_row(text: str, context: int, stride: int, found: Sequence[WindowSums], tokens_per_byte: float) -> QualityRow:
    """Return the figures of `found`, the windows of a text or of several."""
    tokens = sum(window.tokens for window in found)
    nats = [sum(each) / tokens for each in zip(*(window.nats for window in found), strict=True)]
    bits = [each / math.log(2) * tokens_per_byte for each in nats]
    counts = [window.tokens for window in found]
    # Nats are averaged, so an interval is one of log perplexity.
    spread = [_exp_interval(interval(each, counts)) for each in zip(*(window.nats for window in found), strict=True)]
    alone = (text, context, stride, tokens, len(found), _exp(nats[0]))
    if len(nats) == 1:
        return QualityRow(*alone, None, bits[0], perplexity_interval=spread[0])
    apart = interval([window.divergence for window in found], counts)
    return QualityRow(
        *alone,
        _exp(nats[1]),
        bits[0],
        bits[1],
        _exp(nats[0] - nats[1]),
        _exp_interval(interval([window.nats[0] - window.nats[1] for window in found], counts)),
        # Rounding can leave a sum of terms that cancel a hair below zero.
        max(0.0, sum(window.divergence for window in found) / tokens),
        apart and (max(0.0, apart[0]), apart[1]),
        sum(window.top1 for window in found) / tokens,
        sum(window.top5 for window in found) / tokens,
        sum(window.flips for window in found) / tokens,
        *spread,
    )


def _exp_interval(ends: tuple[float, float] | None) -> tuple[float, float] | None:
    return ends and (_exp(ends[0]), _exp(ends[1]))


def _exp(value: float) -> float:
    # A broken model's loss must not end an evaluation that took hours.
    return math.exp(min(value, 700.0))


def windows(length: int, context: int, stride: int, before: int = 1) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first): tokens [begin, end) are shown, and those from `first` on are scored.

    The first window scores none of its first `before` tokens.

    Source: Hugging Face, "Perplexity of fixed-length models"; only here no token is counted that isn't scored.
    """
    done = 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        first = max(done, begin + before)
        if first < end:
            yield begin, end, first
        done = end
        if end == length:
            break


def scored_tokens(model: Any, length: int, context: int, stride: int) -> int:
    """Return how many tokens of a text of `length` tokens `score` scores."""
    return sum(end - first for _, end, first in _windows(model, length, context, stride))


def _windows(model: Any, length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    return windows(length, context, stride, min(context - stride, length // 2) if has_encoder(model) else 1)


@torch.no_grad()
@devices.enough_memory("Scoring", "Lower --context, or compute in a smaller --dtype or on --device cpu.")
def score(
    model: Any,
    reference: Reference | None,
    ids: Tensor,
    context: int,
    stride: int,
    on_tokens: Callable[[int], None] | None = None,
) -> list[WindowSums]:
    """Run a model, and what it is compared with, over `ids` (tokens,); return what each window's scored tokens sum to.

    Where there is an encoder, it reads what of a window isn't scored: context − stride tokens, or half of a shorter
    text.

    Raises:
        UsageError: the models have vocabularies of different sizes.
    """
    found = []
    for begin, end, first in _windows(model, len(ids), context, stride):
        shown = ids[begin:end].to(model.device)
        logits = [predicted(model, shown, first - begin)]
        if reference is not None:
            logits.append(reference.logits(shown, first - begin))
        if len({each.shape[-1] for each in logits}) > 1:
            raise UsageError("The model and its baseline have vocabularies of different sizes.")
        found.append(_window(logits, shown[first - begin : end - begin]))
        if on_tokens:
            on_tokens(end - first)
    return found


def _window(logits: Sequence[Tensor], targets: Tensor) -> WindowSums:
    """Sum over logits (tokens, vocabulary) that predict `targets` (tokens,), a few rows at a time."""
    nats = [0.0] * len(logits)
    divergence, top1, top5, flips = 0.0, 0, 0.0, 0
    rows = max(1, _LOGITS // logits[0].shape[-1])
    for start in range(0, len(targets), rows):
        wanted = targets[start : start + rows]
        logs = [each[start : start + rows].float().log_softmax(-1) for each in logits]
        for position, each in enumerate(logs):
            nats[position] -= float(each.gather(-1, wanted[:, None]).cpu().double().sum())
        if len(logs) == 2:
            divergence += float((logs[1].exp() * (logs[1] - logs[0])).sum(-1).cpu().double().sum())
            best = [each.argmax(-1) for each in logs]
            top1 += int((best[0] == best[1]).sum())
            flips += int(((best[0] == wanted) != (best[1] == wanted)).sum())
            likeliest = [each.topk(min(TOP, each.shape[-1])).indices for each in logs]
            shared = (likeliest[0][:, :, None] == likeliest[1][:, None]).sum()
            top5 += float(shared) / likeliest[0].shape[1]
    return WindowSums(len(targets), tuple(nats), divergence, top1, top5, flips)
