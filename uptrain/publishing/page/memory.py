"""The cache of one request with MHA, GQA, MQA and MLA. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from uptrain.architectures.attention import AttentionSpec, cache_bytes
from uptrain.publishing.page.models import PageModel

CONTEXTS = tuple(4096 * 4**power for power in range(5))
"""Tokens: 4 K to 1 M."""


@dataclass(frozen=True)
class AttentionCache:
    """An attention, its cache bytes by context, and the models of the report that have it."""

    name: str
    sizes: dict[int, int]
    owner: str = ""


def attention_caches(models: list[PageModel]) -> list[AttentionCache]:
    """Return the caches of the first model with MHA, GQA, MQA and MLA, and those of all models, largest first.

    GQA has the original's heads, else the models' own, else a quarter of the query heads. MLA has a model's own
    latent, else one of DeepSeek-V2's proportions: the dims of four heads, and half a head's dims for rotary keys.

    Source: DeepSeek-V2 (2024), section 3.1.2 for the proportions; Ainslie et al. 2023 for GQA.
    """
    first = models[0]
    heads = first.layers[0].num_attention_heads
    comparable = [each for each in models if _size(each) == _size(first)]
    latent = next((each.layers for each in comparable if each.layers[0].kind == "mla"), None)
    plain = tuple(_plain(layer) for layer in first.layers)
    counts = {each.original_heads for each in comparable}
    counts |= {each.layers[0].num_key_value_heads for each in comparable if each.layers[0].kind != "mla"}
    if not any(1 < count < heads for count in counts):
        counts.update([count for count in range(max(2, heads // 4), heads) if heads % count == 0][:1])
    found: dict[str, tuple[AttentionSpec, ...]] = {}
    for count in sorted({heads, *counts, 1}, reverse=True):
        shared = tuple(layer.grouped(count) for layer in plain)
        found[_name(shared[0])] = shared
    latent = latent or tuple(_latent(layer, first.model.position.rotates) for layer in plain)
    found[_name(latent[0])] = latent
    for each in comparable:
        found[_name(each.layers[0])] = each.layers
    owners = {_name(each.layers[0]): each.name for each in reversed(comparable)}
    original = _name(plain[0].grouped(first.original_heads))
    owners[original] = " and ".join(filter(None, ("the original", owners.get(original))))
    out = [
        AttentionCache(
            name, {context: cache_bytes(layers, context, first.itemsize) for context in CONTEXTS}, owners.get(name, "")
        )
        for name, layers in found.items()
    ]
    return sorted(out, key=lambda attention: -attention.sizes[CONTEXTS[-1]])


def _size(model: PageModel) -> tuple[int, int, int]:
    layer = model.layers[0]
    return len(model.layers), layer.num_attention_heads, layer.v_head_dim or layer.head_dim


def _plain(layer: AttentionSpec) -> AttentionSpec:
    """Return the layer with heads of its own; a latent's key heads may be wider than they were, its values aren't."""
    width = layer.v_head_dim or layer.head_dim
    heads = layer.num_attention_heads
    return AttentionSpec(heads, heads, width, sliding_window=layer.sliding_window)


def _latent(layer: AttentionSpec, rotates: bool) -> AttentionSpec:
    rotary = layer.head_dim // 2 if rotates else 0
    made = layer.latent(4 * layer.head_dim, rotary, layer.head_dim, layer.num_attention_heads)
    return replace(made, sliding_window=layer.sliding_window)


def _name(layer: AttentionSpec) -> str:
    if layer.kind == "gqa":
        return f"GQA-{layer.num_key_value_heads}"
    return f"MLA-{layer.cache_values_per_token}" if layer.kind == "mla" else layer.kind.upper()
