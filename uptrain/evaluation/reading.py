"""How a model reads text: a decoder reads all of it; an encoder reads a source, and its decoder the continuation."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor


def has_encoder(model: Any) -> bool:
    """Tell whether the model is an encoder-decoder."""
    return bool(model.config.is_encoder_decoder)


def predicted(model: Any, shown: Tensor, first: int) -> Tensor:
    """Return the logits (tokens − first, vocab_size) that predict the tokens of `shown` (tokens,) from `first` on.

    A decoder-only model reads all tokens before each predicted one. An encoder reads the first `first` tokens; its
    decoder reads its start token and the true tokens after them (teacher forcing).
    """
    if has_encoder(model):
        logits: Tensor = model(input_ids=shown[None, :first], labels=shown[None, first:], use_cache=False).logits[0]
        return logits
    # The logits at a position predict the token after it, so the last position's are not needed.
    decoded: Tensor = model(input_ids=shown[None], use_cache=False).logits[0, first - 1 : -1]
    return decoded


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the argument that passes a cache to a model: `cache`, or `past_key_values` before transformers 5.24.

    The name is read from the model's forward, since a model's own code may be older than transformers.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def cache_of(output: Any) -> Any:
    """Return the cache in a model's output, under the name that this release of transformers uses."""
    return output["cache"] if "cache" in output else output["past_key_values"]


def caches(model: Any, ids: Tensor) -> tuple[list[Any], list[Any]]:
    """Return the cache layers of self-attention and of cross-attention after `ids` (1, tokens).

    An encoder and its decoder both read `ids`.
    """
    if not has_encoder(model):
        return cache_of(model(input_ids=ids, use_cache=True)).layers, []
    both = cache_of(model(input_ids=ids, decoder_input_ids=ids, use_cache=True))
    return both.self_attention_cache.layers, both.cross_attention_cache.layers


def prefill(model: Any, ids: Tensor) -> tuple[Any, dict[str, Any]]:
    """Return the model's output after `ids` (batch, tokens), and the arguments that every `step` needs again.

    An encoder reads all of `ids`, and its decoder the start token.
    """
    if not has_encoder(model):
        return model(input_ids=ids, use_cache=True, logits_to_keep=1), {}
    start = ids.new_full((len(ids), 1), model.config.decoder_start_token_id)
    out = model(input_ids=ids, decoder_input_ids=start, use_cache=True)
    return out, {"encoder_outputs": (out.encoder_last_hidden_state,)}


def step(model: Any, token: Tensor, cache: Any, again: dict[str, Any]) -> Any:
    """Return the model's output after one more token.

    - `model`: a model of transformers.
    - `token`: int64 (batch, 1).
    - `cache`: the cache of the step before.
    - `again`: the arguments that `prefill` returned.
    """
    name = "decoder_input_ids" if has_encoder(model) else "input_ids"
    return model(**{name: token}, **with_cache(model, cache), use_cache=True, **again)
