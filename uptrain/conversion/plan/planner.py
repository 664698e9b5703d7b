"""The plan of a conversion: every output tensor, shard and byte, before a byte of the weights is read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from uptrain.architectures.attention import AttentionSpec, cache_bytes_per_token
from uptrain.architectures.description import CheckpointDescription, ModelDescription, describe_checkpoint
from uptrain.architectures.embeddings import declare
from uptrain.architectures.running_dtype import cached_itemsize
from uptrain.architectures.validation import DTYPE_KEYS
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.plan.attention import AttentionPlan
from uptrain.conversion.plan.checks import check_inside, check_listed, check_method, method_notes
from uptrain.conversion.plan.heads import plan_heads
from uptrain.conversion.plan.mla import plan_mla
from uptrain.conversion.plan.operations import AttentionPart, Operation
from uptrain.conversion.plan.outputs import OutputPlanner
from uptrain.conversion.plan.quantized import check_quantized, check_target
from uptrain.conversion.plan.sharding import into_shards
from uptrain.conversion.request import Request
from uptrain.errors import UsageError
from uptrain.models.target import TargetClass
from uptrain.models.targets import OF_THE_FOLDER, own_target

PLAN_FORMAT = 3
"""Raised whenever the same request gives other bytes or another digest, so that no run resumes across the change.

3: the rows of the digest are those of `Operation`; the bytes are those of format 2.
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A planned conversion: all but the bytes.

    - `request`: what the user asks.
    - `source`: the checkpoint.
    - `attention`: what becomes of the attention layers, and the class that holds the result.
    - `config`: the config of the language model in the result.
    - `shards`: by file, the operations that make its tensors.
    - `digest`: decides whether an unfinished run can be continued; empty where the source isn't on this machine.
    - `notes`: what the user must know before the plan runs.
    """

    request: Request
    source: CheckpointDescription
    attention: AttentionPlan
    config: dict[str, Any]
    shards: dict[str, list[Operation]]
    digest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def target(self) -> TargetClass:
        """Return the class that holds the result."""
        return self.attention.target

    @property
    def before(self) -> tuple[AttentionSpec, ...]:
        """Return the source's attention, layer by layer."""
        return self.source.attention

    @property
    def after(self) -> tuple[AttentionSpec, ...]:
        """Return the result's attention, layer by layer."""
        return self.attention.after

    @property
    def copied_head(self) -> bool:
        """Whether the result's head is a copy of the embedding that the source ties it to."""
        return self.attention.stores_head and self.source.embeddings.tied

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
        """Estimate the bytes that one thread needs: a layer in its own dtype and in float32, and buffers."""
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
        raise UsageError(f"{name} has a latent already.", "Convert the model it was made from.")
    check_quantized(source, request)
    attention = plan_mla(source, request) if request.kind.latent else plan_heads(source, request)
    check_target(source, attention.target, attention.renames_modules)
    attention.check_tensors()
    config = attention.write_config()
    if request.dtype:
        _set_dtype(config, request.dtype)
    declare(config, source.embeddings, source.family, attention.target.family, attention.own_head)
    operations = list(OutputPlanner(request, attention).operations())
    shards = into_shards(operations, checkpoint, request.max_shard_size)
    plan = Plan(request=request, source=source, attention=attention, config=config, shards=shards)
    plan = replace(plan, notes=method_notes(plan.source, request, plan.before != plan.after))
    return replace(plan, digest=plan_digest(plan, checkpoint))


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key in [key for key in DTYPE_KEYS if key in config] or ["dtype"]:
        config[key] = dtype


def plan_digest(plan: Plan, checkpoint: Checkpoint) -> str:
    """Digest all that decides the result's bytes, with the current sizes and times of the source's files."""
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
