"""Measure a model, alone or against a baseline: perplexity, divergence, cache bytes and speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.manifest import versions
from uptrain.checkpoint.source import resolve
from uptrain.checkpoint.weights import weights_digest
from uptrain.data.sources import HELD_OUT, Builtin, Dataset, Files, TextSource
from uptrain.data.token_text import TokenText, read_tokens
from uptrain.errors import UsageError
from uptrain.evaluation.contexts import CONTEXT, SPEED_CONTEXT, check_stride, chosen_contexts
from uptrain.evaluation.needle import NeedleSettings, check_needles, find_needles
from uptrain.evaluation.progress import Progress, counted
from uptrain.evaluation.quality import QualityRow, WindowSums, make_row, score, scored_tokens, windows
from uptrain.evaluation.reading import has_encoder
from uptrain.evaluation.reference import Reference
from uptrain.evaluation.result import Evaluation, EvaluationRun, ModelMetrics, save_place, write_evaluation
from uptrain.evaluation.samples import check_samples, write_samples
from uptrain.evaluation.speed import SpeedCell, cache_bytes_per_token, time_cells
from uptrain.evaluation.tasks import TaskSettings, load_tasks, run_tasks
from uptrain.models import devices, loading
from uptrain.models.peak_memory import memory_bytes

__all__ = [
    "HELD_OUT",
    "Evaluation",
    "ModelMetrics",
    "QualityRow",
    "evaluate",
    "save_place",
    "windows",
    "write_evaluation",
]

ALL = "all"
"""What the row of several texts together is called."""


@devices.full_fp32()
@devices.enough_memory("Evaluating", "Compute in a smaller --dtype, or on --device cpu.")
def evaluate(
    model: str,
    baseline: str | Reference | None = None,
    text: Sequence[TextSource] = (HELD_OUT,),
    *,
    context: int | Sequence[int] | None = None,
    stride: int | None = None,
    tokens: int = 32_768,
    speed_context: int | Sequence[int] | None = None,
    speed_batch: int | Sequence[int] = 1,
    decode_tokens: int = 32,
    repeats: int = 5,
    dtype: str | None = None,
    tasks: TaskSettings | None = None,
    needle: NeedleSettings | None = None,
    samples: int = 0,
    sample_tokens: int = 48,
    allow_pickle: bool = False,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Measure `model`, and `baseline` on the same tokens: at most `tokens` of each text, at each context.

    A context is 1024 tokens, and before decoding is timed 512, unless others are asked for; a default that the models
    have no positions for is shortened, which `on_note` hears, and what was asked for is refused.

    A `Reference` as the baseline spares the next evaluation what this one ran of it.

    Perplexity slides a window of `context` tokens by `stride` (default: half of it) and scores each token once,
    with at least `context - stride` tokens before it; `stride == context` is plain block perplexity. Where there is an
    encoder, it reads those tokens, and the decoder writes the `stride` tokens that follow them. Quality is
    computed in fp32 on a CPU, elsewhere in the checkpoint's dtype, unless `dtype` says otherwise. Speed is of
    each `speed_batch` (1 is always among them) after each `speed_context` tokens, the median of `repeats` runs in
    turns; 0 leaves it out. `tasks` are run by
    lm-eval, which is imported only then; `needle` asks for pass keys hidden in the first text; `samples` openings
    of each text are continued by `sample_tokens` tokens, greedily; all three are for decoders alone. `allow_pickle`
    permits to read `.bin` weights, with torch's restricted unpickler. `on_progress`
    is told how far each part is.

    Raises:
        UsageError: text that is too short, another tokenizer or way of reading than the baseline's, sizes that don't
            fit, or what can't be asked of the model.
        CheckpointError: a model that can't be loaded.
    """
    loading.quiet()
    reference = Reference(resolve(baseline, None, allow_pickle)) if isinstance(baseline, str) else baseline
    sources = [resolve(model, None, allow_pickle), *([reference.source] if reference else [])]
    loading.check_weights(*sources)
    names = [source.name for source in sources]
    loading.check_heads(*sources)
    tokenizers = [loading.load_tokenizer(source.path) for source in sources]
    texts = {}
    for each in text:
        read = [read_tokens([each], tokenizer, tokens) for tokenizer in tokenizers]
        if reference is not None and not _same(read[0], read[1]):
            raise UsageError(f"{model} and {names[1]} have different tokenizers, so their tokens can't be compared.")
        texts[text_name(each)] = read[0]
    # What can't be run is said before a model is loaded.
    loaded_tasks = load_tasks(tasks) if tasks else None
    device = devices.device()
    wanted = devices.scoring_dtype(loading.dtype_named(dtype), device)
    digest = weights_digest(sources[0].path)
    loaded = [loading.load_model(sources[0]), *([reference.load(loading.load_model)] if reference else [])]
    own = [each.dtype for each in loaded]
    loaded = [loading.placed(each, device, wanted or each.dtype).eval() for each in loaded]
    for each, ids in product(loaded, [text.ids for text in texts.values()]):
        loading.check_tokens(each, ids)
    room = min((loading.longest_context(each) or 2**31, name) for each, name in zip(loaded, names, strict=True))
    longest = room[0]
    most = max(len(each.ids) for each in texts.values())
    contexts = chosen_contexts("--context", context, CONTEXT, *room, on_note=on_note)
    if max(contexts) > most and context is not None:
        on_note(f"--context {max(contexts)} is {most}: no text here has more tokens.")
    contexts = sorted({min(each, most) for each in contexts})
    depths = [0]
    if repeats:
        depths = chosen_contexts(
            "--speed-context", speed_context, SPEED_CONTEXT, *room, beside=decode_tokens + 1, on_note=on_note
        )
    _check_reading(names, loaded, bool(tasks or needle or samples))
    check_stride(stride, contexts[0], has_encoder(loaded[0]))
    if needle:
        needle = replace(needle, lengths=needle.lengths or tuple(contexts))
        check_needles(tokenizers[0], needle, longest)
    if samples:
        check_samples(sample_tokens, longest)
    steps = [(size, stride or size // 2) for size in contexts]
    total = sum(scored_tokens(loaded[0], len(each.ids), *step) for step in steps for each in texts.values())
    scoring = counted("Scoring", total, on_progress)
    rows = [row for step in steps for row in _rows(loaded[0], reference, texts, *step, scoring)]
    ran = run_tasks(loaded, tokenizers, loaded_tasks, tasks.limit, on_progress) if tasks else []
    ids = next(iter(texts.values())).ids
    cells = list(find_needles(loaded, tokenizers[0], ids.tolist(), needle, on_progress)) if needle else []
    all_ids = {name: text.ids for name, text in texts.items()}
    written = write_samples(loaded, tokenizers[0], all_ids, samples, sample_tokens, on_progress) if samples else []
    quality_dtype = _name(loaded[0])
    loaded = [loading.placed(each, None, itself) for each, itself in zip(loaded, own, strict=True)]
    cache = [cache_bytes_per_token(each) for each in loaded]
    if not devices.has_fast_bf16(device):
        loaded = [
            loading.placed(each, None, torch.float32) if each.dtype is torch.bfloat16 else each for each in loaded
        ]
    batches = sorted({1, *_listed(speed_batch)})
    places = [(batch, depth) for batch in batches for depth in depths] if repeats else []
    timed = time_cells(loaded, torch.from_numpy(ids), places, decode_tokens, repeats, on_progress)
    # The last row is that of the longest context and, of several texts, of all.
    head, first = rows[-1], timed[0] if timed else None
    measured = _measured(names, head, cache, first)
    settings = {
        "texts": list(texts), "text_digests": _digests(all_ids), "contexts": contexts, "stride": stride,
        "tokens": tokens,
        "tasks": asdict(tasks) if tasks else None, "needle": asdict(needle) if needle else None, "samples": samples,
        "sample_tokens": sample_tokens, "speed_contexts": depths if places else [], "speed_batches": batches,
        "decode_tokens": decode_tokens,
    }  # fmt: skip
    of = {"name": names[1], "weights": reference.weights()} if reference else None
    run = EvaluationRun(
        digest, of, quality_dtype, str(device), _name(loaded[0]), repeats, memory_bytes(device), settings, versions()
    )
    return Evaluation(
        measured[0], measured[1] if reference else None, head.kl, head.top1_agreement, head.tokens,
        head.context, head.stride, first.context if first else 0, _name(loaded[0]), quality_dtype, str(device),
        head.windows, tuple(texts), head.kl_interval, head.perplexity_ratio, head.perplexity_ratio_interval,
        head.top5_agreement, head.flip_rate, repeats, memory_bytes(device), tuple(rows), tuple(ran), tuple(cells),
        tuple(written), tuple(timed), run,
    )  # fmt: skip


def _check_reading(names: Sequence[str], loaded: Sequence[Any], more: bool) -> None:
    for name, each in zip(names, loaded, strict=True):
        loading.check_reads_text(each, name, "eval")
    encoders = [has_encoder(each) for each in loaded]
    if len(set(encoders)) > 1:
        raise UsageError(f"Of {' and '.join(names)} only one has an encoder, so they can't be given the same text.")
    if more and encoders[0]:
        raise UsageError(
            f"{names[0]} has an encoder; tasks, needles and samples are asked of decoders alone.",
            "Leave out --task, --needle and --samples.",
        )


def _measured(
    names: Sequence[str], head: QualityRow, cache: Sequence[tuple[int, int]], first: SpeedCell | None
) -> list[ModelMetrics]:
    """Return each model's own figures: quality of the row `head`, speed of the cell `first`."""
    found = []
    for name, (held, cross), of in zip(names, cache, ("", "baseline_"), strict=False):
        own = {key: getattr(head, f"{of}{key}") for key in ("perplexity", "bits_per_byte")}
        for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "decode_range"):
            own[key] = None if first is None else getattr(first, f"{of}{key}")
        found.append(ModelMetrics(name, cache_bytes_per_token=held, cross_bytes_per_token=cross, **own))
    return found


def _digests(texts: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Digest each text's tokens, and all of them together: a file may hold another text the next time.

    By the number of tokens: of the whole, and of each shorter beginning of 32, 64, 128, … tokens, so that runs that
    read more or less of a text can be compared. Of all together there is the whole alone.
    """

    def digest(ids: Any) -> str:
        one = Checksum()
        one.update(np.asarray(ids, np.int64).tobytes())
        return one.text()

    found = {}
    for name, ids in texts.items():
        lengths = {len(ids), *(2**power for power in range(5, len(ids).bit_length()))}
        found[name] = {str(length): digest(ids[:length]) for length in sorted(lengths)}
    if len(found) > 1:
        together = np.concatenate([np.asarray(ids, np.int64) for ids in texts.values()])
        found[ALL] = {str(len(together)): digest(together)}
    return found


def _rows(
    model: Any, reference: Reference | None, texts: dict[str, TokenText], context: int, stride: int,
    on_tokens: Callable[[int], None],
) -> list[QualityRow]:  # fmt: skip
    """Return a row of each text at one context and, where there are several, one of all."""
    found: dict[str, list[WindowSums]] = {}
    for name, text in texts.items():
        found[name] = score(model, reference, torch.from_numpy(text.ids), context, stride, on_tokens)
    rows = [make_row(name, context, stride, found[name], len(text.ids) / text.bytes) for name, text in texts.items()]
    if len(texts) > 1:
        share = sum(len(text.ids) for text in texts.values()) / sum(text.bytes for text in texts.values())
        rows.append(make_row(ALL, context, stride, [window for each in found.values() for window in each], share))
    return rows


def text_name(source: TextSource) -> str:
    """Return what a text is called, as `--text` would name it."""
    if isinstance(source, Builtin):
        return f"{source.builtin}:{source.split}"
    if isinstance(source, Dataset):
        return source.dataset
    if isinstance(source, Files):
        return source.files if isinstance(source.files, str) else ", ".join(source.files)
    return source.source


def _listed(value: int | Sequence[int]) -> Sequence[int]:
    return [value] if isinstance(value, int) else value


def _name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _same(one: TokenText, other: TokenText) -> bool:
    return len(one.ids) == len(other.ids) and bool((one.ids == other.ids).all())
