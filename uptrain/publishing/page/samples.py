"""What the models write, side by side on the page."""

from __future__ import annotations

from collections.abc import Iterator

from uptrain.publishing.page.models import PageModel
from uptrain.publishing.page.section import ORIGINAL, Quote, Section


def samples(models: list[PageModel]) -> Iterator[Section]:
    """Yield a section where there are samples: it is optional, so nothing is missing without."""
    quotes: dict[str, list[tuple[str, str]]] = {}
    for model in models:
        for sample in model.rows("samples"):
            written = quotes.setdefault(str(sample.get("prompt", "")), [])
            original = (ORIGINAL, sample.get("baseline_continuation"))
            own = (model.name, sample.get("continuation"))
            written += [(name, text) for name, text in (original, own) if isinstance(text, str)
                        and (name, text) not in written]  # fmt: skip
    if quotes:
        text = "What each model writes after the same words, always taking the likeliest token."
        yield Section("Samples", text, quotes=[Quote(prompt, written) for prompt, written in quotes.items()])
