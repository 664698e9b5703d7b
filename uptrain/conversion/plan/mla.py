"""Plan a latent: its sizes, the class that holds it, its config, and what else in the model must change for that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from uptrain.architectures.description import CheckpointDescription, ModelDescription
from uptrain.architectures.mla_projections import MLASpec, MLAStorage, join_latent, latent_shapes
from uptrain.architectures.mla_rope import MLARope
from uptrain.architectures.projections import LayerHeads, module_of
from uptrain.architectures.rope import InverseFrequencies, inverse_frequencies, longrope_table, truncated
from uptrain.architectures.rope_parameters import EVERY, write_rotation
from uptrain.checkpoint.dtypes import Array
from uptrain.checkpoint.header import FLOAT_DTYPES
from uptrain.conversion.plan.attention import AttentionPlan, LayerWork, PartShape, PlannedRotation
from uptrain.conversion.plan.mla_sizes import plan_sizes
from uptrain.conversion.request import Request
from uptrain.errors import UsageError
from uptrain.models.mla_targets import MLA_TARGET_CLASSES, MLATargetClass, latent_config
from uptrain.models.targets import result_class


@dataclass(frozen=True, kw_only=True)
class MLAPlan(AttentionPlan):
    """One latent per token in place of the key/value heads.

    - `entry`: what the target class can hold.
    - `spec`: the latent's sizes and rotary pairs.
    - `stored`: how the target class stores a layer.
    - `config`: the config of the language model in the result, its class not yet named.
    - `biased`, `output_bias`: whether the source's q, k and v have biases, and whether its output projection has.
    - `alpha`: what the residual stream is multiplied by.
    - `rescaled`: by the end of a tensor's name outside attention, what the tensor is multiplied by for that.
    """

    entry: MLATargetClass
    spec: MLASpec
    stored: MLAStorage
    config: dict[str, Any]
    biased: bool
    output_bias: bool
    alpha: float = 1.0
    rescaled: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def label(self) -> str:
        """Return mla and the cached values per token."""
        return f"mla{self.after[0].cache_values_per_token}"

    @property
    def sizes(self) -> Mapping[str, int]:
        """Return the sizes of the latent and of the heads that it expands to."""
        names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        return {name: getattr(self.after[0], name) for name in names}

    @property
    def recorded(self) -> Mapping[str, Any]:
        """Return the latent's sizes, its rotation and the residual stream's factor."""
        return {
            "latent": {
                **self.sizes,
                "q_lora_rank": self.stored.q_lora_rank,
                "rope": self.spec.rope.recorded,
                "slots": self.spec.rope_pairs,
                "residual_scale": self.alpha,
            }
        }

    @property
    def changes_heads(self) -> bool:
        """Whether heads change: always."""
        return True

    @property
    def changes_storage(self) -> bool:
        """Whether the projections are stored otherwise: always."""
        return True

    @property
    def renames_modules(self) -> bool:
        """Whether the attention has other modules: always."""
        return True

    @property
    def writes_rotation(self) -> bool:
        """Whether keys rotate."""
        return self.spec.rope.rotates

    @property
    def rotation(self) -> PlannedRotation | None:
        """Return the source's inverse frequencies and the shared rotary key's."""
        spec = self.spec
        if not spec.inverse_frequencies:
            return None
        written = tuple(spec.inverse_frequencies[pair] for pair in spec.rope_pairs)
        return PlannedRotation(
            source=InverseFrequencies(spec.inverse_frequencies, spec.attention_factor),
            result=InverseFrequencies(written, spec.attention_factor),
        )

    @property
    def chooses_rope_pairs(self) -> bool:
        """Whether the rotary pairs are chosen by what unrotated pairs would cost, and are not chosen yet."""
        return self.spec.rope.chooses_pairs and not self.spec.rope_pairs

    @property
    def scales(self) -> Mapping[str, float]:
        """Return what writes the residual stream, which is scaled."""
        return self.rescaled

    def with_rope_pairs(self, choose: Callable[[MLASpec], tuple[int, ...]]) -> MLAPlan:
        """Return the plan with its rotary pairs chosen and their table in the config."""
        if not self.chooses_rope_pairs:
            return self
        spec = replace(self.spec, rope_pairs=choose(self.spec))
        config = dict(self.config)
        _set_rotation(spec, config, self.config["rope_parameters"])
        return replace(self, spec=spec, config=config)

    def check_tensors(self) -> None:
        """Refuse nothing: a latent moves no heads that other tensors count."""

    def write_config(self) -> dict[str, Any]:
        """Return the config, with the class that holds the result.

        Raises:
            UsageError: there is no such class for the source's purpose.
        """
        return {**self.config, "architectures": [result_class(self.target, self.source)]}

    def parts(self, layer: int, changed: Iterable[str], present: Mapping[str, list[str]]) -> Iterator[PartShape]:
        """Yield all tensors of the latent layer, in the place of the source's keys."""
        origin = module_of(self.source.family.projections, "k")
        hidden = self.source.hidden_size
        shapes = latent_shapes(self.stored, self.after[layer], hidden, self.biased, self.output_bias)
        for name, shape in shapes.items():
            yield PartShape(name, shape, origin)

    def convert(self, heads: LayerHeads, layer: int, work: LayerWork) -> dict[str, Array]:
        """Return the layer as a latent, as the target class stores it."""
        return join_latent(work.compress(heads, self.spec, layer), self.stored, self.source.attention[layer].head_dim)


def plan_mla(source: CheckpointDescription, request: Request) -> MLAPlan:
    """Plan the latent that `request` asks of a checkpoint.

    Raises:
        UsageError: no class holds it, or its sizes don't go together.
    """
    spec = source.attention[0]
    biases = source.attention_biases
    rope = _rope(request, source)
    entry = _target_class(source, request, rope, any(biases))
    if any(layer.sliding_window for layer in source.attention):
        raise UsageError(
            f"{source.name} has sliding windows, which no MLA target class holds yet.", "Use --to gqa or --to mqa."
        )
    parameters, frequencies = _source_rotation(source, rope)
    mla = plan_sizes(request, source, rope, frequencies)
    dtype = FLOAT_DTYPES[request.dtype] if request.dtype else source.attention_dtype
    if dtype not in entry.dtypes:
        raise UsageError(
            f"{entry.target.name} has a norm on the latent that weights of 1e-9 turn off; float16 can't hold them.",
            "Add --dtype bfloat16 or float32.",
        )
    alpha, rescaled = _rescale(entry, source.config)
    q_lora_rank = _q_lora_rank(request, entry, source)
    schema = replace(entry.schema, per_query=not rope.rotates_expanded)
    heads = spec.num_attention_heads if schema.per_query else spec.num_key_value_heads
    sizes = mla.kv_lora_rank, mla.qk_rope_head_dim, mla.qk_nope_head_dim, heads
    written = latent_config(entry, source)
    written.update(_attention_config(entry, source, mla, heads, biases, q_lora_rank))
    _set_rotation(mla, written, parameters, spec.head_dim)
    _check_truncated(mla, ModelDescription(family=entry.family, config=written, name=source.name))
    return MLAPlan(
        source=source, target=entry.target, after=tuple(layer.latent(*sizes) for layer in source.attention),
        own_head=entry.untied, entry=entry, spec=mla, stored=MLAStorage(schema, alpha, q_lora_rank), config=written,
        biased=biases[0], output_bias=biases[1], alpha=alpha, rescaled=rescaled,
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


def _rescale(entry: MLATargetClass, config: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """Return what the residual stream is multiplied by, and the tensors that do it.

    RMSNorm(αx; α²ε) = RMSNorm(x; ε), so every norm stays what it was under the ε that the target class needs.
    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, section 4 (re-scaling invariance).
    """
    own = float(config.get("rms_norm_eps", 1e-6))
    if entry.rms_norm_eps is None or own == entry.rms_norm_eps:
        return 1.0, {}
    if own <= 0:
        raise UsageError(
            "rms_norm_eps is 0, which a class that shares it with the norm of its latent can't have.",
            "Use --to gqa or --to mqa.",
        )
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
            f"{written.name}'s {written.config['rope_parameters']['rope_type']} scaling of its highest inverse "
            f"frequencies can't be written for {mla.qk_rope_head_dim} rotary dims alone.",
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
