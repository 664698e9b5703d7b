"""The page of a sweep: a table of all trials, and KL against cache bytes with the Pareto front."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from uptrain.evaluation.sweep_results import Sweep
from uptrain.formatting import number, size
from uptrain.methods.registry import METHODS
from uptrain.publishing.page.models import PageModel
from uptrain.publishing.page.section import Chart, Section
from uptrain.publishing.page.sections import memory
from uptrain.publishing.page.style import INK, MUTED, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sweep_summary(found: Sweep) -> Section:
    """Return the table at the top: a row for each trial, the smallest cache first, then the source's."""
    columns = (
        "● Pareto front", "method", "cache per token", "share", "perplexity", "times the original's", "KL, nats",
        "top-1", "flips",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [
        (
            ("● " if trial.pareto else "") + trial.target, trial.method, size(trial.cache_bytes_per_token),
            f"{100 * trial.share:.3g} %", f"{trial.perplexity:.2f}",
            number(trial.perplexity_ratio, "{:.3f}", trial.perplexity_ratio_interval),
            number(trial.kl, "{:#.3g}", trial.kl_interval), f"{trial.top1_agreement:.1%}", f"{trial.flip_rate:.2%}",
        )
        for trial in found.trials
    ]  # fmt: skip
    if found.original:
        cache, perplexity = size(found.original["cache_bytes_per_token"]), f"{found.original['perplexity']:.2f}"
        name = str(found.source["name"])
        # The page may be shown to others, so it names no path of this machine.
        name = Path(name).name if found.source["origin"] == "folder" else name
        rows.append((name, "the original", cache, "100 %", perplexity, *"––––"))
    return Section("Summary", "", columns=columns, rows=rows)


def sweep_sections(found: Sweep, models: list[PageModel]) -> list[Section]:
    """Return the sections below the table. Call it inside `style.drawing`.

    `models` are the trials whose checkpoints exist.
    """
    missing = [f"{each.target} by {each.method}: {each.why}" for each in found.refused]
    if not found.trials:
        return [Section("Quality against cache", "", missing=[*missing, "Nothing was measured yet: sweep again."])]
    measured = found.measured
    text = (
        "KL from the original's predictions, in nats per token, against the cache; lower and further left is "
        f"better. {measured['tokens']:,} tokens in {measured['windows']:,} windows, context {measured['context']:,}, "
        f"stride {measured['stride']:,}, {measured['dtype']} on {measured['device']}; nothing was trained. Bars: 95 % "
        "intervals over windows. The line joins the Pareto front: no trial beats these in both cache and KL."
    )
    says = "KL from the original against cache bytes per token, one mark per target and method."
    quality = Section("Quality against cache", text, [Chart("pareto", pareto_chart(found), says)], missing=missing)
    return [quality, *([memory(models)] if models else [])]


def pareto_chart(found: Sweep) -> Figure:
    """Draw each trial's KL against its cache bytes per token, both logarithmic, and the Pareto front.

    A colour is a method. Shared heads are circles with the name on the right, latents diamonds with it on the left.
    """
    figure, axes = new_figure(4.2)
    # A trial that is its source has no divergence, and a logarithm has no zero.
    floor = min((trial.kl for trial in found.trials if trial.kl > 0), default=1.0) / 3
    methods = list(dict.fromkeys(sorted((trial.method for trial in found.trials), key=list(METHODS).index)))
    for trial in found.trials:
        cache, height = trial.cache_bytes_per_token, max(trial.kl, floor)
        colour = SERIES[methods.index(trial.method) % len(SERIES)]
        low, high = trial.kl_interval or (height, height)
        ends = ([height - max(min(low, height), floor)], [max(high, height) - height])
        axes.errorbar(cache, height, yerr=ends, color=colour, capsize=3, linewidth=1.2)
        latent = trial.target.startswith("mla")
        axes.plot(cache, height, "D" if latent else "o", color=colour, markersize=6 if latent else 7)
        axes.annotate(trial.target, (cache, height), (-8 if latent else 8, 0), textcoords="offset points", va="center",
                      ha="right" if latent else "left", color=INK if trial.pareto else MUTED, fontsize=8)  # fmt: skip
    best = [(trial.cache_bytes_per_token, max(trial.kl, floor)) for trial in found.trials if trial.pareto]
    axes.plot(*zip(*best, strict=True), color=MUTED, linewidth=1, linestyle="--", zorder=1, label="Pareto front")
    for place, method in enumerate(methods):
        axes.plot([], [], "s", color=SERIES[place % len(SERIES)], label=method)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    whole = found.original["cache_bytes_per_token"]
    caches = sorted({trial.cache_bytes_per_token for trial in found.trials} | {whole})
    axes.set_xticks(caches, [size(cache) for cache in caches])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    # Space for the names of the outermost points.
    axes.set_xlim(caches[0] / 1.4, caches[-1] * 1.15)
    axes.axvline(whole, color=INK, linewidth=1, linestyle=":")
    axes.annotate("the original's cache", (whole, 1), (-4, -6), xycoords=("data", "axes fraction"),
                  textcoords="offset points", rotation=90, ha="right", va="top", color=MUTED, fontsize=8)  # fmt: skip
    axes.set_xlabel("cache per token")
    axes.set_ylabel("KL from the original, nats per token")
    figure.legend(loc="outside upper center", ncols=6, fontsize=8.5)
    return figure
