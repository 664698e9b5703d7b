"""Choose a latent's sizes: its rank, the dims of its shared rotary key and, where they follow, its rotary pairs."""

from __future__ import annotations

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.mla_projections import MLASpec
from uptrain.architectures.mla_rope import MLARope
from uptrain.architectures.rope import InverseFrequencies
from uptrain.conversion.request import Request
from uptrain.errors import UsageError

FAST = 512 + 64
"""Cached values per token that the fast MLA kernels of today's engines are written for."""


def plan_sizes(
    request: Request, source: CheckpointDescription, rope: MLARope, frequencies: InverseFrequencies
) -> MLASpec:
    """Return the latent's sizes, and its rotary pairs where they follow from the sizes.

    - `request`: what the user asks of the sizes; what is not asked gets a default.
    - `source`: the checkpoint.
    - `rope`: where the positions of keys are.
    - `frequencies`: the source's inverse frequencies; empty where no shared rotary key needs them.

    Raises:
        UsageError: the sizes don't go together, or are larger than what the source has.
    """
    spec, (rank, rotary) = source.attention[0], _sizes(request, source, rope)
    pairs, heads = spec.head_dim // 2, spec.num_key_value_heads
    every = rope.chooses_pairs and rotary == spec.head_dim * heads
    rope_pairs: tuple[int, ...] = () if rope.chooses_pairs else tuple(range(rotary // 2))
    if every:
        rope_pairs = tuple(pair for pair in range(pairs) for _ in range(heads))
    return MLASpec(
        rope, rank, rotary, 0 if every else spec.head_dim, frequencies.values, rope_pairs, frequencies.attention_factor,
        request.key_weight,
    )  # fmt: skip


def _sizes(request: Request, source: CheckpointDescription, rope: MLARope) -> tuple[int, int]:
    """Return kv_lora_rank and qk_rope_head_dim."""
    spec, hidden, name = source.attention[0], source.hidden_size, source.name
    cached = spec.cache_values_per_token
    if request.cache is not None:
        budget = max(1, int(request.cache * cached))
    elif not rope.shares_key:
        budget = cached // (2 if rope.rotates else 4)
    else:
        budget = FAST if cached >= 2 * FAST else cached // 2
    rotary = _rotary_dims(request, spec, budget, rope, name)
    rank = request.kv_lora_rank if request.kv_lora_rank is not None else budget - rotary
    if rank < 1:
        raise UsageError(
            f"{budget} cached values per token leave none for the latent after {rotary} rotary ones.",
            "Raise --cache, or lower --qk-rope-head-dim.",
        )
    widest = cached + (spec.num_key_value_heads * spec.head_dim if rope.shares_key else 0)
    if rank > widest:
        raise UsageError(
            f"--kv-lora-rank {rank} is more than the {widest} values that {name}'s keys and values have.",
            f"A latent of {min(widest, hidden + 1)} loses nothing.",
        )
    return rank, rotary


def _rotary_dims(request: Request, spec: AttentionSpec, budget: int, rope: MLARope, name: str) -> int:
    if not rope.shares_key:
        return 0
    dims = request.qk_rope_head_dim
    if dims is None:
        return 64 if budget >= FAST and spec.head_dim >= 64 else max(2, min(64, spec.head_dim // 4 * 2))
    most = spec.head_dim * (spec.num_key_value_heads if rope.chooses_pairs else 1)
    if dims < 2 or dims % 2 or dims > most:
        hint = " --rope longrope takes more." if rope.truncates and dims > most else ""
        raise UsageError(f"--qk-rope-head-dim {dims} is no even number from 2 to {name}'s {most}.{hint}")
    return dims
