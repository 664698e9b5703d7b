"""The sections of a report, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uptrain.formatting import number, size, tokens
from uptrain.publishing.page import charts
from uptrain.publishing.page.layers import energy, similarity
from uptrain.publishing.page.memory import CONTEXTS, attention_caches
from uptrain.publishing.page.models import PageModel
from uptrain.publishing.page.quality import quality
from uptrain.publishing.page.retrieval import retrieval
from uptrain.publishing.page.samples import samples
from uptrain.publishing.page.section import ORIGINAL, Chart, Section, slug
from uptrain.publishing.page.speed import speed
from uptrain.publishing.page.style import WIDTH
from uptrain.publishing.page.tasks import task_section
from uptrain.publishing.repairs import repaired
from uptrain.training import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def summary(models: list[PageModel]) -> Section:
    """Return the table at the top: a row for the original and for each model, with the main metrics."""
    columns = ("", "cache per token", "share", "perplexity", "times the original's", "KL, nats", "top-1", "flips")
    rows: list[tuple[str, ...]] = []
    seen = set()
    for model in models:
        whole = model.metric("cache_bytes_per_token", "baseline")
        if whole is not None and model.conditions not in seen:
            seen.add(model.conditions)
            perplexity = number(model.metric("perplexity", "baseline"), "{:.2f}")
            rows.append((ORIGINAL, size(whole), "100 %", perplexity, "–", "–", "–", "–"))
        before, after = _cache(model)
        rows.append(
            (
                model.name, size(after), f"{100 * after / before:.3g} %" if before else "–",
                number(model.metric("perplexity", "model"), "{:.2f}"),
                number(model.metric("perplexity_ratio"), "{:.3f}", model.interval("perplexity_ratio_interval")),
                number(model.metric("kl"), "{:#.3g}", model.interval("kl_interval")),
                number(model.metric("top1_agreement"), "{:.1%}"), number(model.metric("flip_rate"), "{:.2%}"),
            )
        )  # fmt: skip
    return Section("Summary", _others(models), columns=columns, rows=rows)


def _others(models: list[PageModel]) -> str:
    """Say of which models more than attention differs from the source."""
    found = [(model.name, repaired(stage)) for model in models for stage in model.conversions]
    return " ".join(f"{name}: {said}" if len(models) > 1 else said for name, said in found if said)


def sections(models: list[PageModel]) -> list[Section]:
    """Return the page's sections. Call it inside `style.drawing`."""
    return [
        quality(models), *task_section(models), *retrieval(models), *samples(models), energy(models),
        *similarity(models), _curves(models), speed(models), memory(models),
    ]  # fmt: skip


def _curves(models: list[PageModel]) -> Section:
    drawn = [
        Chart(
            f"training-{slug(model.name)}", _resized(plots.curves(model.log)),
            f"Losses of {model.name} by tokens.",
            model.name * (len(models) > 1),
        )
        for model in models if model.log
    ]  # fmt: skip
    missing = [] if drawn else ["No model here was trained: there is no train_log.jsonl, which uptrain train writes."]
    return Section(
        "Uptraining",
        "Every metric of the run's log against the number of tokens." if drawn else "",
        drawn,
        missing=missing,
    )


def _resized(figure: Figure) -> Figure:
    # The same width gives letters of the same size as in the other charts.
    figure.set_size_inches(WIDTH, figure.get_figheight())
    return figure


def memory(models: list[PageModel]) -> Section:
    """Return the section on the cache of one request. Call it inside `style.drawing`."""
    found = attention_caches(models)
    text = (
        f"The cache of one sequence at {models[0].itemsize} bytes per value, for each of these attentions. "
        "This is arithmetic, not measured, also beyond the context that the model was trained for. If no checkpoint "
        "here has MLA, its latent has the proportions of DeepSeek-V2."
    )
    columns = ("attention", *(tokens(context) for context in CONTEXTS), "of the largest")
    last = CONTEXTS[-1]
    rows = [
        (
            attention.name + (f" ({attention.owner})" if attention.owner else ""),
            *(size(attention.sizes[context]) for context in CONTEXTS),
            f"{attention.sizes[last] / found[0].sizes[last]:.1%}",
        )
        for attention in found
    ]  # fmt: skip
    chart = Chart("memory", charts.memory(found), "Cache of one request against its context, by attention.")
    return Section("Memory a request needs", text, [chart], columns, rows)


def _cache(model: PageModel) -> tuple[float, float]:
    """Return the cache bytes per token of the original (0 if unknown) and of the model, by its history."""
    now = sum(layer.cache_values_per_token for layer in model.layers) * model.itemsize
    share = 1.0
    for stage in model.conversions:
        share *= stage["cache_bytes_per_token"]["after"] / stage["cache_bytes_per_token"]["before"]
    return (now / share if model.conversions else 0.0), now
