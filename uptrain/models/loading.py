"""Load models and tokenizers, or make an untrained model. `checked_loading` reads the weights for all of them."""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from uptrain.checkpoint.source import resolve
from uptrain.errors import CheckpointError, UsageError, reported_as
from uptrain.models.checked_loading import ELSEWHERE, load_language_model
from uptrain.models.opened import OpenedModel, open_config, open_model
from uptrain.models.register import register


def load_model(opened: OpenedModel, dtype: torch.dtype | None = None, attn_implementation: str | None = None) -> Any:
    """Load a language model to be measured or trained.

    - `opened`: the model's checkpoint, as `open_model` returned it.
    - `dtype`: of the loaded weights; None for the checkpoint's own.
    - `attn_implementation`: which attention kernel transformers uses; None for its choice.

    Raises:
        UsageError: the model has no language-model head.
        CheckpointError: transformers can't load it. Weights are missing, of other sizes or left out.
    """
    return load_language_model(opened, dtype=dtype or "auto", attn_implementation=attn_implementation)


def load_tokenizer(path: Path | str) -> Any:
    """Load a tokenizer from a folder or a Hub id.

    Raises:
        CheckpointError: transformers finds none, or can't load it.
    """
    with reported_as(lambda reason: CheckpointError(f"{path} has no tokenizer that transformers can load: {reason}")):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def new_model(config: dict[str, Any], tokenizer: Any, seed: int) -> Any:
    """Make an untrained float32 model.

    - `config`: values of a config, `model_type` among them.
    - `tokenizer`: gives the size of the vocabulary and the ids of special tokens, where `config` is silent.
    - `seed`: of the initial weights.

    Raises:
        UsageError: `model_type` is missing or unknown to transformers, or values don't fit together.
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


def quiet() -> None:
    """Keep transformers' progress bars and advice out of a command's output."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # accelerate warns of tied weights at every checkpoint.
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def load(
    model: str | Path,
    *,
    absorbed: bool = True,
    revision: str | None = None,
    allow_pickle: bool = False,
    **options: Any,
) -> Any:
    """Load a language model, ready to generate. uptrain's own classes need no remote code here.

    - `model`: a folder, a Hub id or `demo`.
    - `absorbed`: let stock MLA layers attend over the cached latent. By themselves they expand all of it at every
      step. The logits are the same up to rounding.
    - `revision`: branch, tag or commit of a Hub model.
    - `allow_pickle`: permit `.bin` weights, which torch's restricted unpickler reads.
    - `options`: arguments of transformers' `from_pretrained`, such as dtype, device_map or attn_implementation.

    Raises:
        UptrainError: there is no such checkpoint, transformers can't load it, its dtype can't hold it, it has no
            language-model head, or weights are missing.
    """
    from uptrain.models import neutral_norm

    source = resolve(str(model), revision, allow_pickle)
    opened = open_config(source) if ELSEWHERE & options.keys() else open_model(source)
    found = load_language_model(opened, **options)
    neutral_norm.check_loaded(found)
    if absorbed:
        from uptrain.models.mla_decoding import absorb

        absorb(found)
    return found.eval()
