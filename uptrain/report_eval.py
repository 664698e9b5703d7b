"""Lay out what an evaluation and the demo found; printing itself is the console's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from uptrain import console
from uptrain.words import number

if TYPE_CHECKING:
    from uptrain.demo.run import Demo
    from uptrain.evaluate import Evaluation, Measured
    from uptrain.measure.samples import Sample


def evaluation(found: Evaluation, as_json: bool) -> None:
    """Show an evaluation as a table of one or two models."""
    if as_json:
        console.result_json(found.to_dict())
        return
    shown = [] if found.baseline is None else [(found.baseline.name, found.baseline, None)]
    console.table("", *_table([*shown, (found.model.name, found.model, found)]))
    if len(found.rows) > 1:
        console.table("", *_by_text(found))
    if len(found.speeds) > 1:
        console.table("Speed, tokens/s of all sequences together (slowest to fastest)", *_speeds(found))
    if found.tasks:
        console.table("Tasks", *_tasks(found))
    if found.needle:
        console.table("Retrieval of a hidden pass key", *_needle(found))
    for sample in found.samples:
        _sample(found, sample)
    console.note(_how(found))


def demo(found: Demo, as_json: bool) -> None:
    """Show the demo's three models in one table."""
    if as_json:
        console.result_json(found.to_dict())
        return
    shown = [
        ("original", found.original, None),
        ("GQA-4 converted", found.converted.model, found.converted),
        ("GQA-4 uptrained", found.uptrained.model, found.uptrained),
    ]
    console.table("", *_table(shown))
    console.note(_how(found.uptrained))
    console.note(f"The checkpoints are in {found.folder}. Next: uptrain inspect MODEL, uptrain convert MODEL --to gqa")


def _table(
    models: list[tuple[str, Measured, Evaluation | None]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns, one a model, and rows, one a figure; an evaluation says how far the model is from another."""
    names, measured, against = zip(*models, strict=True)
    rows = [
        ("perplexity", *(f"{each.perplexity:.3f}" for each in measured)),
        ("  seq2seq loss, nats", *(_loss(each) for each in measured)),
        ("  times the original's", *(_far(each, "perplexity_ratio", "{:.4f}") for each in against)),
        ("bits per byte", *(f"{each.bits_per_byte:.4f}" for each in measured)),
        ("KL from the original", *(_far(each, "kl", "{:.4g}") for each in against)),
        ("top-1 agreement", *(_far(each, "top1_agreement", "{:.1%}") for each in against)),
        ("top-5 agreement", *(_far(each, "top5_agreement", "{:.1%}") for each in against)),
        ("flip rate", *(_far(each, "flip_rate", "{:.2%}") for each in against)),
        ("cache per token", *(console.size(each.cache_bytes_per_token) for each in measured)),
        ("  of it cross-attention", *(_cross(each) for each in measured)),
        ("decode, tokens/s", *(number(each.decode_tokens_per_second, "{:,.0f}") for each in measured)),
        ("prefill, tokens/s", *(number(each.prefill_tokens_per_second, "{:,.0f}") for each in measured)),
    ]
    # A figure that no model has is no row.
    return ("", *names), [row for row in rows if set(row[1:]) != {"–"}]


def _loss(measured: Measured) -> str:
    return f"{math.log(measured.perplexity):.4f}" if measured.cross_bytes_per_token else "–"


def _cross(measured: Measured) -> str:
    return console.size(measured.cross_bytes_per_token) if measured.cross_bytes_per_token else "–"


def _far(found: Evaluation | None, figure: str, form: str) -> str:
    if found is None:
        return "–"
    return number(getattr(found, figure), form, getattr(found, f"{figure}_interval", None))


def _by_text(found: Evaluation) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns and a row for each text and context."""
    # A path is told by its end.
    names = [(Path(row.text).name, f"{row.context:,}") for row in found.rows]
    if found.baseline is None:
        ranged = [(number(row.perplexity, "{:.2f}", row.perplexity_interval),) for row in found.rows]
        return ("text", "context", "perplexity"), [(*name, *each) for name, each in zip(names, ranged, strict=True)]
    # The ratio's interval is the one that compares: those of the two perplexities hold the text's own spread.
    figures = [
        (f"{row.perplexity:.2f}", f"{row.baseline_perplexity:.2f}",
         f"{row.perplexity_ratio:.3f}" if row.perplexity_ratio_interval is None
         else "–".join(f"{end:.3f}" for end in row.perplexity_ratio_interval),
         f"{row.kl:.3g}", f"{row.top1_agreement:.1%}", f"{row.flip_rate:.2%}")
        for row in found.rows
    ]  # fmt: skip
    columns = ("text", "context", "perplexity", "original's", "ratio", "KL", "top-1", "flips")
    return columns, [(*name, *each) for name, each in zip(names, figures, strict=True)]


def _tasks(found: Evaluation) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns and a row for each metric of each task, with standard errors."""
    alone: list[tuple[str, ...]] = [
        (each.task, each.metric if each.filter == "none" else f"{each.metric}, {each.filter}", f"{each.samples:,}",
         _with_error(each.value, each.stderr))
        for each in found.tasks
    ]  # fmt: skip
    if found.baseline is None:
        return ("task", "metric", "samples", found.model.name), alone
    against = [
        (_with_error(each.baseline_value, each.baseline_stderr), _between(each.difference_interval, "+.4g"))
        for each in found.tasks
    ]
    columns = ("task", "metric", "samples", found.baseline.name, found.model.name, "difference, 95 %")
    rows = [(*row[:3], base, row[3], apart) for row, (base, apart) in zip(alone, against, strict=True)]
    return columns, rows


def _needle(found: Evaluation) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns and a row for each length and depth: keys found, and nats per token of the key."""
    places = [(f"{cell.length:,}", f"{cell.depth:.0%}", str(cell.samples)) for cell in found.needle]
    ours = [
        (number(cell.exact_match, "{:.0%}", cell.exact_match_interval), f"{cell.log_probability:.2f}")
        for cell in found.needle
    ]
    columns = ("length", "depth", "samples", f"{found.model.name}: found", "log p")
    if found.baseline is None:
        return columns, [(*place, *own) for place, own in zip(places, ours, strict=True)]
    theirs = [
        (number(cell.baseline_exact_match, "{:.0%}", cell.baseline_exact_match_interval),
         f"{cell.baseline_log_probability:.2f}")
        for cell in found.needle
    ]  # fmt: skip
    rows: list[tuple[str, ...]] = [(*place, *base, *own) for place, base, own in zip(places, theirs, ours, strict=True)]
    return (*columns[:3], f"{found.baseline.name}: found", "log p", *columns[3:]), rows


def _sample(found: Evaluation, sample: Sample) -> None:
    pairs = [("prompt", sample.prompt), (found.model.name, sample.continuation)]
    if found.baseline is not None and sample.baseline_continuation is not None:
        pairs.insert(1, (found.baseline.name, sample.baseline_continuation))
    shared = "" if sample.common_tokens is None else f": the first {sample.common_tokens} tokens are the same"
    # Line breaks would tear a short text over a screen.
    lines = [(name, text.replace("\n", "⏎")) for name, text in pairs]
    console.facts(f"Sample of {Path(sample.text).name}{shared}", lines)


def _with_error(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" + ("" if stderr is None else f" ± {stderr:.2g}")


def _between(interval: tuple[float, float] | None, form: str) -> str:
    return "–" if interval is None else " to ".join(f"{end:{form}}" for end in interval)


def _speeds(found: Evaluation) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns and a row for each batch and context."""
    places = [(str(cell.batch), f"{cell.context:,}") for cell in found.speeds]
    ours = [
        (
            number(cell.prefill_tokens_per_second, "{:,.0f}"),
            number(cell.decode_tokens_per_second, "{:,.0f}", cell.decode_range),
        )
        for cell in found.speeds
    ]
    if found.baseline is None:
        alone = ("batch", "context", "prefill", "decode")
        return alone, [(*place, *own) for place, own in zip(places, ours, strict=True)]
    theirs = [
        (number(cell.baseline_prefill_tokens_per_second, "{:,.0f}"),
         number(cell.baseline_decode_tokens_per_second, "{:,.0f}", cell.baseline_decode_range))
        for cell in found.speeds
    ]  # fmt: skip
    rows: list[tuple[str, ...]] = [
        (*place, base[0], own[0], base[1], own[1], number(cell.decode_ratio, "{:.2f}", cell.decode_ratio_range))
        for place, base, own, cell in zip(places, theirs, ours, found.speeds, strict=True)
    ]
    columns = ("batch", "context", "prefill: original", "this", "decode: original", "this", "times it")
    return columns, rows


def _how(found: Evaluation) -> str:
    speed = f" Speed: one sequence at {found.speed_context} tokens, {found.speed_dtype}." if found.speed_context else ""
    against = " KL is in nats per token." if found.kl is not None else ""
    if found.model.cross_bytes_per_token:
        read = found.context - found.stride
        against += (
            f" Of each window the encoder reads {read} tokens, and the decoder writes what follows, teacher-forced."
            " Cross-attention's cache is per token of the source, the rest per token of the target."
        )
    if found.kl_interval is not None:
        against += f" In brackets: 95 % intervals over {found.windows} windows."
    if found.peak_memory_bytes is not None:
        speed += f" Peak memory {console.size(found.peak_memory_bytes)}, all models loaded."
    return (
        f"{found.tokens:,} tokens, context {found.context}, stride {found.stride}, {found.dtype} on {found.device}."
        + against + speed
    )  # fmt: skip
