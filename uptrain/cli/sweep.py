"""`uptrain sweep`: its options, its call and the table it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uptrain.cli import console
from uptrain.cli.options import device_option, json_option, texts_of
from uptrain.cli.types import Size, Words
from uptrain.formatting import size, typed

if TYPE_CHECKING:
    from uptrain.evaluation.sweep_results import Sweep, Trial


@click.command()
@click.argument("model")
@click.option(
    "--to", required=True, type=Words(), help="Targets, with commas: gqa:4 (key/value heads to keep), mqa, mla:128 "
    "(kv_lora_rank), mla:128+32 (and qk_rope_head_dim), mla:25% (share of the cache).",
)  # fmt: skip
@click.option("--methods", type=Words(), default="mean,svd,calibrated", show_default=True, help="As of convert.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for all of it. Default: ./NAME-sweep.")
@click.option("--calibrate", metavar="TEXT", help="Text for the method calibrated. Default: builtin.")
@click.option("--calibration-tokens", type=int, help="Of calibrated: how much of it to use. Default: 65536.")
@click.option("--repair-steps", type=int, help="Of calibrated: gradient steps a layer; 0 for none. Default: 40.")
@click.option(
    "--text", "texts", multiple=True, help="Score this text, as of eval; repeatable. Default: python-stdlib:held-out."
)
@click.option(
    "--context", type=click.IntRange(2), help="Window, in tokens. Default: 1024, or all the positions that MODEL has."
)
@click.option("--stride", type=click.IntRange(1), help="How far the window moves. Default: half of --context.")
@click.option("--tokens", type=click.IntRange(2), default=32_768, show_default=True, help="Score so much of each text.")
@device_option
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Compute quality in this dtype.")
@click.option(
    "--keep", default="all", show_default=True, help="Checkpoints that stay: all, best (the Pareto front) or none."
)
@click.option(
    "--memory", type=Size(), default="4GiB", show_default=True, help="For calibrating, and as much again for what the "
    "source predicts; what doesn't fit is computed anew for each target and method.",
)  # fmt: skip
@click.option("--revision", help="Branch, tag or commit, for a Hub id.")
@click.option("--allow-pickle", is_flag=True, help="Also read .bin weights (restricted unpickling).")
@click.option("--overwrite", is_flag=True, help="Start anew where OUT holds another sweep.")
@json_option
def sweep(model: str, to: list[str], methods: list[str], texts: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Convert MODEL to several targets by several methods, measure all alike, and show which are worth having.

    Writes a checkpoint folder for each, sweep.json and pareto.png. What can't be made is named with its reason and
    stops nothing. A sweep that was cut off goes on when the same command is repeated, and more targets or methods
    are added to it. MODEL is measured once. Calibrations read their text once and run MODEL over it once; making each
    form from that is most of the time, and is each one's own.

    \b
    uptrain sweep demo --to gqa:4,gqa:2,mqa,mla:128,mla:64 --methods mean,svd,calibrated
    uptrain sweep ./llama --to gqa:8,mqa,mla:25% --calibrate text.txt --text heldout.txt --keep best
    uptrain report demo-sweep
    """
    from uptrain import workflows
    from uptrain.checkpoint.events import Events

    call = {name: options.pop(name) for name in ("out", "revision", "allow_pickle", "overwrite")}
    settings = workflows.SweepSettings(methods=methods, text=texts_of(texts), **options)
    events = Events(note=console.note, layer=console.layer_progress())
    folder, found = workflows.sweep(model, to, settings, **call, events=events)
    _show(folder, found, as_json)


def _show(folder: Path, found: Sweep, as_json: bool) -> None:
    """Show a sweep's trials, the smallest cache first, and what could not be made."""
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
    columns = ("  to", "method", "cache", "kept", "perplexity", "KL", "top-1", "s")
    console.table("", columns, rows)
    for each in found.refused:
        console.note(f"{each.target} by {each.method}: {each.why}")
    measured = found.measured
    console.note(
        f"* nothing else has as little cache and as little KL. cache: per token. KL: nats per token, ± a 95 % interval "
        f"over {measured['windows']} windows. {measured['tokens']:,} tokens, context "
        f"{measured['context']}, stride {measured['stride']}, {measured['dtype']} on {measured['device']}."
    )
    console.note(f"Wrote {folder}. Next: uptrain report {typed(folder)}")


def _divergence(trial: Trial) -> str:
    # The lower end is cut at zero, so the upper one tells the width.
    return f"{trial.kl:.3g}" + (f" ± {trial.kl_interval[1] - trial.kl:.2g}" if trial.kl_interval else "")
