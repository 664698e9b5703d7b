"""What stands in a report: its sections, each with pictures, a table and a sentence for what has no data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from uptrain import plots
from uptrain.page import charts
from uptrain.page.memory import CONTEXTS, forms
from uptrain.page.style import WIDTH
from uptrain.page.subjects import Subject
from uptrain.words import number, size, tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Chart:
    """A picture, the name its file and its ids have, and what it shows, for those who can't see it."""

    name: str
    figure: Figure
    says: str


@dataclass(frozen=True)
class Quote:
    """A prompt, and by name what each model wrote after it."""

    prompt: str
    written: list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A part of the page; `missing` says what it can't show, and how to get it."""

    title: str
    text: str
    charts: list[Chart] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    quotes: list[Quote] = field(default_factory=list)


def summary(subjects: list[Subject]) -> Section:
    """Return the table at the top: a row for the original and each subject, with what was measured."""
    columns = ("", "cache per token", "kept", "perplexity", "times the original's", "KL, nats", "top-1", "flips")
    rows: list[tuple[str, ...]] = []
    seen = set()
    for subject in subjects:
        whole = subject.figure("cache_bytes_per_token", "baseline")
        if whole is not None and subject.conditions not in seen:
            seen.add(subject.conditions)
            perplexity = number(subject.figure("perplexity", "baseline"), "{:.2f}")
            rows.append(("the original", size(whole), "100 %", perplexity, "–", "–", "–", "–"))
        before, after = _cache(subject)
        rows.append(
            (
                subject.name, size(after), f"{100 * after / before:.3g} %" if before else "–",
                number(subject.figure("perplexity", "model"), "{:.2f}"),
                number(subject.figure("perplexity_ratio"), "{:.3f}", subject.pair("perplexity_ratio_interval")),
                number(subject.figure("kl"), "{:#.3g}", subject.pair("kl_interval")),
                number(subject.figure("top1_agreement"), "{:.1%}"), number(subject.figure("flip_rate"), "{:.2%}"),
            )
        )  # fmt: skip
    return Section("Summary", "", columns=columns, rows=rows)


def sections(subjects: list[Subject]) -> list[Section]:
    """Return the page's sections, to be called inside `style.drawing`."""
    return [
        _quality(subjects), *_samples(subjects), _energy(subjects), _curves(subjects), _speed(subjects),
        memory(subjects),
    ]  # fmt: skip


def _quality(subjects: list[Subject]) -> Section:
    compared = [subject for subject in subjects if subject.figure("perplexity", "baseline") is not None]
    missing = [
        f"{subject.name} has not been measured against its original: uptrain eval {subject.folder} --baseline MODEL"
        for subject in subjects if subject not in compared
    ]  # fmt: skip
    alike = [subject for subject in compared if subject.conditions == compared[0].conditions]
    missing += [
        f"{subject.name} was measured on other text or otherwise than {alike[0].name}, so it is not drawn beside it."
        for subject in compared if subject not in alike
    ]  # fmt: skip
    if not alike:
        return Section("Quality against cache", "", missing=missing)
    first = alike[0]
    how = ", ".join(_conditions(first.evaluation or {}))
    text = f"Lower and further left is better. {how}. Bars: 95 % intervals of the perplexity ratio over windows."
    columns = ("checkpoint", "text", "context", "perplexity", "original's", "KL, nats", "top-1", "top-5", "flips")
    rows = [row for subject in alike for row in _by_text(subject)]
    says = "Perplexity against cache bytes per token, of the original and of each result; the table has the figures."
    chart = Chart("quality", charts.quality(alike), says)
    return Section("Quality against cache", text, [chart], columns, rows, missing)


def _by_text(subject: Subject) -> Iterator[tuple[str, ...]]:
    rows = (subject.evaluation or {}).get("rows")
    for row in rows if isinstance(rows, list) else []:
        ends = row.get("kl_interval")
        yield (
            subject.name, str(row.get("text", "")).rpartition("/")[2], number(row.get("context"), "{:,}"),
            number(row.get("perplexity"), "{:.2f}"), number(row.get("baseline_perplexity"), "{:.2f}"),
            number(row.get("kl"), "{:#.3g}", tuple(ends) if ends else None),
            number(row.get("top1_agreement"), "{:.1%}"), number(row.get("top5_agreement"), "{:.1%}"),
            number(row.get("flip_rate"), "{:.2%}"),
        )  # fmt: skip


def _samples(subjects: list[Subject]) -> Iterator[Section]:
    """Yield a section where there are samples: it is optional, so nothing is missing without."""
    quotes: dict[str, list[tuple[str, str]]] = {}
    for subject in subjects:
        found = (subject.evaluation or {}).get("samples")
        for sample in found if isinstance(found, list) else []:
            written = quotes.setdefault(str(sample.get("prompt", "")), [])
            original = ("the original", sample.get("baseline_continuation"))
            own = (subject.name, sample.get("continuation"))
            written += [(name, text) for name, text in (original, own) if isinstance(text, str)
                        and (name, text) not in written]  # fmt: skip
    if quotes:
        text = "What each model writes after the same words, always taking the likeliest token."
        yield Section("Samples", text, quotes=[Quote(prompt, written) for prompt, written in quotes.items()])


def _conditions(found: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(found.get("tokens"), int):
        yield f"{found['tokens']:,} tokens" + (f" in {found['windows']:,} windows" if found.get("windows") else "")
    for key in ("context", "stride"):
        if isinstance(found.get(key), int):
            yield f"{key} {found[key]:,}"
    if found.get("dtype"):
        yield f"{found['dtype']} on {found.get('device')}"


def _energy(subjects: list[Subject]) -> Section:
    drawn, missing = [], []
    rows: list[tuple[str, ...]] = []
    for subject in subjects:
        kept = _kept(subject)
        if len(kept) > 1:
            says = f"Share of key and value energy that each layer of {subject.name} kept, by method."
            drawn.append(Chart(f"energy-{_slug(subject)}", charts.energy(kept), says))
        elif not kept:
            missing.append(
                f"{subject.name} has no record of it: no conversion in its history factored or pooled heads."
            )
        else:
            (layer, methods), *_ = kept.items()
            missing.append(
                f"{subject.name} was estimated in layer {layer} alone; --method svd and calibrated record all."
            )
        for layer, methods in kept.items():
            for method, sides in methods.items():
                rows.append((subject.name, layer, method, f"{sides['keys']:.1%}", f"{sides['values']:.1%}"))
    text = (
        "The share of the squared norm of each layer's stacked keys and values that the smaller form still expresses, "
        "before any training. What is lost here is what uptraining has to win back; a method below zero adds more "
        "error than it keeps, and is in the table only."
    )
    return Section(
        "Energy kept by layer", text, drawn, ("checkpoint", "layer", "method", "keys", "values"), rows, missing
    )


def _kept(subject: Subject) -> dict[str, Any]:
    found = [stage["energy_kept"] for stage in subject.conversions if stage.get("energy_kept")]
    return found[-1] if found else {}


def _curves(subjects: list[Subject]) -> Section:
    drawn = [
        Chart(f"training-{_slug(subject)}", _resized(plots.curves(subject.log)), f"Losses of {subject.name} by tokens.")
        for subject in subjects if subject.log
    ]  # fmt: skip
    missing = [] if drawn else ["Nothing here was trained: no train_log.jsonl. uptrain train writes one."]
    return Section(
        "Uptraining", "Every figure of the run's log against the tokens seen." if drawn else "", drawn, missing=missing
    )


def _slug(subject: Subject) -> str:
    """Return the subject's name as it can stand in an id and a file's name."""
    return re.sub(r"[^\w.-]", lambda found: f"_{ord(found[0]):x}", subject.name, flags=re.ASCII)


def _resized(figure: Figure) -> Figure:
    # Its letters become as large as the other pictures'.
    figure.set_size_inches(WIDTH, figure.get_figheight())
    return figure


def _speed(subjects: list[Subject]) -> Section:
    timed = [subject for subject in subjects if subject.figure("decode_tokens_per_second", "model") is not None]
    missing = [
        f"{subject.name} has not been timed: uptrain eval {subject.folder} --baseline MODEL, without --no-speed."
        for subject in subjects if subject not in timed
    ]  # fmt: skip
    if not timed:
        return Section("Decode speed", "", missing=missing)
    found = timed[0].evaluation or {}
    text = (
        f"One sequence after {number(timed[0].figure('speed_context'), '{:,.0f}')} tokens, "
        f"{found.get('speed_dtype', '')} on {found.get('device', '')}; medians of runs in turns, whiskers from slowest "
        "to fastest. A smaller cache speeds decoding up where reading it takes long: long contexts and large batches."
    )
    chart = Chart("speed", charts.speed(timed), "Decoded tokens per second of each result and of its original.")
    return Section("Decode speed", text, [chart], missing=missing)


def memory(subjects: list[Subject]) -> Section:
    """Return the section on one request's cache, to be called inside `style.drawing`."""
    found = forms(subjects)
    text = (
        f"The cache of one sequence at {subjects[0].itemsize} bytes a value, were the model's attention of each form: "
        "arithmetic, nothing measured, also beyond the context that the model was trained for. Where no checkpoint "
        "here is MLA, its latent has DeepSeek-V2's proportions."
    )
    columns = ("form", *(tokens(context) for context in CONTEXTS), "of the largest")
    last = CONTEXTS[-1]
    rows = [
        (
            form.name + (f" ({form.owner})" if form.owner else ""),
            *(size(form.sizes[context]) for context in CONTEXTS),
            f"{form.sizes[last] / found[0].sizes[last]:.1%}",
        )
        for form in found
    ]  # fmt: skip
    chart = Chart("memory", charts.memory(found), "Cache of one request against its context, by form of attention.")
    return Section("Memory a request needs", text, [chart], columns, rows)


def _cache(subject: Subject) -> tuple[float, float]:
    """Return cache bytes per token of the original (0 where unknown) and of the subject, as its history has them."""
    now = sum(layer.cache_values_per_token for layer in subject.layers) * subject.itemsize
    kept = 1.0
    for stage in subject.conversions:
        kept *= stage["cache_bytes_per_token"]["after"] / stage["cache_bytes_per_token"]["before"]
    return (now / kept if subject.conversions else 0.0), now
