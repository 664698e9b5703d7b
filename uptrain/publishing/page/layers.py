"""Conversions by layer on the page: the energy each keeps, and how alike the heads are that came to share."""

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
"""How each similarity of uptrain.json is called and drawn."""


def energy(models: list[PageModel]) -> Section:
    """Return the section on energy kept, to be called inside `style.drawing`."""
    drawn, missing = [], []
    rows: list[tuple[str, ...]] = []
    for model in models:
        kept = _noted(model, "energy_kept")
        if len(kept) > 1:
            says = f"Share of key and value energy that each layer of {model.name} kept, by method."
            drawn.append(Chart(f"energy-{slug(model.name)}", charts.energy(kept), says, _caption([model.name], models)))
        elif not kept:
            missing.append(f"{model.name} has no record of it: no conversion in its history factored or pooled heads.")
        else:
            (layer, methods), *_ = kept.items()
            missing.append(
                f"{model.name} was estimated in layer {layer} alone; uptrain convert --diagnose measures all layers."
            )
        for layer, methods in kept.items():
            for method, sides in methods.items():
                rows.append((model.name, layer, method, f"{sides['keys']:.1%}", f"{sides['values']:.1%}"))
    text = (
        "The share of the squared norm of each layer's stacked keys and values that the smaller form still expresses, "
        "before any training. What is lost here is what uptraining has to win back; a method below zero adds more "
        "error than it keeps, and is in the table only."
    )
    return Section(
        "Energy kept by layer", text, drawn, ("checkpoint", "layer", "method", "keys", "values"), rows, missing
    )


def similarity(models: list[PageModel]) -> Iterator[Section]:
    """Yield the section on head similarity where a conversion recorded it, to be called inside `style.drawing`."""
    missing = []
    rows: list[tuple[str, ...]] = []
    # Of one source, the same heads come to share by whatever method.
    alike: list[tuple[dict[str, Any], list[str]]] = []
    for model in models:
        layers = _noted(model, "head_similarity")
        same = next((names for found, names in alike if found == layers), None)
        if same is not None:
            same.append(model.name)
        elif len(layers) > 1:
            alike.append((layers, [model.name]))
        elif not layers:
            missing.append(f"{model.name} has no record of it: uptrain convert --diagnose measures it.")
        for layer, kinds in layers.items():
            cells = [f"{kinds[kind][side]:.1%}" if kind in kinds else "–" for side in ("keys", "values")
                     for kind in _LINES]  # fmt: skip
            rows.append((model.name, layer, *cells))
    if not rows:
        return
    text = (
        "How alike the source's heads are that came to share one: the share of two heads' energy that a single head in "
        "their place keeps, on average over the pairs of a group. As stored, that head is their average; aligned, it "
        "is the best one after changes that queries and output absorb, so that attention can't see them. A half: "
        "nothing in common; 100 %: the same head. What lies between the two lines is what svd saves and mean loses."
    )
    drawn = []
    for layers, names in alike:
        says = f"How alike the heads of a group are in each layer of {', '.join(names)}, as stored and aligned."
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
    axes.set_ylabel("energy one head keeps of two, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(100 * lowest - 5, 102)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8.5, handlelength=3.5)
    return figure


def _caption(names: Sequence[str], models: Sequence[PageModel]) -> str:
    return ", ".join(names) if len(models) > 1 else ""


def _noted(model: PageModel, name: str) -> dict[str, Any]:
    """Return what the latest conversion that has it noted by layer."""
    found = [stage[name] for stage in model.conversions if stage.get(name)]
    return found[-1] if found else {}
