"""Load models and tokenizers from a checkpoint folder or a config, and write a trained one back."""

from __future__ import annotations

import json
import logging
import shutil
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.embeddings import declare_loaded
from uptrain.architectures.model_class import check_language_model
from uptrain.architectures.wrappers import check_unwrapped
from uptrain.checkpoint.jsonfile import dump_json
from uptrain.checkpoint.loadable import open_loadable
from uptrain.checkpoint.reader import read_config
from uptrain.checkpoint.sidecars import carry, sidecars_of
from uptrain.checkpoint.source import Source, resolve
from uptrain.checkpoint.weight_files import EXPLICIT
from uptrain.errors import CheckpointError, UsageError, told_as
from uptrain.models.checked_loading import load_language_model
from uptrain.models.register import register

if TYPE_CHECKING:
    pass


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(source: Source, dtype: torch.dtype | None = None, attn_implementation: str | None = None) -> Any:
    """Load a language model, in the checkpoint's own dtype unless another is given.

    Raises:
        UsageError: the model has no language-model head.
        CheckpointError: transformers can't load it, weights are missing, of other sizes or left out, or they are
            pickles without permission.
    """
    return load_language_model(source, dtype=dtype or "auto", attn_implementation=attn_implementation)


def check_heads(*sources: Source | None) -> None:
    """Refuse models that can't be run as language models before anything is loaded or written; None is no model.

    Raises:
        UsageError: one has no language-model head, or is a wrapper around one that has.
    """
    for source in sources:
        if source is not None:
            config = read_config(source.path)
            check_unwrapped(config, source.name, "evaluate or train")
            check_language_model(config, source.name)


def placed(model: Any, device: torch.device | None, dtype: torch.dtype) -> Any:
    """Return the model on `device` (None: where it is) and in `dtype`; one that holds codes stays as it was loaded."""
    if holds_codes(model):
        return model if device is None else model.to(device)
    return model.to(device=device, dtype=dtype)


def holds_codes(model: Any) -> bool:
    """Tell whether a loaded model computes with quantized weights, which no other dtype has a meaning for."""
    floats = _DTYPES.values()
    narrow = any(parameter.dtype not in (*floats, torch.float64) for parameter in model.parameters())
    return narrow or getattr(model, "hf_quantizer", None) is not None


def check_weights(*sources: Source | None) -> None:
    """Refuse sources whose weights can't be read, or not without permission, before anything is loaded or written.

    None is no source.

    Raises:
        CheckpointError: as `load_model`.
    """
    for source in sources:
        if source is not None:
            open_loadable(source.path, source.allow_pickle)


def load_tokenizer(path: Path | str) -> Any:
    """Load a tokenizer from a folder or a Hub id.

    Raises:
        CheckpointError: there is none.
    """
    with told_as(lambda reason: CheckpointError(f"{path} has no tokenizer that transformers can load: {reason}")):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def new_model(config: dict[str, Any], tokenizer: Any, seed: int) -> Any:
    """Make an untrained fp32 model from config values, sized to the tokenizer.

    Raises:
        UsageError: no model_type, one that transformers does not know, or values that don't fit together.
    """
    register()
    values = deepcopy(dict(config))  # config classes write into the sections they are given
    model_type = values.pop("model_type", None)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        filled = AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **special, **values})
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(filled, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"The recipe's config makes no causal language model: {reason}") from None


def check_reads_text(model: Any, name: str, command: str, hint: str = "") -> None:
    """Refuse a model that reads something else than token ids, which `command` can't give it.

    Raises:
        UsageError: it does.
    """
    if model.main_input_name != "input_ids":
        raise UsageError(
            f"{name} reads {model.main_input_name}, not text, and text is all that {command} can give it.", hint
        )


def longest_context(model: Any) -> int | None:
    """Return how many positions a model has, by its family's own word for them; None where its config counts none."""
    entry = FAMILIES.get(model.config.model_type)
    key = entry.keys.max_position_embeddings if entry else "max_position_embeddings"
    value = getattr(model.config, key, None)
    return value if isinstance(value, int) else None


def check_tokens(model: Any, ids: NDArray[np.integer[Any]]) -> None:
    """Refuse tokens that a model has no embedding of.

    Raises:
        UsageError: there are some.
    """
    table, largest = model.get_input_embeddings().num_embeddings, int(ids.max(initial=0))
    if largest >= table:
        raise UsageError(
            f"The tokenizer gives token {largest}, but the model has {table} embeddings.",
            "Use the tokenizer that the model was trained with, or resize the model's embeddings.",
        )


def dtype_named(name: str | None) -> torch.dtype | None:
    """Return the torch dtype of a name such as bfloat16."""
    return None if name is None else _DTYPES[name]


def save(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, source: Source | None) -> None:
    """Write model and tokenizer into `folder` in `dtype`.

    What training does not change, the tokenizer's files and the config included, is copied from the source.
    """
    model.to(dtype).save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        # safetensors writes 0600 whatever the umask; the config beside it got the umask's mode.
        path.chmod((folder / "config.json").stat().st_mode)
    if source is None:
        tokenizer.save_pretrained(folder)
        return
    carry(source.path, sidecars_of(source.path, source.listed, keeps_class=True), folder)
    shutil.copyfile(source.path / "config.json", folder / "config.json")
    config = json.loads((folder / "config.json").read_text())
    before = dict(config)
    config.pop(EXPLICIT, None)  # the source's own name for its weight file is none of the result's
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    declare_loaded(config, set(model.all_tied_weights_keys))
    if config != before:
        (folder / "config.json").write_text(dump_json(config))


def quiet() -> None:
    """Keep transformers' progress bars and advice out of a command's output."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # accelerate remarks on tied weights at every checkpoint.
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def load(
    model: str | Path,
    *,
    absorbed: bool = True,
    revision: str | None = None,
    allow_pickle: bool = False,
    **options: Any,
) -> Any:
    """Load a language model from a folder, a Hub id or `demo`, ready to generate.

    Our own classes need no remote code here. Stock MLA classes cache a latent but expand all of it at every step;
    with `absorbed` their layers attend over the latent itself instead, with the same logits up to rounding.
    `allow_pickle` permits to read `.bin` weights, with torch's restricted unpickler. `options` go to transformers'
    `from_pretrained` (dtype, device_map, attn_implementation, …).

    Raises:
        UptrainError: there is no such checkpoint, transformers can't load it, its dtype can't hold it, it has no
            language-model head, or weights are missing.
    """
    from uptrain.models import neutral_norm

    source = resolve(str(model), revision, allow_pickle)
    found = load_language_model(source, **options)
    neutral_norm.check_loaded(found)
    if absorbed:
        from uptrain.models.mla_decoding import absorb

        absorb(found)
    return found.eval()
