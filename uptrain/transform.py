"""Make one layer's changed attention tensors: read, split into heads, pool, join as the host stores them."""

from __future__ import annotations

import numpy as np

from uptrain.architectures import Position
from uptrain.checkpoint.arrays import Array, cast
from uptrain.checkpoint.reader import Checkpoint
from uptrain.errors import CheckpointError, UsageError
from uptrain.methods.gqa import pool_layer
from uptrain.packing import LayerHeads, join, modules_of, split
from uptrain.plan import Plan
from uptrain.request import CHANGED_PARTS


class LayerMaker:
    """Makes one layer's changed attention tensors from the source's."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self.checkpoint, self.plan = checkpoint, plan
        self._dtypes = {
            (tensor.layer, tensor.module): tensor.info.dtype
            for shard in plan.shards.values()
            for tensor in shard
            if tensor.operation == "attention"
        }

    def make(self, layer: int) -> dict[str, Array]:
        """Return the layer's new tensors by module ("c_attn.weight", …), in the result's dtype.

        Raises:
            CheckpointError: the source's values in this layer are not finite.
        """
        plan, projections = self.plan, self.plan.architecture.projections
        moved = projections != plan.host.architecture.projections
        parts = frozenset("qkvo") if moved else CHANGED_PARTS[plan.request.method]
        base = plan.architecture.layer.format(prefix=plan.prefix, layer=layer)
        names = [f"{m}.{kind}" for m in modules_of(projections, parts) for kind in ("weight", "bias")]
        tensors = {name: self.checkpoint.read(base + name) for name in names if base + name in self.checkpoint.tensors}
        heads = split(projections, plan.before[layer], tensors)
        groups = plan.after[layer].num_key_value_heads
        if groups != plan.before[layer].num_key_value_heads:
            heads = self._shared(heads, groups, layer)
        out = join(plan.host.architecture.projections, plan.after[layer], heads)
        return {name: self._finish(layer, base, name, array) for name, array in out.items()}

    def _shared(self, heads: LayerHeads, groups: int, layer: int) -> LayerHeads:
        request = self.plan.request
        if request.method == "svd":
            return _factored(heads, groups, self.plan.architecture.position, self.plan.before[layer].head_dim)
        std = float(self.checkpoint.config.get("initializer_range") or 0.02)
        return pool_layer(heads, groups, request.method, seed=request.seed, index=layer, std=std)

    def _finish(self, layer: int, base: str, name: str, array: Array) -> Array:
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"Layer {layer} of the source has NaN or infinite values in its attention ({base}{name}).",
                "Nothing useful can be made of it; download the checkpoint again.",
            )
        return np.ascontiguousarray(cast(array, self._dtypes[layer, name], base + name))


def _factored(heads: LayerHeads, groups: int, position: Position, head_dim: int) -> LayerHeads:
    try:
        from uptrain.methods.bridge import factor_layer
        from uptrain.methods.rotary import Rotary
    except ImportError:
        raise UsageError("--method svd needs torch.", "Install it with: pip install 'uptrain[eval]'") from None
    rotary = None
    if position is not Position.ABSOLUTE:
        rotary = Rotary("interleaved" if position is Position.ROTARY_INTERLEAVED else "half", head_dim)
    return factor_layer(heads, groups, rotary)[0]
