"""Load a model so that no weight of it is random. Every `from_pretrained` of a model in uptrain is called here."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.model_class import check_language_model
from uptrain.architectures.quantization import check_read, check_scheme
from uptrain.architectures.wrappers import language_config, tower_in
from uptrain.errors import CheckpointError, reported_as
from uptrain.models.auto_class import auto_class_of, check_loadable
from uptrain.models.class_fit import Fit, check_fit
from uptrain.models.opened import OpenedModel
from uptrain.models.register import register

ELSEWHERE = frozenset(("variant", "subfolder", "gguf_file", "state_dict", "use_safetensors"))
"""Options of `from_pretrained` that choose which files are read."""


def load_language_model(opened: OpenedModel, **options: Any) -> Any:
    """Load a language model, every weight from its files.

    `options` are arguments of transformers' `from_pretrained`. By default the model has the checkpoint's own dtype, and
    no remote code is run.

    Raises:
        UsageError: its class has no language-model head, or wraps a language model.
        CheckpointError: transformers can't load it. Weights are missing, of other sizes or left out.
    """
    folder, name, config, chosen = opened.source.path, opened.name, opened.config, ELSEWHERE & options.keys()
    if not chosen and "key_mapping" not in options:
        check_loadable(opened)
    safetensors = bool(chosen) or opened.checkpoint is not None
    settings = {"dtype": "auto", "use_safetensors": safetensors, "trust_remote_code": False, **options}
    register()
    check_language_model(config, name)
    auto_class, quantized = auto_class_of(config), opened.quantization
    check_scheme(quantized, AUTO_QUANTIZATION_CONFIG_MAPPING, name)
    called = f"{name}, which is quantized with {quantized.describe()}" if quantized else name
    with reported_as(lambda reason: CheckpointError(f"transformers can't load {called}: {reason}")):
        model, info = loading_info(auto_class, folder, **settings)
    check_read(quantized, info["unexpected_keys"], name)
    fit = Fit.of(type(model).__name__ if model is not None else auto_class.__name__, info)
    # Only the quantizer knows what else a quantized checkpoint stores.
    tower, spoken = tower_in(config), language_config(config)
    family = None if quantized else FAMILIES.get(str(spoken.get("model_type")))
    family = tower.named(family) if tower and family else family
    check_fit(fit, name, family, spoken.get(family.keys.num_hidden_layers) if family else None)
    return model


def loading_info(loader: Any, place: Path | None, **settings: Any) -> tuple[Any, Mapping[str, Any]]:
    """Call `loader.from_pretrained(place)` and return the model and transformers' report of its tensors.

    The model is None where tensors of the file don't go together; the report then names them under "unjoined".

    Raises:
        Exception: whatever transformers raises for other reasons.
    """
    given = {**settings, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = loader.from_pretrained(place, **given)
    except RuntimeError as error:
        report = _report_of(error)
        if report is None:
            raise
        unjoined = set(report.conversion_errors)
        found = report.to_dict()
        return None, {**found, "missing_keys": found["missing_keys"] - unjoined, "unjoined": unjoined}
    return model, info


def _report_of(error: RuntimeError) -> Any:
    """Return transformers' report on conversions of weights that failed, None if `error` is of another kind.

    Its message only points to what was logged, and uptrain keeps that log off the screen.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = frame.f_locals.get("loading_info")
        if getattr(found, "conversion_errors", None):
            return found
    return None
