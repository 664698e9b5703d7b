"""How a model is given text: a decoder all of it; an encoder a source, of which its decoder writes the continuation."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor


def has_encoder(model: Any) -> bool:
    """Tell whether the model's decoder reads an encoder's output."""
    return bool(model.config.is_encoder_decoder)


def predicted(model: Any, shown: Tensor, first: int) -> Tensor:
    """Return logits (tokens − first, vocab_size) for the tokens of `shown` (tokens,) from number `first` on.

    A decoder sees all tokens before each; of a model with an encoder that reads the first `first` ones, and its decoder
    has seen those of the rest that came before (teacher forcing), after its own start token.
    """
    if has_encoder(model):
        logits: Tensor = model(input_ids=shown[None, :first], labels=shown[None, first:], use_cache=False).logits[0]
        return logits
    # The logits at a position predict the token after it, so the last position's are not needed.
    decoded: Tensor = model(input_ids=shown[None], use_cache=False).logits[0, first - 1 : -1]
    return decoded


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the argument that gives a model a cache: it is `cache`, or `past_key_values` before transformers 5.24.

    A model's own code may be older than transformers, so its forward is asked and not the release.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def cache_of(output: Any) -> Any:
    """Return the cache that a model's output holds, under the name that this transformers has for it."""
    return output["cache"] if "cache" in output else output["past_key_values"]


def caches(model: Any, ids: Tensor) -> tuple[list[Any], list[Any]]:
    """Return the layers of the cache after `ids` (1, tokens), of self-attention and of attention over a source.

    An encoder has then read as many tokens as the decoder.
    """
    if not has_encoder(model):
        return cache_of(model(input_ids=ids, use_cache=True)).layers, []
    both = cache_of(model(input_ids=ids, decoder_input_ids=ids, use_cache=True))
    return both.self_attention_cache.layers, both.cross_attention_cache.layers


def prefill(model: Any, ids: Tensor) -> tuple[Any, dict[str, Any]]:
    """Return what the model says after `ids` (batch, tokens), and what it must be given again beside every next token.

    An encoder reads them all, and the decoder its start token.
    """
    if not has_encoder(model):
        return model(input_ids=ids, use_cache=True, logits_to_keep=1), {}
    start = ids.new_full((len(ids), 1), model.config.decoder_start_token_id)
    out = model(input_ids=ids, decoder_input_ids=start, use_cache=True)
    return out, {"encoder_outputs": (out.encoder_last_hidden_state,)}


def step(model: Any, token: Tensor, cache: Any, again: dict[str, Any]) -> Any:
    """Return what the model says after one more token (batch, 1); `again` is what `prefill` gave beside its output."""
    name = "decoder_input_ids" if has_encoder(model) else "input_ids"
    return model(**{name: token}, **with_cache(model, cache), use_cache=True, **again)
