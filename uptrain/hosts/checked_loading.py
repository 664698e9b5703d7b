"""Load a model whose codes, where it has any, its loader takes for codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uptrain.errors import CheckpointError, told_as
from uptrain.hosts.register import auto_class_of, register
from uptrain.quantisation import check_loadable, check_read, quantisation_in


def load_checked(folder: Path, name: str, **settings: Any) -> Any:
    """Load the language model in `folder`.

    Args:
        folder: the checkpoint's folder.
        name: what the user called it.
        settings: for transformers' `from_pretrained`.

    Raises:
        CheckpointError: transformers can't load it, or would take codes for weights.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    register()
    found = quantisation_in(folder)
    check_loadable(found, AUTO_QUANTIZATION_CONFIG_MAPPING, name)
    called = f"{name}, which is quantised with {found.describe()}" if found else name
    with told_as(lambda reason: CheckpointError(f"transformers can't load {called}: {reason}")):
        model, info = auto_class_of(folder).from_pretrained(folder, **{**settings, "output_loading_info": True})
    check_read(found, info["unexpected_keys"], name)
    return model
