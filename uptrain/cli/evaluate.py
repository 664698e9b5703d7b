"""`uptrain eval`: its options, its call and the tables it prints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uptrain.cli import console
from uptrain.cli.options import (
    check_belongs,
    device_option,
    examples,
    json_option,
    quality_dtype_option,
    texts_of,
    window_options,
)
from uptrain.cli.types import Sizes
from uptrain.errors import UsageError
from uptrain.evaluation import tables
from uptrain.evaluation.tables import MetricTable
from uptrain.formatting import number, size

if TYPE_CHECKING:
    from uptrain.evaluation.reference import Reference
    from uptrain.evaluation.result import Evaluation, ModelMetrics
    from uptrain.evaluation.samples import Sample
    from uptrain.evaluation.settings import NeedleSettings, TaskSettings


@click.command(
    epilog=examples(
        "uptrain eval demo-gqa4",
        "uptrain eval demo-gqa4 --baseline demo",
        "uptrain eval ./llama-gqa4 --baseline ./llama --text wiki.test.txt --context 2048 --stride 512",
        "uptrain eval ./llama-gqa4 --baseline ./llama --text wiki.txt --text code.jsonl --context 1024,4096",
        "uptrain eval ./llama-gqa4 --baseline ./llama --task piqa,./my-task.yaml",
        "uptrain eval ./llama-gqa4 --baseline ./llama --needle --needle-lengths 1024,4096,16384",
        "uptrain eval ./llama-gqa4 --baseline ./llama --speed-batch 1,8 --speed-context 512,4096,16384",
    )
)
@click.argument("directory", metavar="MODEL")
@click.option(
    "--baseline", help="Model to compare with, on the same tokens. Default: the source that uptrain.json of MODEL "
    "names, if it is on this machine.",
)  # fmt: skip
@click.option("--no-baseline", is_flag=True, help="Compare with no baseline.")
@click.option(
    "--text", "texts", multiple=True, help="Text file, JSONL or Parquet file, glob, or dataset. Repeatable: each text "
    "is a row. Default: python-stdlib:held-out, which every machine has.",
)  # fmt: skip
@click.option(
    "--context", "contexts", type=Sizes(2), metavar="TOKENS[,TOKENS]", multiple=True, help="Length of the window that "
    "is scored. Repeatable: each length scores the same text. Default: 1024, or MODEL's maximum if that is shorter.",
)  # fmt: skip
@window_options
@click.option(
    "--speed-context", type=Sizes(1), metavar="TOKENS[,TOKENS]", help="Context lengths for the speed benchmark. "
    "Default: 512, or MODEL's maximum if that is shorter.",
)  # fmt: skip
@click.option(
    "--speed-batch", type=Sizes(1), metavar="N[,N]", default="1", show_default=True, help="Batch sizes for the speed "
    "benchmark, at each --speed-context. 1 is always included.",
)  # fmt: skip
@click.option("--no-speed", is_flag=True, help="Do not measure speed.")
@device_option
@quality_dtype_option
@click.option(
    "--task", "tasks", metavar="NAME[,NAME]", multiple=True, help="Also run these tasks of lm-eval: names, or paths of "
    "task YAML files. Repeatable. Needs 'uptrain[eval]'.",
)  # fmt: skip
@click.option("--include-path", type=click.Path(), metavar="DIR", help="(--task) Another folder of task YAML files.")
@click.option("--task-limit", type=click.IntRange(1), metavar="N", help="(--task) Number of documents. Default: all.")
@click.option(
    "--needle", is_flag=True, help="Also measure retrieval: find a pass key that is hidden in the text, by length and "
    "depth.",
)  # fmt: skip
@click.option(
    "--needle-lengths", type=Sizes(1), metavar="TOKENS[,TOKENS]", help="(--needle) Lengths of the prompts. Default: "
    "those of --context.",
)  # fmt: skip
@click.option(
    "--needle-depths", type=Sizes(0, 100), metavar="PERCENT[,PERCENT]", default="0,25,50,75,100", show_default=True,
    help="(--needle) Positions of the key, as shares of the text before it.",
)  # fmt: skip
@click.option(
    "--needle-trials", type=click.IntRange(1), default=10, show_default=True, help="(--needle) Prompts per length and "
    "depth.",
)  # fmt: skip
@click.option(
    "--samples", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="Also print how the models "
    "continue N openings of each text.",
)  # fmt: skip
@click.option(
    "--sample-tokens", type=click.IntRange(1), default=48, show_default=True, help="(--samples) Length of a "
    "continuation, in tokens.",
)  # fmt: skip
@click.option(
    "--allow-pickle", is_flag=True, help="Also read .bin weights of both models, with restricted unpickling. Use it "
    "only for models that you trust.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), help="File of the result. Default: MODEL/eval.json, if uptrain wrote "
    "MODEL.",
)  # fmt: skip
@json_option
def evaluate(directory: str, **options: Any) -> None:
    """Measure perplexity, cache bytes and speed of MODEL, alone or against a baseline.

    Against a baseline, also measures how far the predictions of the two models are apart, with 95 % intervals.
    docs/evaluation.md defines every metric and the JSON.

    The result is added to MODEL/eval.json. Earlier measurements of the same weights stay there.
    """
    from uptrain import evaluation
    from uptrain.checkpoint.events import Events
    from uptrain.evaluation.result import save_place, write_evaluation

    _check_options(options)
    options["text"] = texts_of(options.pop("texts"))
    options["context"] = [tokens for listed in options.pop("contexts") for tokens in listed] or None
    named, none, allow_pickle = (options.pop(name) for name in ("baseline", "no_baseline", "allow_pickle"))
    baseline = _baseline(directory, named, none, allow_pickle)
    if options.pop("no_speed"):
        options["repeats"] = 0
    options["tasks"] = _tasks(options)
    options["needle"] = _needles(options)
    out, as_json = options.pop("out"), options.pop("as_json")
    settings = evaluation.EvaluationSettings(**options)
    # Refuse a file that can't be written before anything is measured.
    place = save_place(directory, out)
    with console.parts_progress() as show:
        events = Events(part=show, note=console.note)
        found = evaluation.evaluate(directory, settings, baseline=baseline, allow_pickle=allow_pickle, events=events)
    _show(found, as_json)
    if place is not None:
        notes = write_evaluation(found, place)
        console.note(" ".join([f"Wrote {place}.", *notes]))


def _tasks(options: dict[str, Any]) -> TaskSettings | None:
    """Remove the options of tasks from `options`, and return them as settings; None without --task."""
    from uptrain.evaluation.settings import TaskSettings

    listed, folder, limit = (options.pop(name) for name in ("tasks", "include_path", "task_limit"))
    names = tuple(name.strip() for part in listed for name in part.split(",") if name.strip())
    return TaskSettings(names=names, include_path=folder, limit=limit) if names else None


def _needles(options: dict[str, Any]) -> NeedleSettings | None:
    """Remove the options of the pass key from `options`, and return them as settings; None without --needle."""
    from uptrain.evaluation.settings import NeedleSettings

    lengths, depths, trials = (options.pop(f"needle_{name}") for name in ("lengths", "depths", "trials"))
    if not options.pop("needle"):
        return None
    return NeedleSettings(lengths=lengths or (), depths=tuple(percent / 100 for percent in depths), trials=trials)


def _baseline(directory: str, named: str | None, none: bool, allow_pickle: bool) -> str | Reference | None:
    """Return the baseline: the one that was named, else the source of `directory` if it is on this machine.

    - `directory`: the model that is evaluated.
    - `named`: the value of --baseline.
    - `none`: whether --no-baseline was given.
    - `allow_pickle`: read .bin weights.

    Raises:
        UsageError: both --baseline and --no-baseline were given.
    """
    if named is not None and none:
        raise UsageError(f"--no-baseline contradicts --baseline {named}.", "Leave one of them out.")
    if named is not None or none:
        return named
    from uptrain.evaluation.baseline import find_baseline
    from uptrain.evaluation.reference import Reference

    source, said = find_baseline(directory, allow_pickle)
    if said:
        console.note(said)
    return None if source is None else Reference(source)


def _check_options(options: dict[str, Any]) -> None:
    """Refuse what is said of a part that isn't measured."""
    check_belongs(("include_path", "task_limit"), "--task", bool(options["tasks"]))
    check_belongs(("needle_lengths", "needle_depths", "needle_trials"), "--needle", options["needle"])
    check_belongs(("sample_tokens",), "--samples", bool(options["samples"]))
    context = click.get_current_context()
    for name in ("speed_context", "speed_batch"):
        if options["no_speed"] and context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"--no-speed leaves nothing for {option} to change.", "Leave one of them out.")


def _show(found: Evaluation, as_json: bool) -> None:
    """Print an evaluation as a table of one or two models."""
    if as_json:
        console.result_json(found.to_dict())
        return
    shown = [] if found.baseline is None else [(found.baseline.name, found.baseline, None)]
    console.table("", *models_table([*shown, (found.model.name, found.model, found)]))
    if len(found.rows) > 1:
        console.table("", *_by_text(found))
    values, model = found.to_dict(), found.model.name
    baseline = None if found.baseline is None else found.baseline.name
    if len(found.speeds) > 1:
        title = "Speed, tokens/s of all sequences together (slowest to fastest)"
        _print_table(title, tables.speeds(values, "this", baseline and "original"))
    if found.tasks:
        _print_table("Tasks", tables.tasks(values, model, baseline))
    if found.needle:
        _print_table("Retrieval of a hidden pass key", tables.needle(values, model, baseline))
    for sample in found.samples:
        _sample(found, sample)
    console.note(how_measured(found))


def models_table(
    models: list[tuple[str, ModelMetrics, Evaluation | None]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and rows of a table with one column per model and one row per metric.

    - `models`: name, metrics and, for a model with a baseline, the evaluation that compares the two.
    """
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
        ("cache per token", *(size(each.cache_bytes_per_token) for each in measured)),
        ("  of it cross-attention", *(_cross(each) for each in measured)),
        ("decode, tokens/s", *(number(each.decode_tokens_per_second, "{:,.0f}") for each in measured)),
        ("prefill, tokens/s", *(number(each.prefill_tokens_per_second, "{:,.0f}") for each in measured)),
    ]
    # Leave out a metric that no model has.
    return ("", *names), [row for row in rows if set(row[1:]) != {"–"}]


def _loss(measured: ModelMetrics) -> str:
    return f"{math.log(measured.perplexity):.4f}" if measured.cross_bytes_per_token else "–"


def _cross(measured: ModelMetrics) -> str:
    return size(measured.cross_bytes_per_token) if measured.cross_bytes_per_token else "–"


def _far(found: Evaluation | None, metric: str, form: str) -> str:
    if found is None:
        return "–"
    return number(getattr(found, metric), form, getattr(found, f"{metric}_interval", None))


def _by_text(found: Evaluation) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns and a row for each text and context."""
    # The last part of a path is enough to recognise it.
    names = [(Path(row.text).name, f"{row.context:,}") for row in found.rows]
    if found.baseline is None:
        ranged = [(number(row.perplexity, "{:.2f}", row.perplexity_interval),) for row in found.rows]
        return ("text", "context", "perplexity"), [(*name, *each) for name, each in zip(names, ranged, strict=True)]
    # Only the interval of the ratio compares the models. Those of the perplexities include the variance of the text.
    metrics = [
        (f"{row.perplexity:.2f}", f"{row.baseline_perplexity:.2f}",
         f"{row.perplexity_ratio:.3f}" if row.perplexity_ratio_interval is None
         else "–".join(f"{end:.3f}" for end in row.perplexity_ratio_interval),
         f"{row.kl:.3g}", f"{row.top1_agreement:.1%}", f"{row.flip_rate:.2%}")
        for row in found.rows
    ]  # fmt: skip
    columns = ("text", "context", "perplexity", "original's", "ratio", "KL", "top-1", "flips")
    return columns, [(*name, *each) for name, each in zip(names, metrics, strict=True)]


def _print_table(title: str, table: MetricTable) -> None:
    console.table(title, table.columns, table.rows)


def _sample(found: Evaluation, sample: Sample) -> None:
    pairs = [("prompt", sample.prompt), (found.model.name, sample.continuation)]
    if found.baseline is not None and sample.baseline_continuation is not None:
        pairs.insert(1, (found.baseline.name, sample.baseline_continuation))
    shared = "" if sample.common_tokens is None else f": the first {sample.common_tokens} tokens are the same"
    # A short text with its line breaks would fill the screen.
    lines = [(name, text.replace("\n", "⏎")) for name, text in pairs]
    console.facts(f"Sample of {Path(sample.text).name}{shared}", lines)


def how_measured(found: Evaluation) -> str:
    """Return one paragraph: the tokens, windows, dtype and device of the measurement."""
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
        speed += f" Peak memory {size(found.peak_memory_bytes)}, all models loaded."
    return (
        f"{found.tokens:,} tokens, context {found.context}, stride {found.stride}, {found.dtype} on {found.device}."
        + against + speed
    )  # fmt: skip
