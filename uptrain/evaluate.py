"""Measure a model, alone or against a baseline: perplexity, divergence, cache bytes and speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from uptrain import models
from uptrain.checkpoint.source import resolve
from uptrain.data import TokenText, read_tokens
from uptrain.errors import UsageError
from uptrain.recipe_schema import Builtin, DataSource

HELD_OUT = Builtin(builtin="python-stdlib", split="held-out")
_LOGITS = 2**24
"""Logits held at once for one model."""
_CACHE_TOKENS = 64


@dataclass(frozen=True)
class Measured:
    """One model's figures: perplexity per token, bits per byte of text, cache bytes per token, tokens per second."""

    name: str
    perplexity: float
    bits_per_byte: float
    cache_bytes_per_token: int
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None


@dataclass(frozen=True)
class Evaluation:
    """A model's figures, the baseline's on the same tokens, and how far apart their predictions are.

    `kl` is the mean of KL(baseline ‖ model) in nats per token; `top1_agreement` the share of tokens at which both
    rank the same one first. `dtype` is what these and perplexity were computed in; cache and speed are measured in
    each checkpoint's own dtype, as it would be served; only that the speed of bfloat16 is taken in float32 on a device
    that can't multiply it. `speed_dtype` is the model's.
    """

    model: Measured
    baseline: Measured | None
    kl: float | None
    top1_agreement: float | None
    tokens: int
    context: int
    stride: int
    speed_context: int
    speed_dtype: str
    dtype: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def evaluate(
    model: str,
    baseline: str | None = None,
    text: Sequence[DataSource] = (HELD_OUT,),
    *,
    context: int = 1024,
    stride: int | None = None,
    tokens: int = 32_768,
    speed_context: int = 512,
    decode_tokens: int = 32,
    repeats: int = 5,
    dtype: str | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure `model`, and `baseline` on the same tokens.

    Perplexity slides a window of `context` tokens by `stride` (default: half of it) and scores each token once,
    with at least `context - stride` tokens before it; `stride == context` is plain block perplexity. Quality is
    computed in fp32 on a CPU, elsewhere in the checkpoint's dtype, unless `dtype` says otherwise. Speed is of one
    sequence after `speed_context` tokens, the median of `repeats` runs in turns; 0 leaves it out.

    Raises:
        UsageError: text that is too short, another tokenizer than the baseline's, or sizes that don't fit.
        CheckpointError: a model that can't be loaded.
    """
    models.quiet()
    names = [model] if baseline is None else [model, baseline]
    sources = [resolve(name) for name in names]
    texts = [read_tokens(text, models.load_tokenizer(source.path), tokens) for source in sources]
    if baseline is not None and not _same(texts[0], texts[1]):
        raise UsageError(f"{model} and {baseline} have different tokenizers, so their tokens can't be compared.")
    device = _device()
    wanted = models.dtype_named(dtype) or (torch.float32 if device.type == "cpu" else None)
    loaded = [models.load_model(source) for source in sources]
    own = [each.dtype for each in loaded]
    loaded = [each.to(device=device, dtype=wanted or each.dtype).eval() for each in loaded]
    longest = min(_positions(each) for each in loaded)
    context = min(context, longest, len(texts[0].ids))
    stride = context // 2 if stride is None else stride
    if not 1 <= stride <= context:
        raise UsageError(f"stride {stride} must lie between 1 and the context of {context} tokens.")
    quality = _quality(loaded, torch.from_numpy(texts[0].ids), context, stride, on_tokens)
    quality_dtype = _name(loaded[0])
    loaded = [each.to(itself) for each, itself in zip(loaded, own, strict=True)]
    cache = [cache_bytes_per_token(each) for each in loaded]
    if not models.has_fast_bf16(device):
        loaded = [each.float() if each.dtype is torch.bfloat16 else each for each in loaded]
    speed_context = max(1, min(speed_context, longest - decode_tokens - 1)) if repeats else 0
    speeds = _speeds(loaded, texts[0], speed_context, decode_tokens, repeats)
    share = texts[0].bytes / len(texts[0].ids)
    measured = [
        Measured(name, math.exp(nats), nats / math.log(2) / share, held, *speed)
        for name, nats, held, speed in zip(names, quality.nats, cache, speeds, strict=True)
    ]
    return Evaluation(
        measured[0], measured[1] if baseline is not None else None, quality.kl, quality.agreement, quality.tokens,
        context, stride, speed_context, _name(loaded[0]), quality_dtype, str(device),
    )  # fmt: skip


def _device() -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


def _name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _same(one: TokenText, other: TokenText) -> bool:
    return len(one.ids) == len(other.ids) and bool((one.ids == other.ids).all())


def _positions(model: Any) -> int:
    value = getattr(model.config, "max_position_embeddings", None)
    return value if isinstance(value, int) else 2**31


@dataclass(frozen=True)
class _Quality:
    nats: list[float]
    kl: float | None
    agreement: float | None
    tokens: int


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first): tokens [begin, end) are shown, and those from `first` on are scored.

    Source: Hugging Face, "Perplexity of fixed-length models"; only here no token is counted that isn't scored.
    """
    done = 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        first = max(done, begin + 1)
        if first < end:
            yield begin, end, first
        done = end
        if end == length:
            break


@torch.no_grad()
def _quality(
    loaded: Sequence[Any], ids: torch.Tensor, context: int, stride: int, on_tokens: Callable[[int], None] | None
) -> _Quality:
    nats = [0.0] * len(loaded)
    divergence, agreed, scored = 0.0, 0, 0
    for begin, end, first in windows(len(ids), context, stride):
        shown = ids[begin:end].to(loaded[0].device)
        # The logits at a position predict the token after it, so the last position's are not needed.
        keep = slice(first - 1 - begin, end - 1 - begin)
        logits = [each(input_ids=shown[None], use_cache=False).logits[0, keep] for each in loaded]
        if len({each.shape[-1] for each in logits}) > 1:
            raise UsageError("The model and its baseline have vocabularies of different sizes.")
        rows = max(1, _LOGITS // logits[0].shape[-1])
        for start in range(0, end - first, rows):
            targets = ids[first + start : min(first + start + rows, end)].to(shown.device)
            logs = [each[start : start + rows].float().log_softmax(-1) for each in logits]
            for position, each in enumerate(logs):
                nats[position] -= float(each.gather(-1, targets[:, None]).double().sum())
            if len(logs) == 2:
                difference = logs[1].exp() * (logs[1] - logs[0])
                divergence += float(difference.double().sum())
                agreed += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
        scored += end - first
        if on_tokens:
            on_tokens(end - first)
    pair = len(loaded) == 2
    # Rounding can leave a sum of terms that cancel a hair below zero.
    kl = max(0.0, divergence / scored) if pair else None
    return _Quality([each / scored for each in nats], kl, agreed / scored if pair else None, scored)


@torch.no_grad()
def cache_bytes_per_token(model: Any) -> int:
    """Run a short text through the model and count the bytes its cache holds per token, over all layers."""
    ids = torch.arange(_CACHE_TOKENS, device=model.device)[None] % model.config.vocab_size
    cache = model(input_ids=ids, use_cache=True).past_key_values
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return round(sum(tensor.nbytes for tensor in tensors) / _CACHE_TOKENS)


def _speeds(
    loaded: Sequence[Any], text: TokenText, context: int, decode_tokens: int, repeats: int
) -> list[tuple[float | None, float | None]]:
    if not repeats:
        return [(None, None)] * len(loaded)
    ids = torch.from_numpy(text.ids)
    ids = ids.repeat(math.ceil(context / len(ids)))[:context]
    runs: list[list[tuple[float, float]]] = [[] for _ in loaded]
    for turn in range(repeats + 1):
        for each, times in zip(loaded, runs, strict=True):
            measured = _time(each, ids[None].to(each.device), decode_tokens)
            # The first turn warms up.
            if turn:
                times.append(measured)
    return [
        (context / statistics.median(p for p, _ in times), decode_tokens / statistics.median(d for _, d in times))
        for times in runs
    ]


@torch.no_grad()
def _time(model: Any, ids: torch.Tensor, decode_tokens: int) -> tuple[float, float]:
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
