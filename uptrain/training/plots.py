"""Training curves: a run's log as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uptrain.errors import UsageError, check_installed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "training.png"


def check() -> None:
    """Check that curves can be drawn, before hours of training.

    Raises:
        UsageError: matplotlib is not installed.
    """
    check_installed("matplotlib", "Drawing")


def training(folder: Path) -> Path:
    """Draw the log of a run (`train_log.jsonl`) into the same folder; return the path of the picture.

    Raises:
        UsageError: the folder has no log, or matplotlib is not installed.
    """
    log = folder / "train_log.jsonl"
    if not log.is_file():
        raise UsageError(f"{folder} has no train_log.jsonl to draw.", "Name a folder that `uptrain train` wrote.")
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    out = folder / CURVES
    curves(entries).savefig(out, dpi=120)
    return out


def curves(entries: list[dict[str, Any]]) -> Figure:
    """Draw the losses, divergences, learning rate and speed of a log over the tokens seen.

    Raises:
        UsageError: matplotlib is not installed.
    """
    has_teacher = any("kl" in entry for entry in entries)
    figure, (first, *middle, rate, speed) = _figure(3 + has_teacher)
    _line(first, entries, "cross_entropy" if has_teacher else "loss", "training")
    _line(first, entries, "held_out_loss", "held out", marker="o")
    first.set_ylabel("cross-entropy, nats per token")
    # Divergences are much smaller than cross-entropies: on a shared axis they would be flat.
    for panel in middle:
        _line(panel, entries, "loss", "what is trained on")
        _line(panel, entries, "kl", "KL to the teacher")
        _line(panel, entries, "held_out_kl", "KL, held out", marker="o")
        panel.set_ylabel("nats per token")
        panel.set_ylim(bottom=0)
    for panel in (first, *middle):
        for entry in entries:
            if "skipped" in entry:
                panel.axvline(entry["tokens"], color="tab:red", linewidth=0.8, linestyle=":")
        panel.legend(frameon=False)
    _line(rate, entries, "lr", "learning rate")
    rate.set_ylabel("learning rate")
    _line(speed, entries, "tokens_per_s", "tokens/s")
    speed.set_ylabel("tokens/s")
    speed.set_ylim(bottom=0)
    speed.set_xlabel("tokens seen")
    return figure


def _line(axes: Axes, entries: list[dict[str, Any]], name: str, label: str, marker: str = "") -> None:
    points = [(entry["tokens"], entry[name]) for entry in entries if name in entry]
    if points:
        # A single point draws no line, so it gets a marker.
        axes.plot(*zip(*points, strict=True), label=label, marker=marker or ("." if len(points) == 1 else ""))


def _figure(rows: int) -> tuple[Figure, Any]:
    check()
    import matplotlib

    # This works without a display and does not change pyplot's state in a notebook.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams["axes.spines.top"] = matplotlib.rcParams["axes.spines.right"] = False
    figure = Figure(figsize=(8, 1.8 * rows + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True, height_ratios=[*[2.0] * (rows - 2), 1.0, 1.0])
    return figure, axes
