"""The charts of a report. Call them inside `style.drawing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from uptrain.formatting import size, tokens
from uptrain.publishing.page.memory import CONTEXTS, AttentionCache
from uptrain.publishing.page.models import PageModel
from uptrain.publishing.page.style import INK, MUTED, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))


def quality(measured: Sequence[PageModel]) -> Figure:
    """Draw perplexity against cache bytes per token: the original, and each result with its interval."""
    figure, axes = new_figure(3.4)
    first = measured[0]
    points = [
        ("the original", first.metric("cache_bytes_per_token", "baseline"), first.metric("perplexity", "baseline"))
    ]
    points += [(s.name, s.metric("cache_bytes_per_token", "model"), s.metric("perplexity", "model")) for s in measured]
    places = []
    for number, (name, cache, perplexity) in enumerate(points):
        if cache is None or perplexity is None:
            continue
        colour = INK if number == 0 else SERIES[(number - 1) % len(SERIES)]
        interval = measured[number - 1].interval("perplexity_ratio_interval") if number else None
        base = first.metric("perplexity", "baseline")
        if interval and base:
            ends = ([perplexity - interval[0] * base], [interval[1] * base - perplexity])
            axes.errorbar(cache, perplexity, yerr=ends, color=colour, capsize=3, linewidth=1.2)
        axes.plot(cache, perplexity, "o", color=colour, markersize=8)
        places.append((cache, perplexity, name))
    axes.set_xscale("log", base=2)
    caches = sorted({cache for cache, _, _ in places})
    axes.set_xticks(caches, [size(cache) for cache in caches])
    axes.minorticks_off()
    # Space for the names right of the points.
    axes.set_xlim(caches[0] / 1.25, caches[-1] * (caches[-1] / caches[0]) ** 0.45 * 1.3)
    axes.margins(y=0.12)
    _name_points(axes, places)
    axes.set_xlabel("cache per token")
    axes.set_ylabel("perplexity")
    return figure


def energy(explained: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Draw the explained energy of keys and of values per layer and method; `explained` is by layer."""
    figure, axes = new_figure(3.0)
    layers = sorted(explained, key=int)
    methods = [method for method in explained[layers[0]] if _drawn(explained, method)]
    for style, method in zip(_DASHES, methods, strict=False):
        for side, colour in (("keys", SERIES[0]), ("values", SERIES[1])):
            heights = [100 * explained[layer][method][side] for layer in layers]
            axes.plot([int(layer) for layer in layers], heights, linestyle=style, color=colour, marker="o",
                      markersize=3.5, label=f"{method}: {side}")  # fmt: skip
    axes.set_xlabel("layer")
    axes.set_ylabel("explained energy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(0, 102)
    figure.legend(loc="outside upper center", ncols=len(methods), fontsize=8.5)
    return figure


def _drawn(explained: Mapping[str, Mapping[str, Mapping[str, float]]], method: str) -> bool:
    """Return whether a method explains any energy. A method far below zero would set the scale of the axis."""
    return any(share > 0 for methods in explained.values() for share in methods[method].values())


def speed(measured: Sequence[PageModel]) -> Figure:
    """Draw the decode speed of each result and of its baseline in the same run, with slowest and fastest."""
    figure, axes = new_figure(0.9 + 0.62 * len(measured))
    for row, model in enumerate(measured):
        for offset, of, colour in ((-0.18, "baseline", MUTED), (0.18, "model", SERIES[0])):
            value, ends = model.metric("decode_tokens_per_second", of), model.interval("decode_range", of)
            if value is None:
                continue
            axes.barh(row + offset, value, height=0.32, color=colour)
            if ends:
                away = ([value - ends[0]], [ends[1] - value])
                axes.errorbar(value, row + offset, xerr=away, color=INK, capsize=2.5, linewidth=1)
            name = "the original" if of == "baseline" else model.name
            axes.annotate(f"{name}: {value:,.0f}", (0, row + offset), (5, 0), textcoords="offset points", va="center",
                          color="white", fontsize=8.5)  # fmt: skip
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("decoded tokens per second")
    return figure


def memory(found: Sequence[AttentionCache]) -> Figure:
    """Draw the cache of one request against its context, one line per attention."""
    figure, axes = new_figure(3.8)
    for number, attention in enumerate(found):
        heights = [attention.sizes[context] for context in CONTEXTS]
        axes.plot(CONTEXTS, heights, color=SERIES[number % len(SERIES)], marker="o", markersize=3.5,
                  linewidth=2.6 if attention.owner else 1.4)  # fmt: skip
    _name_ends(axes, [(attention.name, attention.sizes[CONTEXTS[-1]]) for attention in found])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(CONTEXTS, [tokens(context) for context in CONTEXTS])
    low, high = (
        min(attention.sizes[CONTEXTS[0]] for attention in found),
        max(attention.sizes[CONTEXTS[-1]] for attention in found),
    )
    powers = range(low.bit_length() - 1, high.bit_length() + 2, 2)
    axes.set_yticks([2**power for power in powers], [size(2**power) for power in powers])
    axes.minorticks_off()
    axes.set_xlim(CONTEXTS[0] / 1.2, CONTEXTS[-1] * 5)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("cache of one request")
    return figure


def _name_points(axes: Any, places: Sequence[tuple[float, float, str]]) -> None:
    """Write each point's name right of it, higher if it would cover another name."""
    low, high = axes.get_ylim()
    # The height of a line of text, in units of the axis.
    line = (high - low) / 15
    taken: dict[float, float] = {}
    for cache, height, name in sorted(places):
        at = max(height, taken.get(cache, low) + line) if cache in taken else height
        taken[cache] = at
        axes.annotate(name, (cache, at), (9, 0), textcoords="offset points", va="center", color=INK)


def _name_ends(axes: Any, ends: Sequence[tuple[str, int]]) -> None:
    """Write each line's name at its end. Lines that end at one point share a label."""
    places: dict[int, list[str]] = {}
    for name, height in ends:
        places.setdefault(height, []).append(name)
    for height, names in places.items():
        axes.annotate(", ".join(names), (CONTEXTS[-1], height), (7, 0), textcoords="offset points", va="center",
                      color=INK, fontsize=8.5)  # fmt: skip
