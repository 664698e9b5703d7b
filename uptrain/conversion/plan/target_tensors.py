"""Plan the tensors outside attention for the class of another family: new names, folded norms, added biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.model_class import is_language_model
from uptrain.architectures.rope import partly_rotated
from uptrain.architectures.rope_parameters import EVERY, TYPES, rotated_dims, write_rotation
from uptrain.checkpoint.header import TensorInfo
from uptrain.conversion.plan.operations import Constant, FoldNormBias, FoldNormWeight, Operation, Shift, new_info
from uptrain.errors import CheckpointError, UsageError
from uptrain.models.target import TargetClass


@dataclass(frozen=True)
class TargetTensors:
    """Plans what the tensors of `source` outside attention become in the class `target`."""

    source: CheckpointDescription
    target: TargetClass

    @property
    def prefix(self) -> str:
        """Return the prefix of the body's names in the target class."""
        family, prefix = self.source.family, self.source.prefix
        if self.target.family is family:
            return prefix
        return self.target.family.prefixes[family.prefixes.index(prefix)]

    def named(self, name: str) -> str:
        """Return the target class's name of a tensor outside attention."""
        if self.source.prefix and name.startswith(self.source.prefix):
            name = self.prefix + name.removeprefix(self.source.prefix)
        dotted = f".{name}"
        for old, new in self.target.renames.items():
            dotted = dotted.replace(f".{old}.", f".{new}.")
        return dotted[1:]

    def outputs(self, dtype: Callable[[str], str]) -> dict[str, list[Operation]]:
        """Map each source tensor that the class wants changed to what it becomes; `dtype` returns the result's dtype.

        Raises:
            CheckpointError: a norm that moves into a linear, or that linear, is missing.
        """
        out: dict[str, list[Operation]] = {}
        for module, addend in self.target.shifts.items():
            for name, info in self.source.tensors.items():
                if f".{name}".endswith(f".{module}.weight"):
                    output = new_info(self.named(name), dtype(info.dtype), info.shape)
                    out[name] = [Shift(output=output, sources=(name,), addend=addend)]
        for block in map(self.source.block_name, range(len(self.source.attention))):
            for linear, norm in self.target.folds.items():
                out.update(self._folded(block + linear, block + norm, dtype))
            if self.target.attention_norm:
                out.update(self._neutral(block + self.target.attention_norm, dtype))
        return out

    def zeros(self, dtype: Callable[[str], str]) -> dict[str, list[Operation]]:
        """Map the token embedding to the tensors of zeros that the class has: one value per row of the embedding.

        Raises:
            CheckpointError: the embedding is missing.
        """
        headed = is_language_model(self.source.config)
        needed = [zero for zero in self.target.zeros if headed or not zero.startswith("lm_head.")]
        missing = [zero for zero in needed if zero not in self.source.tensors]
        if not missing:
            return {}
        embeddings = self.source.embeddings
        info = self._info(embeddings.table or embeddings.own_table)
        outputs = [new_info(zero, dtype(info.dtype), info.shape[:1]) for zero in missing]
        return {info.name: [Constant(output=output, sources=(info.name,), value=0) for output in outputs]}

    def _folded(self, linear: str, norm: str, dtype: Callable[[str], str]) -> dict[str, list[Operation]]:
        source = self._info(f"{linear}.weight")
        for info in (self._info(f"{norm}.{kind}") for kind in ("weight", "bias")):
            if len(source.shape) != 2 or info.shape != source.shape[1:]:
                raise CheckpointError(f"Tensor {info.name} is {list(info.shape)}, not the width of {source.name}.")
        weight, bias = f"{linear}.weight", f"{linear}.bias"
        has_bias = bias in self.source.tensors
        folded_weight = FoldNormWeight(
            output=new_info(self.named(weight), dtype(source.dtype), source.shape), sources=(weight, f"{norm}.weight")
        )
        folded_bias = FoldNormBias(
            output=new_info(self.named(bias), dtype(source.dtype), source.shape[:1]),
            sources=(weight, f"{norm}.bias", *([bias] if has_bias else [])),
        )
        made: dict[str, list[Operation]] = {weight: [folded_weight]}
        made.setdefault(bias if has_bias else weight, []).append(folded_bias)
        return {**made, f"{norm}.weight": [], f"{norm}.bias": []}

    def _neutral(self, norm: str, dtype: Callable[[str], str]) -> dict[str, list[Operation]]:
        out: dict[str, list[Operation]] = {}
        for kind, value in (("weight", 1), ("bias", 0)):
            info = self._info(f"{norm}.{kind}")
            output = new_info(self.named(info.name), dtype(info.dtype), info.shape)
            out[info.name] = [Constant(output=output, sources=(info.name,), value=value)]
        return out

    def _info(self, name: str) -> TensorInfo:
        info = self.source.tensors.get(name)
        if info is None:
            raise CheckpointError(f"Tensor {name} is missing.", "Download the checkpoint again.")
        return info


def rotate_as_before(config: dict[str, Any], target: TargetClass, source: CheckpointDescription) -> None:
    """Write the rotation of a source's config into the config of a target class of another family.

    Raises:
        UsageError: an odd number of dims is rotated, which classes round differently, or an unknown rope type.
    """
    parameters: Mapping[str, Any] = source.rope[EVERY]
    spec = source.attention[0]
    if parameters["rope_type"] not in TYPES:
        raise UsageError(
            f"{source.name} has rope_type {parameters['rope_type']}, which {target.family.class_name} doesn't know.",
            f"It knows {', '.join(TYPES)}.",
        )
    rotated, spread = rotated_dims(source.family, parameters, spec.head_dim, source.name)
    if source.family.keys.rotary_ndims:
        rotated = spread = spec.rotary_ndims or spec.head_dim
    parameters = partly_rotated(parameters, rotated or spec.head_dim, spread, spec.head_dim)
    write_rotation(config, parameters, target.older_ropes)
