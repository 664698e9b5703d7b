"""Plan a latent: its sizes, the class that holds it, its config, and what else in the model must change for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.description import CheckpointDescription, ModelDescription
from uptrain.architectures.mla_projections import MLASpec, MLAStorage
from uptrain.architectures.mla_rope import MLARope
from uptrain.architectures.rope import InverseFrequencies, inverse_frequencies, longrope_table, truncated
from uptrain.architectures.rope_parameters import EVERY, write_rotation
from uptrain.checkpoint.header import FLOAT_DTYPES
from uptrain.conversion.request import Request
from uptrain.errors import UsageError
from uptrain.models.mla_targets import MLA_TARGET_CLASSES, MLATargetClass, latent_config

FAST = 512 + 64
"""Cached values a token that the fast MLA kernels of today's engines are written for."""


@dataclass(frozen=True)
class LatentPlan:
    """All that a conversion to a latent needs beyond what every plan has.

    `scales` maps the ends of tensor names outside attention to what they are multiplied by, `alpha` is the residual
    stream's factor. With `pairs_to_choose` the rope pairs are still to be chosen, by what unrotated ones would cost.
    """

    entry: MLATargetClass
    spec: MLASpec
    stored: MLAStorage
    after: tuple[AttentionSpec, ...]
    config: dict[str, Any]
    biased: bool
    output_bias: bool
    alpha: float = 1.0
    scales: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    pairs_to_choose: bool = False

    def with_rope_pairs(self, rope_pairs: tuple[int, ...]) -> LatentPlan:
        """Return the plan with its rotary pairs chosen and their table in the config."""
        spec = replace(self.spec, rope_pairs=rope_pairs)
        config = dict(self.config)
        _set_rotation(spec, config, self.config["rope_parameters"])
        return replace(self, spec=spec, config=config, pairs_to_choose=False)


def plan_latent(source: CheckpointDescription, request: Request) -> LatentPlan:
    """Plan the latent that `request` asks of a checkpoint.

    Raises:
        UsageError: no class holds it, or its sizes don't go together.
    """
    config, spec, base = source.config, source.attention[0], source.attention_name(0)
    modules = {tensor.removeprefix(base) for tensor in source.tensors if tensor.startswith(base)}
    output = source.family.projections.o
    biased = any(module.endswith(".bias") and module != f"{output}.bias" for module in modules)
    output_bias = f"{output}.bias" in modules
    rope = _rope(request, source)
    entry = _target_class(source, request, rope, biased or output_bias)
    if any(layer.sliding_window for layer in source.attention):
        raise UsageError(
            f"{source.name} has sliding windows, which no MLA target class holds yet.", "Use --to gqa or --to mqa."
        )
    parameters, frequencies = _source_rotation(source, rope)
    rank, rotary = _sizes(request, source, rope)
    mla = _spec(request, spec, rope, rank, rotary, frequencies)
    dtype = _dtype(source, request)
    if dtype not in entry.dtypes:
        raise UsageError(
            f"{entry.target.name} has a norm on the latent that weights of 1e-9 turn off; float16 can't hold them.",
            "Add --dtype bfloat16 or float32.",
        )
    alpha, scales = _rescale(entry, config)
    q_lora_rank = _q_lora_rank(request, entry, source)
    schema = replace(entry.schema, per_query=not rope.rotates_expanded)
    heads = spec.num_attention_heads if schema.per_query else spec.num_key_value_heads
    after = tuple(layer.latent(rank, mla.qk_rope_head_dim, mla.qk_nope_head_dim, heads) for layer in source.attention)
    written, biases = latent_config(entry, source), (biased, output_bias)
    written.update(_attention_config(entry, source, mla, heads, biases, q_lora_rank))
    _set_rotation(mla, written, parameters, spec.head_dim)
    _check_truncated(mla, ModelDescription(family=entry.family, config=written, name=source.name))
    return LatentPlan(
        entry, mla, MLAStorage(schema, alpha, q_lora_rank), after, written, biased, output_bias,
        alpha, scales, rope.chooses_pairs and not mla.rope_pairs,
    )  # fmt: skip


def _rope(request: Request, source: CheckpointDescription) -> MLARope:
    if not source.family.position.rotates:
        if request.rope or request.qk_rope_head_dim:
            option = "--rope" if request.rope else "--qk-rope-head-dim"
            raise UsageError(
                f"{option} is for rotary keys; {source.name}'s keys see no rotation.", f"Leave {option} out."
            )
        return MLARope.NONE
    rope = MLARope.named(request.rope) or MLARope.DECOUPLED
    if not rope.shares_key and request.qk_rope_head_dim:
        raise UsageError(f"--rope {rope.value} has no shared rotary key.", "Leave --qk-rope-head-dim out.")
    return rope


def _source_rotation(source: CheckpointDescription, rope: MLARope) -> tuple[dict[str, Any], InverseFrequencies]:
    """Return the source's rotary parameters and, where the latent's class gets a table of them, the frequencies."""
    if not rope.rotates:
        return {}, InverseFrequencies(())
    parameters, spec = dict(source.rope[EVERY]), source.attention[0]
    if spec.rotary_ndims is not None:
        raise UsageError(
            f"{source.name} rotates only {spec.rotary_ndims} of each key's {spec.head_dim} dims, which fits no latent "
            "yet."
        )
    parameters.pop("partial_rotary_factor", None)
    if not rope.shares_key:
        return parameters, InverseFrequencies(())
    return parameters, inverse_frequencies(parameters, source.config, spec.head_dim, source.name)


def _target_class(source: CheckpointDescription, request: Request, rope: MLARope, biased: bool) -> MLATargetClass:
    why = f"uptrain has no class that holds a latent of {source.family.model_type} yet"
    for key in source.family.targets.get("mla", ()):
        entry = MLA_TARGET_CLASSES[key]
        refused = [word for word, values in entry.refuses.items() if source.config.get(word) in values]
        if rope not in entry.ropes:
            why = f"{key} can't hold --rope {rope.value}"
        elif (biased and not entry.biased) or refused:
            why = f"{key} has no biases there"
        elif rope not in entry.engines.get(request.engine, ()):
            why = f"{request.engine} can't load {key}" + (f" with --rope {rope.value}" if request.rope else "")
        else:
            return entry
    raise UsageError(f"{source.name} can't become a latent: {why}.", "Use --to gqa or --to mqa.")


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
            f"{budget} values a token leave no latent beside {rotary} rotary ones.",
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


def _spec(
    request: Request, spec: AttentionSpec, rope: MLARope, rank: int, rotary: int, frequencies: InverseFrequencies
) -> MLASpec:
    pairs, heads = spec.head_dim // 2, spec.num_key_value_heads
    every = rope.chooses_pairs and rotary == spec.head_dim * heads
    rope_pairs: tuple[int, ...] = () if rope.chooses_pairs else tuple(range(rotary // 2))
    if every:
        rope_pairs = tuple(pair for pair in range(pairs) for _ in range(heads))
    return MLASpec(
        rope, rank, rotary, 0 if every else spec.head_dim, frequencies.values, rope_pairs, frequencies.attention_factor,
        request.key_weight,
    )  # fmt: skip


def _dtype(source: CheckpointDescription, request: Request) -> str:
    if request.dtype:
        return FLOAT_DTYPES[request.dtype]
    base = source.attention_name(0)
    return next(info.dtype for name, info in source.tensors.items() if name.startswith(base))


def _rescale(entry: MLATargetClass, config: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """Return what the residual stream is multiplied by, and the tensors that do it.

    RMSNorm(αx; α²ε) = RMSNorm(x; ε), so every norm stays what it was under the ε that the target class needs.
    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, section 4 (re-scaling invariance).
    """
    own = float(config.get("rms_norm_eps", 1e-6))
    if entry.rms_norm_eps is None or own == entry.rms_norm_eps:
        return 1.0, {}
    if own <= 0:
        raise UsageError("An rms_norm_eps of 0 can't be kept in a class that shares it with the latent's norm.")
    alpha = (entry.rms_norm_eps / own) ** 0.5
    scales = {f"{module}.{kind}": alpha for module in entry.rescaled for kind in ("weight", "bias")}
    return alpha, scales


def _q_lora_rank(request: Request, entry: MLATargetClass, source: CheckpointDescription) -> int | None:
    hidden = source.hidden_size
    rank = hidden if request.engine == "llama.cpp" and request.q_lora_rank is None else request.q_lora_rank
    if rank is None:
        return None
    if not entry.schema.neutral:
        raise UsageError(f"--q-lora-rank is for {', '.join(_neutral())}; {entry.target.name} has whole queries.")
    if rank > hidden:
        raise UsageError(f"--q-lora-rank {rank} is more than {source.name}'s hidden_size {hidden}.")
    return rank


def _neutral() -> list[str]:
    return [name for name, entry in MLA_TARGET_CLASSES.items() if entry.schema.neutral]


def _attention_config(
    entry: MLATargetClass, source: CheckpointDescription, mla: MLASpec, heads: int, biases: tuple[bool, bool],
    q_lora_rank: int | None,
) -> dict[str, Any]:  # fmt: skip
    keys, spec = entry.family.keys, source.attention[0]
    found: dict[str, Any] = {
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "v_head_dim": spec.v_head_dim or spec.head_dim,
    }
    if keys.num_key_value_heads:
        found[keys.num_key_value_heads] = heads
    if entry.schema.neutral:
        layers = source.value(source.family.keys.num_hidden_layers)
        found |= {"q_lora_rank": q_lora_rank, "first_k_dense_replace": layers}
    elif mla.rope.rotates:
        found |= {
            "rope_mode": "re-rotate" if mla.rope.rotates_expanded else "decoupled",
            "qkv_bias": biases[0],
            "attention_bias": biases[1],
            "attention_scale": spec.head_dim**-0.5,
        }
    return found


def _check_truncated(mla: MLASpec, written: ModelDescription) -> None:
    """Refuse a shared rotary key whose table the target would make another of; yarn's ramp ends with the dims."""
    if not mla.rope.truncates:
        return
    parameters = written.rope[EVERY]
    found = inverse_frequencies(parameters, written.config, mla.qk_rope_head_dim, written.name).values
    if any(abs(one - other) > 1e-6 * other for one, other in zip(found, mla.inverse_frequencies, strict=False)):
        raise UsageError(
            f"{written.name}'s {written.config['rope_parameters']['rope_type']} scaling of its highest frequencies "
            f"can't be written for {mla.qk_rope_head_dim} rotary dims alone.",
            "Raise --qk-rope-head-dim, or use --rope longrope.",
        )


def _set_rotation(mla: MLASpec, config: dict[str, Any], parameters: Mapping[str, Any], head_dim: int = 0) -> None:
    """Write the rotation into a latent's config; for rope pairs that are still to be chosen, the source's for now."""
    if mla.rope.truncates:
        parameters = truncated(parameters, mla.qk_rope_head_dim, head_dim, mla.attention_factor)
    elif mla.rope.chooses_pairs and mla.rope_pairs:
        values = tuple(mla.inverse_frequencies[pair] for pair in mla.rope_pairs)
        longest = int(config.get("max_position_embeddings") or 2048)
        parameters = longrope_table(parameters, values, mla.attention_factor, longest)
    if mla.rope.rotates:
        write_rotation(config, parameters)
