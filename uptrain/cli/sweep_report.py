"""Lay out what a sweep found; printing itself is the console's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from uptrain.cli import console
from uptrain.formatting import size, typed

if TYPE_CHECKING:
    from uptrain.evaluation.sweep_results import Sweep, Trial


def sweep(folder: Path, found: Sweep, as_json: bool) -> None:
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
