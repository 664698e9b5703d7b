"""The page's sections per layer: explained energy, and the similarity of the heads that share one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from uptrain.publishing.page import charts
from uptrain.publishing.page.models import PageModel
from uptrain.publishing.page.section import Chart, Section, slug
from uptrain.publishing.page.style import MUTED, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = {"stored": ("as stored", (0, (4, 2))), "aligned": ("aligned", "-")}
"""The name and the line style of each similarity of uptrain.json."""


def energy(models: list[PageModel]) -> Section:
    """Return the section on explained energy. Call it inside `style.drawing`."""
    drawn, missing = [], []
    rows: list[tuple[str, ...]] = []
    for model in models:
        explained = _recorded(model, "energy_kept")
        if len(explained) > 1:
            says = f"Explained energy of keys and values per layer of {model.name}, by method."
            drawn.append(
                Chart(f"energy-{slug(model.name)}", charts.energy(explained), says, _caption([model.name], models))
            )
        elif not explained:
            missing.append(
                f"{model.name} has no explained energy: its history has no conversion that pooled or factored."
            )
        else:
            (layer, methods), *_ = explained.items()
            missing.append(
                f"{model.name} was measured in layer {layer} only. uptrain convert --diagnose measures every layer."
            )
        for layer, methods in explained.items():
            for method, sides in methods.items():
                rows.append((model.name, layer, method, f"{sides['keys']:.1%}", f"{sides['values']:.1%}"))
    text = (
        "The share of the squared norm of each layer's stacked keys and values that the smaller cache expresses, "
        "before training. Uptraining has to recover the rest. Below zero, the error is larger than the keys or "
        "values themselves; such a method is in the table only."
    )
    return Section(
        "Explained energy by layer", text, drawn, ("checkpoint", "layer", "method", "keys", "values"), rows, missing
    )


def similarity(models: list[PageModel]) -> Iterator[Section]:
    """Yield the section on head similarity where a conversion recorded it, to be called inside `style.drawing`."""
    missing = []
    rows: list[tuple[str, ...]] = []
    # All methods let the same heads of one source share, so equal measurements become one chart.
    distinct: list[tuple[dict[str, Any], list[str]]] = []
    for model in models:
        layers = _recorded(model, "head_similarity")
        same = next((names for found, names in distinct if found == layers), None)
        if same is not None:
            same.append(model.name)
        elif len(layers) > 1:
            distinct.append((layers, [model.name]))
        elif not layers:
            missing.append(f"{model.name} has no head similarity: uptrain convert --diagnose measures it.")
        for layer, kinds in layers.items():
            cells = [f"{kinds[kind][side]:.1%}" if kind in kinds else "–" for side in ("keys", "values")
                     for kind in _LINES]  # fmt: skip
            rows.append((model.name, layer, *cells))
    if not rows:
        return
    text = (
        "The similarity of the source's heads that now share one: the share of two heads' energy that a single head "
        "explains, on average over the pairs of a group. As stored, that head is their average. Aligned, it is the "
        "best head after changes that queries and output absorb, so that attention can't see them. 50 %: nothing in "
        "common; 100 %: the same head. The difference of the two lines is what svd saves and mean loses."
    )
    drawn = []
    for layers, names in distinct:
        says = f"Similarity of the heads of a group in each layer of {', '.join(names)}, as stored and aligned."
        name = f"similarity-{slug(names[0])}"
        drawn.append(Chart(name, similarity_chart(layers), says, _caption(names, models)))
    columns = ("checkpoint", "layer", "keys as stored", "keys aligned", "values as stored", "values aligned")
    yield Section("Head similarity by layer", text, drawn, columns, rows, missing)


def similarity_chart(layers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Draw the similarity of keys and of values by layer, as stored and aligned."""
    figure, axes = new_figure(3.0)
    lowest = 0.5
    for side, colour in (("keys", SERIES[0]), ("values", SERIES[1])):
        for kind, (name, dash) in _LINES.items():
            found = {int(layer): kinds[kind][side] for layer, kinds in layers.items() if kind in kinds}
            lowest = min([lowest, *found.values()])
            places = sorted(found)
            if places:
                axes.plot(places, [100 * found[place] for place in places], linestyle=dash, color=colour, marker="o",
                          markersize=3.5, label=f"{side}, {name}")  # fmt: skip
    axes.axhline(50, color=MUTED, linewidth=1, linestyle=":")
    axes.set_xlabel("layer")
    axes.set_ylabel("energy of two heads that one explains, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(100 * lowest - 5, 102)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8.5, handlelength=3.5)
    return figure


def _caption(names: Sequence[str], models: Sequence[PageModel]) -> str:
    return ", ".join(names) if len(models) > 1 else ""


def _recorded(model: PageModel, name: str) -> dict[str, Any]:
    """Return what the latest conversion that has `name` recorded per layer."""
    found = [stage[name] for stage in model.conversions if stage.get(name)]
    return found[-1] if found else {}
