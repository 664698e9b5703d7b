"""`uptrain sweep`: its options, its call and the table it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uptrain.cli import console
from uptrain.cli.options import (
    calibration_text_options,
    device_option,
    examples,
    json_option,
    quality_dtype_option,
    source_options,
    texts_of,
    window_options,
)
from uptrain.cli.types import Names, Size
from uptrain.formatting import size, typed

if TYPE_CHECKING:
    from uptrain.evaluation.sweep_results import Sweep, Trial


@click.command(
    epilog=examples(
        "uptrain sweep demo --to gqa:4,gqa:2,mqa,mla:128,mla:64 --methods mean,svd,calibrated",
        "uptrain sweep ./llama --to gqa:8,mqa,mla:25% --calibrate text.txt --text heldout.txt --keep best",
        "uptrain report demo-sweep",
    )
)
@click.argument("model")
@click.option(
    "--to", required=True, type=Names(), help="Targets, separated by commas: gqa:4 (key/value heads), mqa, mla:128 "
    "(kv_lora_rank), mla:128+32 (and qk_rope_head_dim), mla:25% (share of the cache).",
)  # fmt: skip
@click.option(
    "--methods", type=Names(), default="mean,svd,calibrated", show_default=True, help="Methods of `uptrain convert`, "
    "separated by commas.",
)  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the sweep. Default: ./NAME-sweep.")
@calibration_text_options("method calibrated")
@click.option(
    "--repair-steps", type=int, help="(method calibrated) Gradient steps per layer that refit it; 0 for none. "
    "Default: 40.",
)  # fmt: skip
@click.option(
    "--text", "texts", multiple=True, help="Text to score, as for `uptrain eval`. Repeatable. Default: "
    "python-stdlib:held-out.",
)  # fmt: skip
@click.option(
    "--context", type=click.IntRange(2), help="Length of the window that is scored, in tokens. Default: 1024, or "
    "MODEL's maximum if that is shorter.",
)  # fmt: skip
@window_options
@device_option
@quality_dtype_option
@click.option(
    "--keep", default="all", show_default=True, help="Checkpoints to keep: all, best (the Pareto front) or none."
)
@click.option(
    "--memory", type=Size(), default="4GiB", show_default=True, help="Memory for calibration's activations, and as "
    "much for the source's predictions. What does not fit is computed again for each trial.",
)  # fmt: skip
@source_options
@click.option("--overwrite", is_flag=True, help="Replace another sweep in OUT.")
@json_option
def sweep(model: str, to: list[str], methods: list[str], texts: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Convert MODEL to several targets by several methods, and compare the results.

    Writes a checkpoint folder for each trial (a target and a method), sweep.json and pareto.png. A trial that is not
    possible is listed with its reason and does not stop the others. MODEL is evaluated once. Calibration reads its text
    once and runs MODEL over it once.

    To resume an interrupted sweep, repeat the same command. The same command with more targets or methods adds them.
    """
    from uptrain import workflows
    from uptrain.checkpoint.events import Events

    call = {name: options.pop(name) for name in ("out", "revision", "allow_pickle", "overwrite")}
    settings = workflows.SweepSettings(methods=methods, text=texts_of(texts), **options)
    events = Events(note=console.note, layer=console.layer_progress())
    folder, found = workflows.sweep(model, to, settings, **call, events=events)
    _show(folder, found, as_json)


def _show(folder: Path, found: Sweep, as_json: bool) -> None:
    """Print the trials of a sweep, the smallest cache first, and the trials that were not possible."""
    if as_json:
        console.result_json({"out": str(folder), **found.to_dict()})
        return
    rows = [
        (
            ("* " if trial.pareto else "  ") + trial.target, trial.method, size(trial.cache_bytes_per_token),
            f"{100 * trial.share:.3g}%", f"{trial.perplexity:.2f}", _divergence(trial), f"{trial.top1_agreement:.1%}",
            f"{(trial.convert_seconds or 0) + trial.evaluate_seconds:,.0f}",
        )
        for trial in found.trials
    ]  # fmt: skip
    cache, perplexity = size(found.original["cache_bytes_per_token"]), f"{found.original['perplexity']:.2f}"
    rows.append((f"  {found.source['name']}", "–", cache, "100%", perplexity, "–", "–", "–"))
    columns = ("  to", "method", "cache", "share", "perplexity", "KL", "top-1", "s")
    console.table("", columns, rows)
    for each in found.refused:
        console.note(f"{each.target} by {each.method}: {each.why}")
    measured = found.measured
    console.note(
        f"*: no other trial has both a smaller cache and a smaller KL. cache: per token. KL: nats per token, ± a 95 % "
        f"interval over {measured['windows']} windows. {measured['tokens']:,} tokens, context "
        f"{measured['context']}, stride {measured['stride']}, {measured['dtype']} on {measured['device']}."
    )
    console.note(f"Wrote {folder}. Next: uptrain report {typed(folder)}")


def _divergence(trial: Trial) -> str:
    # The lower end is cut at zero, so the upper end gives the width.
    return f"{trial.kl:.3g}" + (f" ± {trial.kl_interval[1] - trial.kl:.2g}" if trial.kl_interval else "")
