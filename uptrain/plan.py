"""Know every output tensor, shard and byte before a byte of the weights is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from uptrain.attention import AttentionSpec, cache_bytes_per_token
from uptrain.checkpoint.arrays import is_float
from uptrain.checkpoint.header import FLOAT_DTYPES, ITEM_BITS, TensorInfo
from uptrain.checkpoint.reader import Checkpoint
from uptrain.errors import CheckpointError, UsageError
from uptrain.frequencies import partly_rotated
from uptrain.hosts.host import Host
from uptrain.hosts.table import host_config, host_of, own_host
from uptrain.latent_packing import latent_shapes
from uptrain.layout import Architecture
from uptrain.model_config import DTYPE_KEYS, architecture_of, attention_layers, config_value, set_attention
from uptrain.packing import module_of, module_shape, modules_of
from uptrain.plan_checks import check_effects, check_groups, check_method
from uptrain.plan_latent import HEAD, LatentPlan, plan_latent
from uptrain.plan_norms import pooled_norms
from uptrain.plan_rehost import Rehost
from uptrain.plan_tensors import OutputTensor
from uptrain.request import Request, resolve_groups
from uptrain.running_dtype import cached_itemsize

PLAN_FORMAT = 2
"""Raised whenever the same request would give other bytes, so that no run resumes across the change."""


@dataclass(frozen=True)
class Plan:
    """A conversion, complete but for the bytes."""

    request: Request
    architecture: Architecture
    host: Host
    prefix: str
    before: tuple[AttentionSpec, ...]
    after: tuple[AttentionSpec, ...]
    config: dict[str, Any]
    shards: dict[str, list[OutputTensor]]
    digest: str
    latent: LatentPlan | None = None

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all output tensors."""
        return sum(tensor.info.nbytes for shard in self.shards.values() for tensor in shard)

    @property
    def changed(self) -> int:
        """Count the output tensors that aren't plain copies."""
        return sum(tensor.operation != "copy" for shard in self.shards.values() for tensor in shard)

    @property
    def itemsize(self) -> int:
        """Return the bytes a cached value takes when the model runs in its own dtype."""
        return cached_itemsize(self.config, (t.info.dtype for shard in self.shards.values() for t in shard))

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
        layers: dict[int, int] = {}
        whole = 0
        for tensor in (tensor for shard in self.shards.values() for tensor in shard):
            if tensor.operation == "fold":
                whole = max(whole, 4 * tensor.info.nbytes)
            if tensor.operation == "attention":
                layers[tensor.layer] = layers.get(tensor.layer, 0) + tensor.info.nbytes
        ratio = max(1, self.before[0].num_key_value_heads // self.after[0].num_key_value_heads)
        return max(whole, max(layers.values(), default=0) * (ratio + 4)) + 16 * 2**20

    def weight_map(self) -> dict[str, str]:
        """Return the index's map from tensor name to shard file."""
        return {tensor.info.name: shard for shard, tensors in self.shards.items() for tensor in tensors}


def make_plan(checkpoint: Checkpoint, request: Request, name: str) -> Plan:
    """Plan the conversion of an open checkpoint; `name` is what the user called it.

    Raises:
        UsageError: the family, groups or dtype make it impossible.
        CheckpointError: the config and the tensors don't fit each other.
    """
    architecture = architecture_of(checkpoint.config, name)
    check_method(architecture, checkpoint.config, request, name)
    before = attention_layers(architecture, checkpoint.config, name)
    if before[0].kind == "mla":
        raise UsageError(f"{name} keeps a latent already.", "Convert the model it was made from.")
    if request.target == "mla":
        return _latent_plan(checkpoint, request, architecture, before, name)
    groups = resolve_groups(request, before[0], name)
    same = groups == before[0].num_key_value_heads
    check_effects(request, groups, before[0].num_key_value_heads, name)
    host = host_of(architecture, "mqa" if groups == 1 else "gqa", checkpoint.config, same)
    if not same:
        check_groups(architecture, host.architecture, checkpoint.config, groups, name)
    after = tuple(spec.grouped(groups) for spec in before)
    prefix = find_prefix(architecture, checkpoint, name)
    config = host_config(host, checkpoint.config) if host.architecture is not architecture or not same else None
    config = _as_it_is(host, checkpoint.config) if config is None else config
    if not same or host.architecture is not architecture:
        set_attention(host.architecture, config, groups)
    if host.rotary:
        spec = before[0]
        rotated = spec.head_dim if spec.rotary_ndims is None else spec.rotary_ndims
        config["rope_parameters"] = partly_rotated(checkpoint.config, host.theta, rotated, spec.head_dim)
    if request.dtype:
        _set_dtype(config, request.dtype)
    planner = _Planner(checkpoint, request, architecture, host, prefix, before, after, same)
    shards = _into_shards(list(planner.outputs()), checkpoint, request.max_shard_size)
    plan = Plan(request, architecture, host, prefix, before, after, config, shards, "")
    return replace(plan, digest=plan_digest(plan, checkpoint))


def _as_it_is(host: Host, config: Mapping[str, Any]) -> dict[str, Any]:
    # A result is for classes we know: a name of code that the source gives doesn't go along, as its file doesn't.
    own = host_config(host, config)
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    return {**kept, "auto_map": own["auto_map"]} if "auto_map" in own else kept


def _latent_plan(
    checkpoint: Checkpoint, request: Request, architecture: Architecture, before: tuple[AttentionSpec, ...], name: str
) -> Plan:
    prefix = find_prefix(architecture, checkpoint, name)
    base = architecture.attention(prefix, 0)
    latent = plan_latent(checkpoint, request, architecture, before, base, name)
    config = dict(latent.config)
    if request.dtype:
        _set_dtype(config, request.dtype)
    host = latent.entry.host
    planner = _Planner(checkpoint, request, architecture, host, prefix, before, latent.after, False, latent)
    shards = _into_shards(list(planner.outputs()), checkpoint, request.max_shard_size)
    plan = Plan(request, architecture, host, prefix, before, latent.after, config, shards, "", latent)
    return replace(plan, digest=plan_digest(plan, checkpoint))


def find_prefix(architecture: Architecture, checkpoint: Checkpoint, name: str) -> str:
    """Return which of the family's key prefixes this checkpoint uses.

    Raises:
        CheckpointError: no tensor has the family's names.
    """
    module = module_of(architecture.projections, "o")
    for prefix in architecture.prefixes:
        if architecture.attention(prefix, 0) + module + ".weight" in checkpoint.tensors:
            return prefix
    wanted = architecture.attention(architecture.prefixes[0], 0) + module + ".weight"
    raise CheckpointError(
        f"{name} says it is {architecture.model_type} but has no tensor {wanted}.",
        "Is it an adapter, or quantised? Convert the full-precision original.",
    )


@dataclass(frozen=True)
class _Planner:
    checkpoint: Checkpoint
    request: Request
    architecture: Architecture
    host: Host
    prefix: str
    before: tuple[AttentionSpec, ...]
    after: tuple[AttentionSpec, ...]
    same: bool
    latent: LatentPlan | None = None

    def outputs(self) -> Iterator[OutputTensor]:
        """Yield the result's tensors in the order of the source's bytes."""
        attention, norms, rehosted = self._attention(), self._norms(), self._rehost().outputs(self._dtype)
        placed: set[int] = set()
        for name, info in self.checkpoint.tensors.items():
            if any(name.endswith(f".{buffer}") for buffer in self.architecture.buffers):
                continue
            if name in norms:
                norm = norms[name]
                yield from [norm] if norm else []
                continue
            if name in rehosted:
                yield from rehosted[name]
                continue
            if name not in attention:
                if self.latent is not None and self.latent.head_of:
                    if name == HEAD:
                        continue  # a copy of the embedding, which is made below
                    if name.endswith(self.latent.head_of):
                        head = TensorInfo(HEAD, self._dtype(info.dtype), info.shape, "", -1, -1)
                        yield OutputTensor(head, "copy", name)
                yield self._passed(name, info)
                continue
            layer, outputs = attention[name]
            if layer in placed:
                continue
            yield from outputs
            placed.add(layer)

    def _attention(self) -> dict[str, tuple[int, list[OutputTensor]]]:
        """Map each source tensor that goes into a changed layer to the layer and all that it becomes."""
        source, host = self.architecture, self.host.architecture
        moved = source.projections != host.projections or self.latent is not None
        parts = frozenset("qkvo") if moved else self.request.changed_parts
        out: dict[str, tuple[int, list[OutputTensor]]] = {}
        for layer, (before, after) in enumerate(zip(self.before, self.after, strict=True)):
            base = source.attention(self.prefix, layer)
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

    def _rehost(self) -> Rehost:
        return Rehost(self.checkpoint, self.architecture, self.host, self.prefix, len(self.before))

    def _norms(self) -> dict[str, OutputTensor | None]:
        """Map each norm weight that is pooled to what it becomes, None for those that go into an earlier one."""
        if self.same or self.latent is not None:
            return {}
        out: dict[str, OutputTensor | None] = {}
        for norm in pooled_norms(self.checkpoint, self.architecture, self.prefix, self.before, self.after):
            first = norm.sources[0]
            info = TensorInfo(norm.name, self._dtype(self.checkpoint.tensors[first].dtype), norm.shape, "", -1, -1)
            out |= {**dict.fromkeys(norm.sources), first: OutputTensor(info, "pool", first, norm=norm)}
        return out

    def _layer_outputs(
        self, layer: int, parts: frozenset[str], spec: AttentionSpec, present: dict[str, list[str]]
    ) -> Iterator[OutputTensor]:
        source, host = self.architecture, self.host.architecture
        base = host.attention(self._rehost().prefix, layer)
        for module in modules_of(host.projections, parts):
            part = next(part for part in "qkvo" if module_of(host.projections, part) == module)
            origin = module_of(source.projections, part)
            hidden = self._hidden_size()
            rows, columns = module_shape(host.projections, spec, module, hidden)
            out_features = columns if host.projections.transposed else rows
            first = source.attention(self.prefix, layer) + origin + ".weight"
            dtype = self._dtype(self.checkpoint.tensors[first].dtype)
            for kind in ("weight", "bias") if self.host.biased else present[origin]:
                shape = (rows, columns) if kind == "weight" else (out_features,)
                info = TensorInfo(f"{base}{module}.{kind}", dtype, shape, "", -1, -1)
                yield OutputTensor(info, "attention", first, layer, f"{module}.{kind}")

    def _latent_outputs(self, layer: int, spec: AttentionSpec, latent: LatentPlan) -> Iterator[OutputTensor]:
        base = self.host.architecture.attention(self.prefix, layer)
        origin = module_of(self.architecture.projections, "k")
        first = self.architecture.attention(self.prefix, layer) + origin + ".weight"
        dtype = self._dtype(self.checkpoint.tensors[first].dtype)
        shapes = latent_shapes(latent.stored, spec, self._hidden_size(), latent.biased, latent.output_bias)
        for name, shape in shapes.items():
            yield OutputTensor(TensorInfo(base + name, dtype, shape, "", -1, -1), "attention", first, layer, name)

    def _check(self, base: str, module: str, spec: AttentionSpec) -> list[str]:
        """Return which of weight and bias the source's module has, after checking their shapes."""
        expected = module_shape(self.architecture.projections, spec, module, self._hidden_size())
        info = self.checkpoint.tensors.get(f"{base}{module}.weight")
        if info is None:
            raise CheckpointError(f"Tensor {base}{module}.weight is missing.", "Download the checkpoint again.")
        if info.shape != expected:
            raise CheckpointError(
                f"Tensor {info.name} is {list(info.shape)} where config.json promises {list(expected)}."
            )
        bias = self.checkpoint.tensors.get(f"{base}{module}.bias")
        rows = expected[1] if self.architecture.projections.transposed else expected[0]
        if bias is not None and (bias.shape != (rows,) or not is_float(bias.dtype)):
            raise CheckpointError(f"Tensor {bias.name} is {bias.dtype} {list(bias.shape)}, not {rows} floating values.")
        if not is_float(info.dtype) or ITEM_BITS[info.dtype] < 16:
            raise CheckpointError(
                f"Tensor {info.name} is {info.dtype}: quantised checkpoints can't be pooled.",
                "Convert the full-precision original and quantise the result.",
            )
        return ["weight"] if bias is None else ["weight", "bias"]

    def _hidden_size(self) -> int:
        key = self.architecture.keys.hidden_size
        return config_value(self.architecture, self.checkpoint.config, key, "config.json")

    def _passed(self, name: str, info: TensorInfo) -> OutputTensor:
        if self.request.dtype and is_float(info.dtype) and ITEM_BITS[info.dtype] < 16:
            raise UsageError(
                f"Tensor {name} is {info.dtype}, whose values mean nothing without their scales, so --dtype "
                f"{self.request.dtype} can't widen it.",
                "Leave --dtype out.",
            )
        turned = any(name.endswith(f"{module}.weight") for module in self.host.transposes)
        if len(info.shape) != 2:
            turned = False
        shape = info.shape[::-1] if turned else info.shape
        new = TensorInfo(self._rehost().named(name), self._dtype(info.dtype), shape, "", -1, -1)
        scales = self.latent.scales if self.latent else {}
        for ending, factor in scales.items():
            if name == ending or name.endswith(f".{ending}"):
                return OutputTensor(new, "scale", name, factor=factor)
        return OutputTensor(new, "transpose" if turned else "copy", name)

    def _dtype(self, dtype: str) -> str:
        return FLOAT_DTYPES[self.request.dtype] if self.request.dtype and is_float(dtype) else dtype


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key in [key for key in DTYPE_KEYS if key in config] or ["dtype"]:
        config[key] = dtype


def _into_shards(
    outputs: list[OutputTensor], checkpoint: Checkpoint, limit: int | None
) -> dict[str, list[OutputTensor]]:
    """Group the outputs: as the source is sharded, or in order up to `limit` bytes a shard."""
    _check_outputs(outputs, checkpoint)
    groups: list[list[OutputTensor]] = []
    if limit is None:
        by_file: dict[str, list[OutputTensor]] = {name: [] for name in checkpoint.files}
        for output in outputs:
            by_file[checkpoint.tensors[output.source].file].append(output)
        groups = [group for group in by_file.values() if group]
    else:
        size = 0
        for output in outputs:
            if not groups or size + output.info.nbytes > limit:
                groups.append([])
                size = 0
            groups[-1].append(output)
            size += output.info.nbytes
    return dict(zip(_shard_names(len(groups)), groups, strict=True))


def _check_outputs(outputs: list[OutputTensor], checkpoint: Checkpoint) -> None:
    seen: set[str] = set()
    for output in outputs:
        if output.info.name in seen:
            raise CheckpointError(f"Two tensors of the source would both become {output.info.name}.")
        seen.add(output.info.name)
        source = checkpoint.tensors[output.source]
        if output.operation in ("scale", "shift", "pool", "fold") and not is_float(source.dtype):
            raise CheckpointError(f"Tensor {source.name} is {source.dtype}, where floating values are needed.")


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def plan_digest(plan: Plan, checkpoint: Checkpoint) -> str:
    """Digest all that decides the result's bytes, the source files' sizes and times included, as they are now."""
    if checkpoint.remote:
        return ""  # nothing can be resumed from a plan whose source isn't here
    stats = [(name, (checkpoint.path / name).stat()) for name in checkpoint.files]
    material = {
        "format": PLAN_FORMAT,
        "request": plan.request.recorded(),
        "host": plan.host.name,
        "config": plan.config,
        "source": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "shards": {name: [_row(tensor) for tensor in tensors] for name, tensors in plan.shards.items()},
    }
    text = json.dumps(material, sort_keys=True, ensure_ascii=False).encode()
    return hashlib.sha256(text).hexdigest()


def _row(tensor: OutputTensor) -> Iterable[Any]:
    return (
        tensor.info.name, tensor.info.dtype, tensor.info.shape, tensor.operation, tensor.source, tensor.factor,
    )  # fmt: skip


def result_attention(checkpoint: Checkpoint, name: str) -> tuple[Host, tuple[AttentionSpec, ...]]:
    """Return the host and attention of a checkpoint as it stands."""
    architecture = architecture_of(checkpoint.config, name)
    return own_host(architecture), attention_layers(architecture, checkpoint.config, name)
