"""`uptrain inspect --plot`: a picture of the similarity of heads and of the singular values of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uptrain.architectures.description import CheckpointDescription, describe_checkpoint
from uptrain.architectures.projections import read_layer
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.checkpoint.source import resolve
from uptrain.conversion.plan.quantized import check_attention
from uptrain.errors import CheckpointError, UsageError
from uptrain.methods import energy_numpy, head_similarity
from uptrain.methods.energy_numpy import Floats
from uptrain.publishing.page.style import SERIES, WIDTH, drawing, png
from uptrain.training import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS = 5
"""Number of layers that are drawn, evenly spaced."""


@dataclass(frozen=True)
class LayerPicture:
    """One layer's picture: `similarity` (heads, heads) and `spectrum` (n,), each for keys and for values."""

    layer: str
    similarity: dict[str, Floats]
    spectrum: dict[str, Any]


def plot_heads(model: str, out: Path, *, revision: str | None = None, allow_pickle: bool = False) -> list[str]:
    """Draw the similarity of a model's heads and the spectra of its stacked keys and values. Returns the layers.

    Energy is not weighted by activations. The weights of a Hub model are downloaded.

    - `model`: folder, Hub id or `demo`.
    - `out`: the PNG file.
    - `revision`: branch, tag or commit of a Hub id.
    - `allow_pickle`: read .bin weights.

    Raises:
        UsageError: the model caches a latent, `out` can't be a PNG file, or matplotlib is not installed.
        CheckpointError: the model can't be found or read, its attention is quantized, or it holds NaN.
    """
    if out.suffix.lower() != ".png" or not out.resolve().parent.is_dir():
        raise UsageError(f"{out} can't be written.", "Name a .png in a folder that exists.")
    plots.check()
    source = resolve(model, revision, allow_pickle)
    checkpoint = open_checkpoint(source.path, allow_pickle)
    described = describe_checkpoint(checkpoint, model)
    specs = described.attention
    if specs[0].kind == "mla":
        raise UsageError(
            f"{model} caches a latent and has no heads to compare.", "Draw the model that it was made from."
        )
    check_attention(described)
    chosen = sorted({round(number) for number in np.linspace(0, len(specs) - 1, min(LAYERS, len(specs)))})
    found = [look(described, layer) for layer in chosen]
    with drawing():
        out.write_bytes(png(_draw(found, model)))
    return [picture.layer for picture in found]


def look(model: CheckpointDescription, layer: int) -> LayerPicture:
    """Return what one layer's picture shows.

    Raises:
        CheckpointError: its values are not finite.
    """
    family, spec = model.family, model.attention[layer]
    heads = read_layer(model.checkpoint, family.projections, spec, model.attention_name(layer), frozenset("kv"))
    keys, values = (energy_numpy.rows_of(heads.part(part)) for part in "kv")
    if not (np.isfinite(keys).all() and np.isfinite(values).all()):
        raise CheckpointError(f"Layer {layer} has values that are not finite.", "Download the checkpoint again.")
    return LayerPicture(
        family.place(layer),
        {
            "keys": energy_numpy.pair_similarity(keys, head_similarity.one_key(family.position, spec)),
            "values": energy_numpy.pair_similarity(values, head_similarity.one_value),
        },
        {"keys": energy_numpy.spectrum(keys), "values": energy_numpy.spectrum(values)},
    )


def _draw(found: list[LayerPicture], name: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 * WIDTH, 1.35 * WIDTH), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{name}: how far its key/value heads can be compressed", fontsize=11)
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    maps, spectra = parts
    maps.suptitle("Share of two heads' energy that one shared head explains (a half: nothing in common)", fontsize=9.5)
    panes = maps.subplots(2, len(found), squeeze=False)
    for column, picture in enumerate(found):
        for row, side in enumerate(("keys", "values")):
            axes = panes[row, column]
            image = axes.imshow(picture.similarity[side], vmin=0.5, vmax=1, cmap="cividis")
            axes.grid(visible=False)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(f"{side}, layer {picture.layer}")
    maps.colorbar(image, ax=panes, shrink=0.8)
    panels = spectra.subplots(1, 2, sharey=True)
    for axes, side in zip(panels, ("keys", "values"), strict=True):
        for number, picture in enumerate(found):
            energy = np.square(picture.spectrum[side])
            lost = 1 - np.cumsum(energy) / (energy.sum() or 1)
            ranks = np.arange(1, len(lost) + 1)
            colour = SERIES[number % len(SERIES)]
            axes.plot(ranks, 100 * lost.clip(min=1e-9), color=colour, label=f"layer {picture.layer}")
        axes.set_yscale("log")
        axes.set_yticks((100, 10, 1, 0.1, 0.01), ("100", "10", "1", "0.1", "0.01"))
        axes.set_ylim(0.01, 130)
        axes.minorticks_off()
        axes.set_xlabel(f"shared values per token for all {side}, of {len(lost)}")
    panels[0].set_ylabel("energy lost, %")
    panels[1].legend(fontsize=8.5)
    return figure
