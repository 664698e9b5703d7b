"""Quality metrics of one text at one context, computed from the sums over its windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from uptrain.evaluation.intervals import interval


@dataclass(frozen=True, kw_only=True)
class WindowSums:
    """Sums over the scored tokens of one window.

    - `tokens`: number of scored tokens.
    - `nats`: the negative log-likelihood of each model, the model's first.
    - `divergence`: sum of KL(baseline ‖ model) in nats.
    - `top1`: number of tokens at which both models rank the same token first.
    - `top5`: sum of the shares of the baseline's five likeliest tokens that are among the model's five.
    - `flips`: number of tokens that exactly one of the two models predicts right.
    """

    tokens: int
    nats: tuple[float, ...]
    divergence: float = 0.0
    top1: int = 0
    top5: float = 0.0
    flips: int = 0


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """Quality on one text, or on `all` of them, at one context; what needs a baseline is None without one.

    Intervals are (low, high) at 95 %, blocked over windows; None where there is only one window. `top5_agreement` is
    the mean share of the baseline's five likeliest tokens that are among the model's five. `flip_rate` is the share of
    tokens that exactly one of the two models predicts right.

    Source: Dutta et al. 2024, "Accuracy is Not All You Need", section 3 (flips).
    """

    text: str
    context: int
    stride: int
    tokens: int
    windows: int
    perplexity: float
    baseline_perplexity: float | None = None
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


def make_row(text: str, context: int, stride: int, windows: Sequence[WindowSums], tokens_per_byte: float) -> QualityRow:
    """Return the metrics of one text, or of several together.

    - `text`: name of the text.
    - `context`: length of the windows in tokens.
    - `stride`: how many tokens the window moves.
    - `windows`: sums over each window of the text.
    - `tokens_per_byte`: tokens of the text per byte of its UTF-8.
    """
    counts = [window.tokens for window in windows]
    tokens = sum(counts)
    by_model = list(zip(*(window.nats for window in windows), strict=True))
    nats = [sum(sums) / tokens for sums in by_model]
    bits = [each / math.log(2) * tokens_per_byte for each in nats]
    # Nats are averaged, so the interval is one of log perplexity.
    intervals = [_exp_interval(interval(sums, counts)) for sums in by_model]
    row = QualityRow(
        text=text, context=context, stride=stride, tokens=tokens, windows=len(windows), perplexity=_exp(nats[0]),
        bits_per_byte=bits[0], perplexity_interval=intervals[0],
    )  # fmt: skip
    if len(nats) == 1:
        return row
    divergence = interval([window.divergence for window in windows], counts)
    difference = interval([one - other for one, other in zip(*by_model, strict=True)], counts)
    return replace(
        row,
        baseline_perplexity=_exp(nats[1]),
        baseline_bits_per_byte=bits[1],
        baseline_perplexity_interval=intervals[1],
        perplexity_ratio=_exp(nats[0] - nats[1]),
        perplexity_ratio_interval=_exp_interval(difference),
        # Rounding can leave a sum of terms that cancel slightly below zero.
        kl=max(0.0, sum(window.divergence for window in windows) / tokens),
        kl_interval=divergence and (max(0.0, divergence[0]), divergence[1]),
        top1_agreement=sum(window.top1 for window in windows) / tokens,
        top5_agreement=sum(window.top5 for window in windows) / tokens,
        flip_rate=sum(window.flips for window in windows) / tokens,
    )


def _exp_interval(ends: tuple[float, float] | None) -> tuple[float, float] | None:
    return ends and (_exp(ends[0]), _exp(ends[1]))


def _exp(value: float) -> float:
    # A broken model's loss must not end an evaluation that took hours.
    return math.exp(min(value, 700.0))
