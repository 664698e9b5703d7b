"""Write the HTML page of a report and its charts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from uptrain.checkpoint.files import write_atomic
from uptrain.errors import UsageError, needing
from uptrain.evaluation.sweep_results import read_sweep
from uptrain.publishing.page.models import find_models, models_in
from uptrain.publishing.page.section import Section
from uptrain.publishing.page.sections import sections, summary
from uptrain.publishing.page.style import drawing, png, svg
from uptrain.publishing.page.sweep import sweep_sections, sweep_summary
from uptrain.training import plots

__all__ = ["Page", "write_page"]

PAGE = "report.html"


@dataclass(frozen=True)
class Page:
    """A written page.

    - `path`: its file.
    - `pictures`: the files of its charts.
    - `missing`: a sentence for each part without data.
    """

    path: Path
    pictures: tuple[Path, ...]
    missing: tuple[str, ...]


def write_page(directory: Path, out: Path | None = None) -> Page:
    """Write the page of a checkpoint, of several checkpoints or of a sweep, and its charts to the same folder.

    - `directory`: a checkpoint that uptrain wrote, a folder of several, or the folder of a sweep.
    - `out`: the file of the page. Default: report.html in `directory`.

    Raises:
        UsageError: no checkpoint that uptrain wrote, a page that can't be written there, or no matplotlib or jinja2.
        CheckpointError: a broken manifest, config, eval.json or sweep.json.
    """
    swept = read_sweep(directory)
    if swept is None:
        models = find_models(directory)
    else:
        models = models_in([directory / trial.name for trial in swept.trials])
    path = out or directory / PAGE
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{path} can't be written.", "Name a file in a folder that exists.")
    plots.check()
    pictures = []
    with drawing():
        found = sections(models) if swept is None else sweep_sections(swept, models)
        shown = []
        for section in found:
            charts = []
            for chart in section.charts:
                picture = path.with_name(f"{path.stem}-{chart.name}.png")
                picture.write_bytes(png(chart.figure))
                pictures.append(picture)
                charts.append({"svg": svg(chart.figure, chart.name), "says": chart.says, "caption": chart.caption})
            shown.append({"section": section, "charts": charts})
    if swept is None:
        title, head = _title(directory, len(models), "checkpoints"), summary(models)
    else:
        title, head = _title(directory, len(swept.trials), "conversions"), sweep_summary(swept)
    write_atomic(path, _render(title=title, summary=head, shown=shown))
    return Page(path, tuple(pictures), tuple(_missing(found)))


def _title(directory: Path, count: int, of: str) -> str:
    name = directory.resolve().name
    return name if count == 1 else f"{name}: {count} {of}"


def _missing(found: list[Section]) -> list[str]:
    return [f"{section.title}: {sentence}" for section in found for sentence in section.missing]


def _render(**values: object) -> str:
    with needing("The page"):
        from jinja2 import Environment, PackageLoader
    environment = Environment(
        loader=PackageLoader("uptrain.publishing.page", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.jinja").render(**values)
