"""Fit an evaluation's settings to its models, and refuse what they can't do before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from uptrain.errors import UsageError
from uptrain.evaluation.contexts import CONTEXT, SPEED_CONTEXT, check_stride, choose_contexts
from uptrain.evaluation.needle import check_needles
from uptrain.evaluation.pair import ModelPair
from uptrain.evaluation.reading import has_encoder
from uptrain.evaluation.samples import check_samples
from uptrain.evaluation.settings import EvaluationSettings
from uptrain.models.checks import check_reads_text


def fit_settings(
    settings: EvaluationSettings, pair: ModelPair, on_note: Callable[[str], None] = lambda text: None
) -> EvaluationSettings:
    """Return the settings with every context and needle length filled in, none longer than models and texts.

    `on_note` is called with a sentence per context that is shortened.

    Raises:
        UsageError: the models can't do what the settings ask for.
    """
    _check_reading(settings, pair)
    limit, reserved = pair.limit(), pair.limit(settings.decode_tokens + 1)
    contexts = choose_contexts("--context", settings.contexts, CONTEXT, limit, on_note)
    longest_text = max(len(text.ids) for text in pair.texts.values())
    if max(contexts) > longest_text and settings.context is not None:
        on_note(f"--context {max(contexts)} is {longest_text}: no text here has more tokens.")
    contexts = sorted({min(context, longest_text) for context in contexts})
    speed_contexts: list[int] = []
    if settings.repeats:
        speed_contexts = choose_contexts("--speed-context", settings.speed_contexts, SPEED_CONTEXT, reserved, on_note)
    check_stride(settings.stride, contexts[0], pair.has_encoder)
    needle = settings.needle
    if needle is not None:
        needle = replace(needle, lengths=needle.lengths or tuple(contexts))
        check_needles(pair.tokenizers[0], needle, limit.positions)
    if settings.samples:
        check_samples(settings.sample_tokens, limit.positions)
    return replace(settings, context=tuple(contexts), speed_context=tuple(speed_contexts), needle=needle)


def _check_reading(settings: EvaluationSettings, pair: ModelPair) -> None:
    """Refuse models that don't read text, that read it differently, or that can't do what is asked."""
    for name, model in zip(pair.names, pair.models, strict=True):
        check_reads_text(model, name, "eval")
    if len({has_encoder(model) for model in pair.models}) > 1:
        raise UsageError(f"Only one of {' and '.join(pair.names)} has an encoder, so they can't read the same text.")
    if settings.for_decoders_only and pair.has_encoder:
        raise UsageError(
            f"{pair.names[0]} has an encoder; tasks, needles and samples are for decoder-only models.",
            "Leave out --task, --needle and --samples.",
        )
