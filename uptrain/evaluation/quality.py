"""Quality: what a model and its baseline predict on the same tokens, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from uptrain.checkpoint.events import Events
from uptrain.errors import UsageError
from uptrain.evaluation.pair import ModelPair
from uptrain.evaluation.progress import counted
from uptrain.evaluation.quality_row import QualityRow, WindowSums, make_row
from uptrain.evaluation.reading import has_encoder, predicted
from uptrain.evaluation.reference import Reference
from uptrain.evaluation.settings import EvaluationSettings
from uptrain.models import devices

ALL = "all"
"""Name of the row of several texts together."""
TOP = 5
_LOGITS = 2**24
"""Most logits per model that are held at once."""


def measure_quality(pair: ModelPair, settings: EvaluationSettings, events: Events) -> list[QualityRow]:
    """Return a row per text and context and, where there are several texts, a row of all texts per context.

    The last row is that of the longest context and, of several texts, of all.

    Raises:
        UsageError: the models have vocabularies of different sizes.
    """
    steps = [(context, settings.stride or context // 2) for context in settings.contexts]
    lengths = [len(text.ids) for text in pair.texts.values()]
    total = sum(scored_tokens(pair.models[0], length, *step) for step in steps for length in lengths)
    advance = counted("Scoring", total, events)
    return [row for step in steps for row in _rows(pair, *step, advance)]


def _rows(pair: ModelPair, context: int, stride: int, on_tokens: Callable[[int], None]) -> list[QualityRow]:
    """Return a row per text at one context and, where there are several texts, one of all."""
    rows, every = [], []
    for name, text in pair.texts.items():
        windows = score(pair.models[0], pair.reference, torch.from_numpy(text.ids), context, stride, on_tokens)
        rows.append(make_row(name, context, stride, windows, len(text.ids) / text.bytes))
        every += windows
    if len(rows) > 1:
        texts = pair.texts.values()
        share = sum(len(text.ids) for text in texts) / sum(text.bytes for text in texts)
        rows.append(make_row(ALL, context, stride, every, share))
    return rows


def windows(length: int, context: int, stride: int, before: int = 1) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first): the model reads tokens [begin, end), and those from `first` on are scored.

    - `length`: number of tokens of the text.
    - `context`: length of a window in tokens.
    - `stride`: how many tokens the window moves.
    - `before`: how many tokens at the begin of the first window are not scored.

    Source: Hugging Face, "Perplexity of fixed-length models"; here only scored tokens are counted.
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
    """Return how many tokens `score` scores.

    - `model`: a model of transformers; an encoder reads some of the tokens.
    - `length`: number of tokens of the text.
    - `context`: length of a window in tokens.
    - `stride`: how many tokens the window moves.
    """
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
    """Run a model and its baseline on a text, and return the sums over each window.

    An encoder reads the tokens of a window that are not scored: context − stride tokens, or half of a shorter text.

    - `model`: a model of transformers.
    - `reference`: the baseline, or None.
    - `ids`: tokens of the text, int64 (tokens,).
    - `context`: length of a window in tokens.
    - `stride`: how many tokens the window moves.
    - `on_tokens`: called with the number of tokens that were just scored.

    Raises:
        UsageError: the models have vocabularies of different sizes.
    """
    found = []
    for begin, end, first in _windows(model, len(ids), context, stride):
        shown = ids[begin:end].to(model.device)
        logits = [predicted(model, shown, first - begin)]
        if reference is not None:
            logits.append(reference.logits(shown, first - begin))
        sizes = [each.shape[-1] for each in logits]
        if len({*sizes}) > 1:
            raise UsageError(
                f"The model and its baseline have vocabularies of different sizes: {sizes[0]} and {sizes[1]}.",
                "Compare models that have one vocabulary.",
            )
        found.append(_sums(logits, shown[first - begin : end - begin]))
        if on_tokens:
            on_tokens(end - first)
    return found


def _sums(logits: Sequence[Tensor], targets: Tensor) -> WindowSums:
    """Sum over the logits (tokens, vocab_size) of one or two models that predict `targets` (tokens,).

    A few rows are computed at a time, so that memory stays small.
    """
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
    return WindowSums(tokens=len(targets), nats=tuple(nats), divergence=divergence, top1=top1, top5=top5, flips=flips)
