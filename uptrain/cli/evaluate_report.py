"""Lay out what an evaluation and the demo found; printing itself is the console's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from uptrain.cli import console
from uptrain.evaluation import tables
from uptrain.evaluation.tables import MetricTable
from uptrain.formatting import number

if TYPE_CHECKING:
    from uptrain.evaluation.evaluate import Evaluation, ModelMetrics
    from uptrain.evaluation.samples import Sample
    from uptrain.workflows.demo.run import Demo


def evaluation(found: Evaluation, as_json: bool) -> None:
    """Show an evaluation as a table of one or two models."""
    if as_json:
        console.result_json(found.to_dict())
        return
    shown = [] if found.baseline is None else [(found.baseline.name, found.baseline, None)]
    console.table("", *_table([*shown, (found.model.name, found.model, found)]))
    if len(found.rows) > 1:
        console.table("", *_by_text(found))
    values, model = found.to_dict(), found.model.name
    baseline = None if found.baseline is None else found.baseline.name
    if len(found.speeds) > 1:
        title = "Speed, tokens/s of all sequences together (slowest to fastest)"
        _shown(title, tables.speeds(values, "this", baseline and "original"))
    if found.tasks:
        _shown("Tasks", tables.tasks(values, model, baseline))
    if found.needle:
        _shown("Retrieval of a hidden pass key", tables.needle(values, model, baseline))
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
    models: list[tuple[str, ModelMetrics, Evaluation | None]],
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


def _loss(measured: ModelMetrics) -> str:
    return f"{math.log(measured.perplexity):.4f}" if measured.cross_bytes_per_token else "–"


def _cross(measured: ModelMetrics) -> str:
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


def _shown(title: str, table: MetricTable) -> None:
    console.table(title, table.columns, table.rows)


def _sample(found: Evaluation, sample: Sample) -> None:
    pairs = [("prompt", sample.prompt), (found.model.name, sample.continuation)]
    if found.baseline is not None and sample.baseline_continuation is not None:
        pairs.insert(1, (found.baseline.name, sample.baseline_continuation))
    shared = "" if sample.common_tokens is None else f": the first {sample.common_tokens} tokens are the same"
    # Line breaks would tear a short text over a screen.
    lines = [(name, text.replace("\n", "⏎")) for name, text in pairs]
    console.facts(f"Sample of {Path(sample.text).name}{shared}", lines)


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
