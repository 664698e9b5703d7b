"""Inspect a checkpoint: what it is, what its cache costs and what it can become, from headers and config alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from uptrain.architectures.attention import cache_bytes, cache_bytes_per_token, cross_bytes_per_token
from uptrain.architectures.description import CheckpointDescription, describe_checkpoint
from uptrain.architectures.embeddings import declares_tied
from uptrain.architectures.projections import module_of
from uptrain.architectures.rope_parameters import EVERY
from uptrain.architectures.running_dtype import cached_itemsize
from uptrain.checkpoint.remote import open_headers
from uptrain.conversion.plan.quantized import check_attention
from uptrain.conversion.possible_targets import head_requests, latent_requests, possible_targets
from uptrain.errors import CheckpointError

CONTEXTS = (4096, 32768, 131072)
"""Context lengths, in tokens, for which the cache is computed."""

SHARES = (0.5, 0.25)
"""Shares of the cache for which a latent is offered."""


@dataclass(frozen=True)
class Option:
    """One thing the checkpoint can become, its cache in bytes per token, and the class that holds it."""

    target: str
    num_key_value_heads: int
    cache_bytes_per_token: int
    host: str
    remote_code: bool
    cache: float | None = None


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is. Cache sizes are bytes for one sequence, in the dtype that the model computes in.

    Where a decoder reads an encoder, `cross_bytes_per_token` is the part of `cache_bytes_per_token` for a token of the
    encoder's text, and `cache_bytes` counts as many tokens of the encoder's text as of the decoder's. With
    `cache_expanded`, transformers' own class caches more: a copy for every query head.

    `dtype` is that of most weights. For a quantized checkpoint, `quantised` describes how, `parameters` counts packed
    codes one by one, and `unreadable` is the reason why it can't be converted, if there is one. `wrapped_in` is the
    model type of a wrapper: then all but the figures of the weights describe the language model in it.
    """

    name: str
    origin: str
    model_type: str
    attention: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    kv_lora_rank: int | None
    qk_rope_head_dim: int
    position: str
    rope: dict[str, Any]
    sliding_window: int | None
    sliding_layers: int
    biases: str
    tied_embeddings: bool
    parameters: int
    dtype: str
    shards: int
    weight_bytes: int
    cache_bytes_per_token: int
    cross_bytes_per_token: int
    cache_bytes: dict[int, int]
    cache_expanded: bool
    options: tuple[Option, ...]
    quantised: str = ""
    unreadable: str = ""
    wrapped_in: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the inspection as plain JSON values."""
        return asdict(self)


def inspect(model: str, *, revision: str | None = None, allow_pickle: bool = False) -> Inspection:
    """Inspect `model` (a folder, `demo` or a Hub id) without loading it.

    Raises:
        UptrainError: it can't be found or read, or is of no known family.
    """
    origin, checkpoint = open_headers(model, revision, allow_pickle)
    source = describe_checkpoint(checkpoint, model)
    layers = source.attention
    counts = Counter[str]()
    for info in checkpoint.tensors.values():
        counts[info.dtype] += math.prod(info.shape)
    itemsize = cached_itemsize(source.config, (info.dtype for info in checkpoint.tensors.values()))
    quantized = source.quantization
    unreadable = _unreadable(source)
    windows = [spec.sliding_window for spec in layers if spec.sliding_window]
    return Inspection(
        name=model,
        origin=origin.describe(),
        model_type=source.family.model_type,
        attention=layers[0].kind,
        num_hidden_layers=sum(not layer.cross for layer in layers),
        hidden_size=source.hidden_size,
        num_attention_heads=layers[0].num_attention_heads,
        num_key_value_heads=layers[0].num_key_value_heads,
        head_dim=layers[0].head_dim,
        kv_lora_rank=layers[0].kv_lora_rank,
        qk_rope_head_dim=layers[0].qk_rope_head_dim,
        position=source.position.value,
        rope=_rope(source),
        sliding_window=windows[0] if windows else None,
        sliding_layers=len(windows),
        biases=_biases(source),
        tied_embeddings=_tied(source),
        parameters=quantized.parameters(checkpoint.tensors) if quantized else sum(counts.values()),
        dtype=counts.most_common(1)[0][0] if counts else "F32",
        shards=len(checkpoint.files),
        weight_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        cache_bytes_per_token=cache_bytes_per_token(layers, itemsize),
        cross_bytes_per_token=cross_bytes_per_token(layers, itemsize),
        cache_bytes={context: cache_bytes(layers, context, itemsize) for context in CONTEXTS},
        cache_expanded=source.expands_cache,
        options=() if layers[0].kind == "mla" or unreadable else tuple(_options(source, itemsize)),
        quantised=quantized.describe() if quantized else "",
        unreadable=unreadable,
        wrapped_in=source.wrapped_in,
    )


def _tied(source: CheckpointDescription) -> bool:
    """Return whether head and embedding are one tensor, as config.json says where no tensor has a known name."""
    try:
        _ = source.prefix
    except CheckpointError:
        return declares_tied(source.family, source.config)
    return source.embeddings.tied


def _unreadable(source: CheckpointDescription) -> str:
    """Return why a quantized checkpoint can't be converted, empty where nothing speaks against it."""
    if source.attention[0].kind == "mla":
        return ""
    try:
        check_attention(source)
    except CheckpointError as error:
        return str(error)
    return ""


def _rope(source: CheckpointDescription) -> dict[str, Any]:
    """Return what the family's class reads of rotary parameters, by type of layer where they differ."""
    if not source.position.rotates:
        return {}
    found = dict(source.rope)
    return found.get(EVERY, found)


def _biases(source: CheckpointDescription) -> str:
    base, projections = source.attention_name(0), source.family.projections
    parts = [part for part in "qkvo" if f"{base}{module_of(projections, part)}.bias" in source.tensors]
    return ", ".join(parts) or "none"


def _options(source: CheckpointDescription, itemsize: int) -> Iterator[Option]:
    """Yield what the checkpoint can become: fewer heads, the most first, then latents."""
    heads = source.attention[0].num_key_value_heads
    for found in possible_targets(source, [*reversed(head_requests(heads)), *latent_requests(SHARES)]):
        # A wrapper keeps its own class, whichever class holds the language model in it.
        wrapper = "" if found.request.kind.latent else source.wrapped_in
        yield Option(
            target=found.request.target,
            num_key_value_heads=found.attention[0].num_key_value_heads,
            cache_bytes_per_token=cache_bytes_per_token(found.attention, itemsize),
            host=wrapper or found.target.name,
            remote_code=bool(found.target.remote_code),
            cache=found.request.cache,
        )
