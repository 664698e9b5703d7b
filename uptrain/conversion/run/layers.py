"""Make one layer's changed attention tensors: read, split into heads, pool, join as the target class stores them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import TypeVar

import numpy as np

from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.mla_projections import LatentHeads, MLASpec
from uptrain.architectures.projections import LayerHeads, read_layer
from uptrain.architectures.schema import Position
from uptrain.checkpoint.dtypes import Array, as_float32, cast
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.plan import rewrites
from uptrain.conversion.plan.planner import Plan
from uptrain.conversion.plan.repairs import repairable
from uptrain.errors import CheckpointError, needing
from uptrain.methods import energy_numpy, head_similarity
from uptrain.methods.method import CalibratedSource, Converted, ExplainedEnergy, LayerContext

Made = TypeVar("Made", LayerHeads, LatentHeads)

NEEDS_TORCH = "--method svd, --grouping similar or --to mla"
"""What stands on torch, which pooling does without, in the words of an error."""


DIAGNOSED_PER_BYTE = 1.0
DIAGNOSED_AT_LEAST = 1e8
"""How many multiplications a conversion that only pools may spend on measuring its loss, per byte of the result and at
least. That is about a thirtieth of the time that writing takes."""
MEASURABLE = 1e15
"""The largest weight whose energy float32 can add up."""


class LayerMaker:
    """Makes one layer's changed attention tensors from the source's.

    `energy` gathers, by layer and method, the share of key and value energy that the method explains or would explain.
    `orders` has, by layer, the source's key/value heads in the result's order, where they moved.

    - `checkpoint`: the open source.
    - `plan`: what is made of it.
    - `calibrated`: the layers that a calibration made, None where weights alone decide.
    - `diagnose`: measure every layer, also what pooling does not need: the energy that the other method would explain
      and, in `similarity`, the similarity of the heads that are merged. Without it, pooling measures a part of one
      layer, with at most `DIAGNOSED_PER_BYTE` multiplications per byte of the result.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, calibrated: CalibratedSource | None = None, diagnose: bool = False
    ) -> None:
        self.checkpoint, self.plan, self.calibrated, self.diagnose = checkpoint, plan, calibrated, diagnose
        self.energy: dict[int, dict[str, dict[str, float]]] = {}
        self.similarity: dict[int, dict[str, dict[str, float]]] = {}
        self.orders: dict[int, list[int]] = {}
        self._uses_torch = plan.request.needs_torch
        self._sample = len(plan.before) // 2
        self._pool_only = bool(plan.source.why_keys_pool)
        self._repaired = {
            name: layer
            for layer in range(len(plan.before) if plan.request.repairs_blocks else 0)
            for name in repairable(plan.source, layer).values()
        }
        self._dtypes = {(part.layer, part.module): part.output.dtype for part in plan.attention_parts}

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Let torch give each layer one thread while the block runs.

        Several layers are made at a time, and sums over more threads would round otherwise.
        """
        with _one_thread() if self._dtypes and self._uses_torch else nullcontext():
            yield

    def make(self, layer: int) -> dict[str, Array]:
        """Return the layer's new tensors by module ("c_attn.weight", …), in the result's dtype.

        Raises:
            CheckpointError: the source's values in this layer are not finite.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at below
            return self._make(layer)

    def _make(self, layer: int) -> dict[str, Array]:
        plan, base = self.plan, self.plan.source.attention_name(layer)
        parts = plan.attention.changed_parts(plan.request)
        heads = read_layer(self.checkpoint, plan.source.family.projections, plan.before[layer], base, parts)
        out = plan.attention.convert(heads, layer, self)
        return {name: self._finish(layer, base, name, array) for name, array in out.items()}

    def read(self, name: str) -> Array:
        """Return a tensor outside attention: the source's, or what calibration made of it, in float32."""
        layer = self._repaired.get(name)
        found = None if self.calibrated is None or layer is None else self.calibrated.other(layer, name)
        return self.checkpoint.read(name) if found is None else found

    def fit(self, heads: LayerHeads, layer: int) -> LayerHeads:
        """Fit heads as the source's class sees them to the target class's."""
        source, target, spec = self.plan.source.family, self.plan.target, self.plan.before[layer]
        if target.attention_norm:
            norm = self.plan.source.block_name(layer) + target.attention_norm
            scale, shift = (self.read(f"{norm}.{kind}") for kind in ("weight", "bias"))
            heads = rewrites.fold_into_heads(heads, scale, shift)
        if source.position is Position.ROTARY_INTERLEAVED and target.family.position is Position.ROTARY:
            heads = rewrites.half_split(heads, spec.head_dim if spec.rotary_ndims is None else spec.rotary_ndims)
        return rewrites.with_biases(heads) if target.biased else heads

    def _context(self, layer: int) -> LayerContext:
        source = self.plan.source
        return LayerContext(
            index=layer,
            position=source.family.position,
            spec=self.plan.before[layer],
            normed_keys=source.key_norm is not None,
            seed=self.plan.request.chosen_seed,
            initializer_std=lambda: source.initializer_std,
            calibrated=self.calibrated,
        )

    def share(self, heads: LayerHeads, groups: int, layer: int) -> LayerHeads:
        """Return the layer with `groups` key/value heads, by the request's grouping and method."""
        request, context = self.plan.request, self._context(layer)
        method, arrange = request.chosen_method, request.chosen_grouping.arrange
        if method.convert is None:
            raise ValueError(f"--method {method.name} shares no heads")
        if arrange is None:
            self._compare(heads, groups, layer)
        if self._uses_torch:
            self._check_finite(heads, layer)
        with needing(NEEDS_TORCH):
            if arrange is not None:
                heads, order = arrange(heads, groups, context)
                if order is not None:
                    self.orders[layer] = order
                self._compare(heads, groups, layer)
            elif method.estimated and not self._pool_only:
                self._estimate(heads, groups, layer)
            return self._recorded(method.convert(heads, groups, context), layer)

    def _recorded(self, made: Converted[Made], layer: int) -> Made:
        """Return a converted layer, after recording the energy that methods explain in it, where it was measured.

        Raises:
            TypeError: the method returns something else than `Converted`.
        """
        if not isinstance(made, Converted):
            raise TypeError(
                f"--method {self.plan.request.method} returned a {type(made).__name__} for layer {layer}. Return "
                "Converted(layer)."
            )
        if made.explained:
            self.energy[layer] = _known({name: _rounded(each) for name, each in made.explained.items()})
        return made.layer

    def _compare(self, heads: LayerHeads, groups: int, layer: int) -> None:
        """Record the similarity of the heads that are merged, where `diagnose` asks for it."""
        if self.diagnose and _all_measurable(heads, groups):
            spec, position = self.plan.before[layer], self.plan.source.family.position
            self.similarity[layer] = head_similarity.head_similarity(heads, groups, position, spec, not self._pool_only)

    def _estimate(self, heads: LayerHeads, groups: int, layer: int) -> None:
        """Record the energy of a layer that `mean` explains, and that svd would explain."""
        spec, measured = self.plan.before[layer], groups
        if not self.diagnose:
            if layer != self._sample:
                return
            budget = max(DIAGNOSED_AT_LEAST, DIAGNOSED_PER_BYTE * self.plan.total_bytes)
            each = energy_numpy.cost(
                spec.num_key_value_heads // groups, spec.head_dim, heads.part("k").weight.shape[-1]
            )
            measured = min(groups, int(budget // each))
        found = _estimated(heads, groups, measured, self.plan.source.family.position, spec.rotary_ndims)
        if found:
            self.energy[layer] = found

    def compress(self, heads: LayerHeads, spec: MLASpec, layer: int) -> LatentHeads:
        """Return the layer as a latent of `spec`, by the request's method."""
        method = self.plan.request.chosen_method
        make = method.convert_latent
        if make is None:
            raise ValueError(f"--method {method.name} makes no latent")
        if self._uses_torch:
            self._check_finite(heads, layer)
        with needing(NEEDS_TORCH):
            return self._recorded(make(heads, spec, self._context(layer)), layer)

    def _check_finite(self, heads: LayerHeads, layer: int) -> None:
        for part in map(heads.part, "qkvo"):
            for array in (part.weight, part.bias):
                if array is not None and not np.isfinite(as_float32(array)).all():
                    raise self._not_finite(layer)

    def _finish(self, layer: int, base: str, name: str, array: Array) -> Array:
        request = self.plan.request
        if not (request.allow_nonfinite and request.pools) and not np.isfinite(array).all():
            raise self._not_finite(layer)
        return np.ascontiguousarray(cast(array, self._dtypes[layer, name], base + name))

    def _not_finite(self, layer: int) -> CheckpointError:
        base = self.plan.source.attention_name(layer)
        names = [name for name in self.checkpoint.tensors if name.startswith(base)]
        found = [name for name in names if not np.isfinite(as_float32(self.checkpoint.read(name))).all()]
        return CheckpointError(
            f"Layer {self.plan.source.family.place(layer)} of the source has NaN or infinite values in "
            f"{', '.join(found) or 'its attention'}.",
            "Download the checkpoint again, or keep them with --allow-nonfinite and --method mean or first.",
        )


def choose_by_weights(checkpoint: Checkpoint, source: CheckpointDescription, latent: MLASpec) -> tuple[int, ...]:
    """Return which of the source's inverse frequencies each rotary pair of a latent gets, by all layers' weights."""
    with needing(NEEDS_TORCH):
        from uptrain.methods.head_conversion import rotary_of
        from uptrain.methods.mla_conversion import rope_pairs_by_weights
    family = source.family
    layers = (
        read_layer(checkpoint, family.projections, spec, source.attention_name(layer))
        for layer, spec in enumerate(source.attention)
    )
    return rope_pairs_by_weights(layers, latent, rotary_of(family.position, source.attention[0]))


def _one_thread() -> AbstractContextManager[None]:
    with needing(NEEDS_TORCH):
        from uptrain.methods.head_conversion import one_thread
    return one_thread()


def _estimated(
    heads: LayerHeads, groups: int, measured: int, position: Position, rotary_ndims: int | None
) -> dict[str, dict[str, float]]:
    """Return the share of key and value energy that `mean` explains and that svd would explain, by method.

    - `heads`: the layer's heads as they are.
    - `groups`: how many heads are to stay of keys and of values.
    - `measured`: of how many groups, the first ones, this is measured; nothing is returned for none.
    - `position`: what tells attention where a token stands.
    - `rotary_ndims`: how many dims of a key rotate, None for all of them where `position` rotates.
    """

    def explained_keys(rows: Array) -> float:
        if not position.rotates or rotary_ndims == 0:
            return energy_numpy.explained_by_factor(rows, 1)
        interleaved = position is Position.ROTARY_INTERLEAVED
        return energy_numpy.explained_by_phases(rows, 1, interleaved, rotary_ndims or rows.shape[1])

    if not measured:
        return {}
    means, bests = [], []
    for part in "kv":
        found = []
        for rows in islice(energy_numpy.rows_by_group(heads.part(part), groups), measured):
            if not _measurable(rows):
                return {}  # what isn't finite is refused with its name when the layer is finished
            best = explained_keys(rows) if part == "k" else energy_numpy.explained_by_factor(rows, 1)
            found.append((energy_numpy.energy(rows), energy_numpy.explained_by_mean(rows, 1), best))
        energy, mean, best = np.array(found).T
        means.append(float(np.average(mean, weights=energy)))
        bests.append(float(np.average(best, weights=energy)))
    return _known({"mean": _rounded(ExplainedEnergy(*means)), "svd": _rounded(ExplainedEnergy(*bests))})


def _all_measurable(heads: LayerHeads, groups: int) -> bool:
    return all(_measurable(rows) for part in "kv" for rows in energy_numpy.rows_by_group(heads.part(part), groups))


def _measurable(rows: Array) -> bool:
    return bool(np.abs(rows).max(initial=0) < MEASURABLE)


def _known(explained: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    # Values near the largest of their dtype have no finite energy, and JSON can't express it.
    return {name: shares for name, shares in explained.items() if all(map(math.isfinite, shares.values()))}


def _rounded(share: ExplainedEnergy) -> dict[str, float]:
    # The last digits depend on how many threads summed, and the manifest must not.
    return {"keys": round(share.keys, 4), "values": round(share.values, 4)}
