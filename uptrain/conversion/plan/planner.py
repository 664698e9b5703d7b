"""Know every output tensor, shard and byte before a byte of the weights is read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from uptrain.architectures.attention import AttentionSpec, cache_bytes_per_token
from uptrain.architectures.description import CheckpointDescription, ModelDescription, describe_checkpoint, write_groups
from uptrain.architectures.embeddings import declare
from uptrain.architectures.head_order import check_order
from uptrain.architectures.mla_projections import latent_shapes
from uptrain.architectures.model_class import is_language_model
from uptrain.architectures.projections import module_of, module_shape, modules_of
from uptrain.architectures.running_dtype import cached_itemsize
from uptrain.architectures.validation import DTYPE_KEYS
from uptrain.checkpoint.dtypes import is_float
from uptrain.checkpoint.header import FLOAT_DTYPES, TensorInfo
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.plan.checks import check_effects, check_groups, check_inside, check_listed, check_method
from uptrain.conversion.plan.embeddings import shared_outputs
from uptrain.conversion.plan.mla import LatentPlan, plan_latent
from uptrain.conversion.plan.norms import pooled_norms
from uptrain.conversion.plan.operations import AttentionPart, Operation, Scale, Transpose, copy_or_cast, new_info
from uptrain.conversion.plan.quantized import check_quantized, check_target
from uptrain.conversion.plan.sharding import into_shards
from uptrain.conversion.plan.target_tensors import TargetTensors, rotate_as_before
from uptrain.conversion.request import Request, resolve_groups
from uptrain.errors import CheckpointError, UsageError
from uptrain.models.target import TargetClass
from uptrain.models.targets import OF_THE_FOLDER, choose_target, own_target, result_class, target_config

PLAN_FORMAT = 3
"""Raised whenever the same request gives other bytes or another digest, so that no run resumes across the change.

3: the rows of the digest are those of `Operation`; the bytes are those of format 2.
"""


@dataclass(frozen=True)
class Plan:
    """A conversion, complete but for the bytes."""

    request: Request
    source: CheckpointDescription
    target: TargetClass
    after: tuple[AttentionSpec, ...]
    config: dict[str, Any]
    """The config of the language model in the result."""
    shards: dict[str, list[Operation]]
    digest: str
    latent: LatentPlan | None = None
    copied_head: bool = False
    """Whether the result's head is a copy of the embedding that the source ties it to."""
    notes: tuple[str, ...] = ()
    """What the user is to know before it runs."""

    @property
    def before(self) -> tuple[AttentionSpec, ...]:
        """Return the source's attention, layer by layer."""
        return self.source.attention

    @property
    def result(self) -> ModelDescription:
        """Return what the config of the language model in the result says."""
        return ModelDescription(family=self.target.family, config=self.config, name=f"the result of {self.source.name}")

    @property
    def whole_config(self) -> dict[str, Any]:
        """Return the result's config.json."""
        if self.source.tower is None:
            return self.config
        whole = self.source.tower.around(self.config)
        return {key: value for key, value in whole.items() if key not in OF_THE_FOLDER}

    @property
    def holder(self) -> str:
        """Return the model type that the result's config.json names."""
        return self.source.wrapped_in or self.target.name

    @property
    def operations(self) -> Iterator[Operation]:
        """Yield what makes each tensor of the result, shard by shard."""
        return chain.from_iterable(self.shards.values())

    @property
    def attention_parts(self) -> Iterator[AttentionPart]:
        """Yield what makes each tensor of the changed attention layers."""
        return (operation for operation in self.operations if isinstance(operation, AttentionPart))

    @property
    def chooses_rope_pairs(self) -> bool:
        """Whether the rotary pairs of a latent are still to be chosen, by what unrotated pairs would cost."""
        return self.latent is not None and self.latent.pairs_to_choose

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all output tensors."""
        return sum(operation.output.nbytes for operation in self.operations)

    @property
    def changed(self) -> int:
        """Count the output tensors whose values differ from the source's by more than rounding."""
        return sum(operation.changes for operation in self.operations)

    @property
    def itemsize(self) -> int:
        """Return the bytes a cached value takes when the model runs in its own dtype."""
        return cached_itemsize(self.config, (operation.output.dtype for operation in self.operations))

    @property
    def cache_before(self) -> int:
        """Return the source's cache bytes per token."""
        return cache_bytes_per_token(self.before, self.itemsize)

    @property
    def cache_after(self) -> int:
        """Return the result's cache bytes per token."""
        return cache_bytes_per_token(self.after, self.itemsize)

    @property
    def peak_memory(self) -> int:
        """Estimate the bytes of memory that one worker needs: a layer in fp32 beside its own dtype, and buffers."""
        layers: Counter[int] = Counter()
        for part in self.attention_parts:
            layers[part.layer] += part.output.nbytes
        whole = max((operation.memory for operation in self.operations), default=0)
        ratio = max(1, self.before[0].num_key_value_heads // self.after[0].num_key_value_heads)
        return max(whole, max(layers.values(), default=0) * (ratio + 4)) + 16 * 2**20

    def weight_map(self) -> dict[str, str]:
        """Return the index's map from tensor name to shard file."""
        return {each.output.name: shard for shard, operations in self.shards.items() for each in operations}


def make_plan(checkpoint: Checkpoint, request: Request, name: str) -> Plan:
    """Plan the conversion of an open checkpoint; `name` is what the user called it.

    Raises:
        UsageError: the family, groups or dtype make it impossible.
        CheckpointError: the config and the tensors don't fit each other.
    """
    source = describe_checkpoint(checkpoint, name)
    check_inside(source, request)
    check_method(source, request)
    check_listed(source)
    before = source.attention
    if before[0].kind == "mla":
        raise UsageError(f"{name} keeps a latent already.", "Convert the model it was made from.")
    check_quantized(source, request)
    if request.kind.latent:
        return _latent_plan(source, request)
    groups = resolve_groups(request, before[0], name)
    same = groups == before[0].num_key_value_heads
    check_effects(request, groups, before[0].num_key_value_heads, name)
    target = choose_target(source, "mqa" if groups == 1 else "gqa", same)
    if not same:
        check_groups(source, target.family, groups)
    check_target(source, target, False)
    after = tuple(spec.grouped(groups) for spec in before)
    if request.chosen_grouping.moves and not same:
        check_order(source)
    config = target_config(target, source.config) if target.family is not source.family or not same else None
    config = _as_it_is(target, source.config) if config is None else config
    if not same or target.family is not source.family:
        write_groups(target.family, config, groups)
        config["architectures"] = [result_class(target, source)]
    if target.rotary:
        rotate_as_before(config, target, source)
    if request.dtype:
        _set_dtype(config, request.dtype)
    declare(config, source.embeddings, source.family, target.family)
    planner = _Planner(source, request, target, after, same)
    shards = into_shards(list(planner.outputs()), checkpoint, request.max_shard_size)
    plan = Plan(request, source, target, after, config, shards, "")
    return replace(plan, digest=plan_digest(plan, checkpoint))


def _as_it_is(target: TargetClass, config: Mapping[str, Any]) -> dict[str, Any]:
    # A name of code or weights that the source gives doesn't go along, as its file doesn't.
    own = target_config(target, config)
    kept = {key: value for key, value in config.items() if key not in OF_THE_FOLDER}
    return {**kept, "auto_map": own["auto_map"]} if "auto_map" in own else kept


def _latent_plan(source: CheckpointDescription, request: Request) -> Plan:
    latent = plan_latent(source, request)
    config, target = dict(latent.config), latent.entry.target
    check_target(source, target, True)
    config["architectures"] = [result_class(target, source)]
    if request.dtype:
        _set_dtype(config, request.dtype)
    declare(config, source.embeddings, source.family, target.family, latent.entry.untied)
    # Classes for other purposes have no head to make of the embedding.
    untied = latent.entry.untied and is_language_model(source.config)
    planner = _Planner(source, request, target, latent.after, False, latent, untied)
    shards = into_shards(list(planner.outputs()), source.checkpoint, request.max_shard_size)
    copied = untied and source.embeddings.tied
    plan = Plan(request, source, target, latent.after, config, shards, "", latent, copied)
    return replace(plan, digest=plan_digest(plan, source.checkpoint))


@dataclass(frozen=True)
class _Planner:
    source: CheckpointDescription
    request: Request
    target: TargetClass
    after: tuple[AttentionSpec, ...]
    same: bool
    latent: LatentPlan | None = None
    untied: bool = False

    def outputs(self) -> Iterator[Operation]:
        """Yield the result's tensors in the order of the source's bytes."""
        attention, norms, moved = self._attention(), self._norms(), self._target_tensors().outputs(self._dtype)
        zeros = self._target_tensors().zeros(self._dtype)
        shared = shared_outputs(self.source, self.target, self.untied, self._passed)
        placed: set[int] = set()
        for name, info in self.source.tensors.items():
            if any(name.endswith(f".{buffer}") for buffer in self.source.family.buffers):
                continue
            if name in norms:
                norm = norms[name]
                yield from [norm] if norm else []
                continue
            if name in moved:
                yield from moved[name]
                continue
            if name not in attention:
                yield from shared.get(name) or [self._passed(name, info)]
                yield from zeros.get(name, ())
                continue
            layer, outputs = attention[name]
            if layer in placed:
                continue
            yield from outputs
            placed.add(layer)

    def _attention(self) -> dict[str, tuple[int, list[Operation]]]:
        """Map each source tensor that goes into a changed layer to the layer and all that it becomes."""
        source, target = self.source.family, self.target.family
        moved = source.projections != target.projections or self.latent is not None
        parts = frozenset("qkvo") if moved else self.request.changed_parts
        out: dict[str, tuple[int, list[Operation]]] = {}
        for layer, (before, after) in enumerate(zip(self.source.attention, self.after, strict=True)):
            base = self.source.attention_name(layer)
            modules = modules_of(source.projections, frozenset("qkvo"))
            present = {module: self._check(base, module, before) for module in modules}
            if self.same and not moved:
                continue
            taken = modules_of(source.projections, parts)
            if self.latent is None:
                outputs = list(self._layer_outputs(layer, parts, after, present))
            else:
                outputs = list(self._latent_outputs(layer, after, self.latent))
            names = [f"{base}{module}.{kind}" for module in taken for kind in present[module]]
            out.update(dict.fromkeys(names, (layer, outputs)))
        return out

    def _target_tensors(self) -> TargetTensors:
        return TargetTensors(self.source, self.target)

    def _norms(self) -> dict[str, Operation | None]:
        """Map each norm weight that is pooled to what it becomes, None for those that go into an earlier one."""
        if self.same or self.latent is not None:
            return {}
        out: dict[str, Operation | None] = {}
        for norm in pooled_norms(self.source, self.after, self.request.chosen_method, self._dtype):
            out |= {**dict.fromkeys(norm.sources), norm.source: norm}
        return out

    def _layer_outputs(
        self, layer: int, parts: frozenset[str], spec: AttentionSpec, present: dict[str, list[str]]
    ) -> Iterator[Operation]:
        source, target = self.source.family, self.target.family
        base = target.attention(self._target_tensors().prefix, layer)
        for module in modules_of(target.projections, parts):
            part = next(part for part in "qkvo" if module_of(target.projections, part) == module)
            origin = module_of(source.projections, part)
            rows, columns = module_shape(target.projections, spec, module, self.source.hidden_size)
            out_features = columns if target.projections.transposed else rows
            first = self.source.attention_name(layer) + origin + ".weight"
            dtype = self._dtype(self.source.tensors[first].dtype)
            for kind in ("weight", "bias") if self.target.biased else present[origin]:
                shape = (rows, columns) if kind == "weight" else (out_features,)
                output, name = new_info(f"{base}{module}.{kind}", dtype, shape), f"{module}.{kind}"
                yield AttentionPart(output=output, sources=(first,), layer=layer, module=name)

    def _latent_outputs(self, layer: int, spec: AttentionSpec, latent: LatentPlan) -> Iterator[Operation]:
        base = self.target.family.attention(self.source.prefix, layer)
        origin = module_of(self.source.family.projections, "k")
        first = self.source.attention_name(layer) + origin + ".weight"
        dtype = self._dtype(self.source.tensors[first].dtype)
        shapes = latent_shapes(latent.stored, spec, self.source.hidden_size, latent.biased, latent.output_bias)
        for name, shape in shapes.items():
            output = new_info(base + name, dtype, shape)
            yield AttentionPart(output=output, sources=(first,), layer=layer, module=name)

    def _check(self, base: str, module: str, spec: AttentionSpec) -> list[str]:
        """Return which of weight and bias the source's module has, after checking their shapes."""
        expected = module_shape(self.source.family.projections, spec, module, self.source.hidden_size)
        info = self.source.tensors.get(f"{base}{module}.weight")
        if info is None:
            raise CheckpointError(f"Tensor {base}{module}.weight is missing.", "Download the checkpoint again.")
        if info.shape != expected:
            raise CheckpointError(
                f"Tensor {info.name} is {list(info.shape)} where config.json promises {list(expected)}."
            )
        bias = self.source.tensors.get(f"{base}{module}.bias")
        rows = expected[1] if self.source.family.projections.transposed else expected[0]
        if bias is not None and (bias.shape != (rows,) or not is_float(bias.dtype)):
            raise CheckpointError(f"Tensor {bias.name} is {bias.dtype} {list(bias.shape)}, not {rows} floating values.")
        if info.dtype not in FLOAT_DTYPES.values():
            raise CheckpointError(f"Tensor {info.name} is {info.dtype}, not floating values.", "Is it quantized?")
        return ["weight"] if bias is None else ["weight", "bias"]

    def _passed(self, name: str, info: TensorInfo) -> Operation:
        turned = any(name.endswith(f"{module}.weight") for module in self.target.transposes)
        if len(info.shape) != 2:
            turned = False
        shape = info.shape[::-1] if turned else info.shape
        output = new_info(self._target_tensors().named(name), self._dtype(info.dtype), shape)
        scales = self.latent.scales if self.latent else {}
        for ending, factor in scales.items():
            if name == ending or name.endswith(f".{ending}"):
                return Scale(output=output, sources=(name,), factor=factor)
        return Transpose(output=output, sources=(name,)) if turned else copy_or_cast(output, info)

    def _dtype(self, dtype: str) -> str:
        return FLOAT_DTYPES[self.request.dtype] if self.request.dtype and is_float(dtype) else dtype


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key in [key for key in DTYPE_KEYS if key in config] or ["dtype"]:
        config[key] = dtype


def plan_digest(plan: Plan, checkpoint: Checkpoint) -> str:
    """Digest all that decides the result's bytes, the source files' sizes and times included, as they are now."""
    if checkpoint.remote:
        return ""  # nothing can be resumed from a plan whose source isn't here
    stats = [(name, (checkpoint.path / name).stat()) for name in checkpoint.files]
    material = {
        "format": PLAN_FORMAT,
        "request": plan.request.recorded(),
        "host": plan.target.name,
        "config": plan.whole_config,
        "source": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "shards": {name: [each.digest_row for each in operations] for name, operations in plan.shards.items()},
    }
    text = json.dumps(material, sort_keys=True, ensure_ascii=False).encode()
    return hashlib.sha256(text).hexdigest()


def result_attention(checkpoint: Checkpoint, name: str) -> tuple[TargetClass, tuple[AttentionSpec, ...]]:
    """Return the target class and attention of a checkpoint as it stands."""
    source = describe_checkpoint(checkpoint, name)
    return own_target(source.family), source.attention
