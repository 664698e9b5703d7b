"""The model card: what was done to which model, what it costs and saves, how to use and to reproduce it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from uptrain.architectures.quantization import declared_scheme
from uptrain.conversion.request import in_effect
from uptrain.methods.registry import METHODS
from uptrain.publishing.hub.card_metrics import CardMetrics
from uptrain.publishing.hub.history import Stage, reproduction_commands
from uptrain.publishing.hub.licence import Licence
from uptrain.publishing.hub.subject import CardSubject
from uptrain.publishing.hub.use import TASKS, auto_class_of, use
from uptrain.publishing.repairs import repaired

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_NAMED_APART = ("target", "method")


def build_card(
    subject: CardSubject, licence: Licence, metrics: CardMetrics | None, own: tuple[dict[str, Any], str]
) -> ModelCard:
    """Return the card.

    - `subject`: the checkpoint that the card describes.
    - `licence`: its licence.
    - `metrics`: the metrics of eval.json; None for none.
    - `own`: metadata and text of the author's README.md, which take precedence.

    Raises:
        ValueError: the Hub does not accept the author's metadata.
    """
    from huggingface_hub import ModelCard, ModelCardData

    own_data, own_text = own
    data = {**_metadata(subject, metrics).to_dict(), **own_data}
    for key, value in (("license", licence.id), ("license_name", licence.name), ("license_link", licence.link)):
        data.pop(key, None)
        if value:
            data[key] = value
    text = own_text.strip() or _text(subject, licence, metrics)
    return ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{text}\n")


def _metadata(subject: CardSubject, metrics: CardMetrics | None) -> Any:
    from huggingface_hub import ModelCardData

    converted = subject.converted
    kind = converted[-1].get("request", {}).get("target") if converted else None
    task = TASKS[auto_class_of(subject.config)]
    results = metrics.results(task) if metrics else None
    return ModelCardData(
        base_model=subject.base,
        # The Hub knows adapter, finetune, merge and quantized. A conversion changes weights, so it is a finetune.
        base_model_relation="finetune" if subject.base else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["uptrain", "kv-cache", *([kind] if kind else [])],
        model_name=subject.name if results else None,
        eval_results=results or None,
    )


def _text(subject: CardSubject, licence: Licence, metrics: CardMetrics | None) -> str:
    sections = [
        f"# {subject.name}", _summary(subject), "## How it was made", _made(subject), *_evaluated(metrics),
        "## Use", use(subject.repo, subject.config, subject.converted, subject.revision), "## Reproduce it",
        _reproduction(subject), "## Licence", _licence(subject, licence),
    ]  # fmt: skip
    return "\n\n".join(sections)


def _summary(subject: CardSubject) -> str:
    return "\n\n".join([_made_of(subject), *_quantized(subject)])


def _quantized(subject: CardSubject) -> list[str]:
    scheme = declared_scheme(subject.config)
    return [f"Its weights outside attention are quantized ({scheme}), as those of its source are."] if scheme else []


def _made_of(subject: CardSubject) -> str:
    source, converted = subject.source, subject.converted
    named = f"[{source}](https://huggingface.co/{source})" if source == subject.base else source
    if not converted:
        return f"A further training of {named}." if source else "A language model trained from scratch."
    before, after = subject.cache_bytes
    latent = "latent" in converted[-1]
    heads = str(converted[0]["num_key_value_heads"]["before"])
    rows = [
        (
            "cached per layer" if latent else "key/value heads",
            f"{heads} heads" if latent else heads,
            _cached(converted[-1]),
        ),
        ("cache, bytes per token", f"{before:,}", f"{after:,} ({after / before:.1%})"),
    ]
    return (
        f"{named}, with a key/value cache of {after / before:.1%} of the size: {after:,} bytes per token instead of "
        f"{before:,}.\n\n" + _table(("", source, "this model"), rows)
    )


def _cached(stage: Stage) -> str:
    if "latent" not in stage:
        return f"{stage['num_key_value_heads']['after']} for {stage['num_attention_heads']} query heads"
    latent = stage["latent"]
    rotary = f" and a rotary key of {latent['qk_rope_head_dim']}" if latent["qk_rope_head_dim"] else ""
    return f"a latent of {latent['kv_lora_rank']} values{rotary}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ("---", *("---:" for _ in columns[1:])), *rows]
    return "\n".join(map(_line, lines))


def _line(cells: Sequence[str]) -> str:
    # A name may contain the character that ends a cell.
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _made(subject: CardSubject) -> str:
    known = {"convert": _converting, "train": _training}
    return "\n".join(
        f"{number}. {known.get(str(stage.get('stage')), _unknown)(stage)}"
        for number, stage in enumerate(subject.repeatable, 1)
    )


def _unknown(stage: Stage) -> str:
    return f"**{stage.get('stage')}**, a stage that this version of uptrain does not know."


def _converting(stage: Stage) -> str:
    request = stage["request"]
    method = request.get("method")
    options = {key: value for key, value in in_effect(request).items() if key not in _NAMED_APART}
    listed = ", ".join(f"`{key}` {value}" for key, value in options.items())
    if method is None:
        listed = f" Options: {listed}." if listed else ""
        return f"**Written** as {str(request['target']).upper()} with all its key/value heads as they were.{listed}"
    how = METHODS[method].summary if method in METHODS else "see below"
    others = repaired(stage)
    return (
        f"**Converted** to {str(request['target']).upper()}, method `{method}`: {how}."
        f"{_energy(stage, method)}{others and f' {others}'}{f' Options: {listed}.' if listed else ''}"
    )


def _energy(stage: Stage, method: str) -> str:
    layers = [explained[method] for explained in stage.get("energy_kept", {}).values() if method in explained]
    if not layers:
        return ""
    keys, values = (sum(layer[side] for layer in layers) / len(layers) for side in ("keys", "values"))
    return f" It explains {keys:.1%} of the energy of keys and {values:.1%} of the energy of values."


def _training(stage: Stage) -> str:
    words = f"**Trained** for {stage['steps']:,} steps on {stage['tokens']:,} tokens"
    rate = stage.get("recipe", {}).get("learning_rate")
    words += f", learning rate {rate:g}" if isinstance(rate, int | float) else ""
    held_out = stage.get("held_out_loss")
    return words + (f"; loss {held_out:.4f} nats per token on held-out text." if held_out is not None else ".")


def _evaluated(metrics: CardMetrics | None) -> list[str]:
    if metrics is None:
        return []
    compared = any(row.baseline is not None for row in metrics.rows)
    if compared:
        table = _table(("", "original", "this model"), [row.cells() for row in metrics.rows])
    else:
        table = _table(("", "this model"), [(name, value) for name, _, value in (row.cells() for row in metrics.rows)])
    parts = ["## Evaluation", table, f"Measured by `uptrain eval` on {metrics.text}: {metrics.conditions}."]
    for title, each in metrics.tables:
        parts += [f"### {title}", _table(each.columns, each.rows)]
    return parts


def _reproduction(subject: CardSubject) -> str:
    found = reproduction_commands(subject.repeatable, subject.name, subject.base)
    versions = subject.stages[-1].get("versions", {}) if subject.stages else {}
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = ["```bash\n" + "\n".join(step.command for step in found) + "\n```"]
    parts += [f"`{step.recipe_file}`:\n\n```yaml\n{step.recipe}```" for step in found if step.recipe]
    parts.append(
        f"Made with {made_with}. `uptrain.json` has the whole history and the checksum of every file. "
        "`uptrain verify` checks a downloaded copy."
    )
    return "\n\n".join(parts)


def _licence(subject: CardSubject, licence: Licence) -> str:
    words = licence.name or licence.id
    named = f"[{words}]({licence.link})" if licence.link else words
    return f"{named}, that of {subject.source}." if subject.source else f"{named}."
