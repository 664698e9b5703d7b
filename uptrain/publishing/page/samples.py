"""The page's section on samples: the texts of each model next to each other."""

from __future__ import annotations

from collections.abc import Iterator

from uptrain.publishing.page.models import PageModel
from uptrain.publishing.page.section import ORIGINAL, Quote, Section


def samples(models: list[PageModel]) -> Iterator[Section]:
    """Yield the section if there are samples. They are optional, so without them nothing is missing."""
    quotes: dict[str, list[tuple[str, str]]] = {}
    for model in models:
        for sample in model.rows("samples"):
            written = quotes.setdefault(str(sample.get("prompt", "")), [])
            original = (ORIGINAL, sample.get("baseline_continuation"))
            own = (model.name, sample.get("continuation"))
            written += [(name, text) for name, text in (original, own) if isinstance(text, str)
                        and (name, text) not in written]  # fmt: skip
    if quotes:
        text = "What each model writes after the same prompt, always with the likeliest token."
        yield Section("Samples", text, quotes=[Quote(prompt, written) for prompt, written in quotes.items()])
