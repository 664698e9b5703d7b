"""Plan every tensor of the result, in the order of the source's bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.projections import module_shape, modules_of
from uptrain.checkpoint.dtypes import is_float
from uptrain.checkpoint.header import FLOAT_DTYPES, TensorInfo
from uptrain.conversion.plan.attention import AttentionPlan
from uptrain.conversion.plan.embeddings import shared_outputs
from uptrain.conversion.plan.norms import pooled_norms
from uptrain.conversion.plan.operations import (
    AttentionPart,
    Operation,
    Repair,
    Scale,
    Transpose,
    copy_or_cast,
    new_info,
)
from uptrain.conversion.plan.repairs import repairable_names
from uptrain.conversion.plan.target_tensors import TargetTensors
from uptrain.conversion.request import Request
from uptrain.errors import CheckpointError


@dataclass(frozen=True)
class OutputPlanner:
    """Says what makes each tensor of the result; `attention` is the plan of the attention layers."""

    request: Request
    attention: AttentionPlan

    @property
    def source(self) -> CheckpointDescription:
        """Return the checkpoint."""
        return self.attention.source

    @cached_property
    def _tensors(self) -> TargetTensors:
        return TargetTensors(self.source, self.attention.target)

    @cached_property
    def _repaired(self) -> frozenset[str]:
        """Return the names of the source's tensors outside attention that calibration may change."""
        repairs = self.request.repairs_blocks and self.attention.changes_heads
        return repairable_names(self.source) if repairs else frozenset()

    def operations(self) -> Iterator[Operation]:
        """Yield what makes the result's tensors, in the order of the source's bytes.

        Raises:
            CheckpointError: a tensor is missing, or is not what the config promises.
        """
        special = self._special()
        placed: set[int] = set()
        for name, info in self.source.tensors.items():
            if any(name.endswith(f".{buffer}") for buffer in self.source.family.buffers):
                continue
            operations = special.get(name)
            if operations is None:
                yield self._passed(name, info)
            elif id(operations) not in placed:
                placed.add(id(operations))
                yield from operations

    def _special(self) -> dict[str, list[Operation]]:
        """Map each source tensor that is not just passed on to what it becomes.

        Tensors of one layer share one list, which is written where the first of them stands.
        """
        attention, norms, moved = self._attention(), self._norms(), self._tensors.outputs(self._dtype)
        zeros = self._tensors.zeros(self._dtype)
        special = dict(shared_outputs(self.source, self.attention.target, self.attention.stores_head, self._passed))
        for name, added in zeros.items():
            special[name] = [*(special.get(name) or [self._passed(name, self.source.tensors[name])]), *added]
        return {**special, **attention, **moved, **norms}

    def _norms(self) -> dict[str, list[Operation]]:
        """Map each norm weight that is pooled to what it becomes: nothing for those that go into an earlier one."""
        out: dict[str, list[Operation]] = {}
        if self.attention.pools_norms:
            for norm in pooled_norms(self.source, self.attention.after, self.request.chosen_method, self._dtype):
                out |= {**{name: [] for name in norm.sources}, norm.source: [norm]}
        return out

    def _attention(self) -> dict[str, list[Operation]]:
        """Map each source tensor that goes into a changed layer to all that the layer becomes."""
        attention, family = self.attention, self.source.family
        parts = attention.changed_parts(self.request)
        out: dict[str, list[Operation]] = {}
        for layer, before in enumerate(self.source.attention):
            base = self.source.attention_name(layer)
            base_after = attention.target.family.attention(self._tensors.prefix, layer)
            modules = modules_of(family.projections, frozenset("qkvo"))
            present = {module: self._check(base, module, before) for module in modules}
            if not attention.changes_heads and not attention.changes_storage:
                continue
            made: list[Operation] = []
            for part in attention.parts(layer, parts, present):
                first = f"{base}{part.origin}.weight"
                output = new_info(base_after + part.name, self._dtype(self.source.tensors[first].dtype), part.shape)
                made.append(AttentionPart(output=output, sources=(first,), layer=layer, module=part.name))
            changed = modules_of(family.projections, parts)
            out.update(
                dict.fromkeys((f"{base}{module}.{kind}" for module in changed for kind in present[module]), made)
            )
        return out

    def _check(self, base: str, module: str, spec: AttentionSpec) -> list[str]:
        """Return which of weight and bias the source's module has, after checking their shapes."""
        projections = self.source.family.projections
        expected = module_shape(projections, spec, module, self.source.hidden_size)
        info = self.source.tensors.get(f"{base}{module}.weight")
        if info is None:
            raise CheckpointError(f"Tensor {base}{module}.weight is missing.", "Download the checkpoint again.")
        if info.shape != expected:
            raise CheckpointError(
                f"Tensor {info.name} is {list(info.shape)} where config.json promises {list(expected)}."
            )
        bias = self.source.tensors.get(f"{base}{module}.bias")
        rows = expected[1] if projections.transposed else expected[0]
        if bias is not None and (bias.shape != (rows,) or not is_float(bias.dtype)):
            raise CheckpointError(f"Tensor {bias.name} is {bias.dtype} {list(bias.shape)}, not {rows} floating values.")
        if info.dtype not in FLOAT_DTYPES.values():
            raise CheckpointError(f"Tensor {info.name} is {info.dtype}, not floating values.", "Is it quantized?")
        return ["weight"] if bias is None else ["weight", "bias"]

    def _passed(self, name: str, info: TensorInfo) -> Operation:
        """Return what makes a tensor outside attention that keeps its place: a copy, or a simple change of values."""
        target = self.attention.target
        turned = len(info.shape) == 2 and any(name.endswith(f"{module}.weight") for module in target.transposes)
        shape = info.shape[::-1] if turned else info.shape
        output = new_info(self._tensors.named(name), self._dtype(info.dtype), shape)
        for ending, factor in self.attention.scales.items():
            if name == ending or name.endswith(f".{ending}"):
                return Scale(output=output, sources=(name,), factor=factor)
        if turned:
            return Transpose(output=output, sources=(name,))
        return Repair(output=output, sources=(name,)) if name in self._repaired else copy_or_cast(output, info)

    def _dtype(self, dtype: str) -> str:
        return FLOAT_DTYPES[self.request.dtype] if self.request.dtype and is_float(dtype) else dtype
