"""Share a layer's heads under the statistics of calibration text, and measure what each method explains of them."""

from __future__ import annotations

from torch import Tensor, outer

from uptrain.conversion.calibration.statistics import Moments
from uptrain.methods.energy import LayerWeights, layer_weights, output_energy, rotated_energy, weighted_energy
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.low_rank import damped
from uptrain.methods.method import Converted, ExplainedEnergy
from uptrain.methods.rotary import Rotary
from uptrain.methods.shared_heads import (
    DAMPING,
    SharedRows,
    absorb,
    expand,
    pooled_rows,
    share_keys,
    share_values,
    spans_of,
)

CENTRED = 0.95
"""Share of the keys' mean that is taken out of their moment: softmax does not see what all keys have in common."""


def share_layer(layer: HeadMaps, groups: int, position: Rotary | None, moments: Moments) -> Converted[HeadMaps]:
    """Convert a layer to `groups` key/value heads by the factorisation under `moments`.

    The energy that `calibrated`, `svd` and `mean` explain is measured in these weights, in which `calibrated` is the
    best.

    - `layer`: the layer's projections by head, float64, the heads of each group next to each other.
    - `groups`: how many key/value heads the result has.
    - `position`: which key dims are rotated, None where keys see no rotation.
    - `moments`: the layer's statistics.
    """
    spans = spans_of(layer.kv_heads, groups)
    query_energy = moments.queries if position is None else rotated_energy(moments.queries, position)
    value_energy = output_energy(layer)
    plain = layer_weights(layer, position, None)
    key_sums = _ExplainedSums(
        layer.k_rows, query_energy,
        svd=expand([share_keys(layer, plain, span, position) for span in spans]),
        mean=pooled_rows(layer.k_rows, groups, "mean"),
    )  # fmt: skip
    value_sums = _ExplainedSums(
        layer.v_rows, value_energy,
        svd=expand([share_values(layer, plain, span) for span in spans]),
        mean=pooled_rows(layer.v_rows, groups, "mean"),
    )  # fmt: skip
    keys, values = [], []
    # A group at a time: its damped moments are as large as those that are held for all.
    for span, of_keys, of_values in zip(spans, moments.keys, moments.values, strict=True):
        weights = LayerWeights(query_energy, value_energy, damped(_centred(of_keys), DAMPING))
        keys.append(share_keys(layer, weights, span, position))
        key_sums.add(span, keys[-1], weights.second_moment)
        weights = LayerWeights(query_energy, value_energy, damped(of_values, DAMPING))
        values.append(share_values(layer, weights, span))
        value_sums.add(span, values[-1], weights.second_moment)
    names = ("calibrated", "svd", "mean")
    explained = {name: ExplainedEnergy(key_sums.share(name), value_sums.share(name)) for name in names}
    return Converted(absorb(layer, keys, values), explained)


class _ExplainedSums:
    """Adds up, group by group, what methods explain of the weighted energy of `rows` (G₀, D, d̃)."""

    def __init__(self, rows: Tensor, weights: Tensor, **approximations: Tensor) -> None:
        """Begin with the rows' weights and with their approximations by each method but the calibrated.

        - `rows`: (G₀, D, d̃), the heads' maps of x̃.
        - `weights`: (G₀, D, D).
        - `approximations`: (G₀, D, d̃) each, by the method's name.
        """
        self._rows, self._weights, self._approximations = rows, weights, approximations
        self._total, self._lost = 0.0, dict.fromkeys(("calibrated", *approximations), 0.0)

    def add(self, span: range, calibrated: SharedRows, moment: Tensor | None) -> None:
        """Add the heads in `span`, which share `calibrated`, under their group's second moment (d̃, d̃)."""
        heads = list(span)
        rows, weights = self._rows[heads], self._weights[heads]
        self._total += weighted_energy(rows, weights, moment)
        found = {name: rows_of[heads] for name, rows_of in self._approximations.items()}
        found["calibrated"] = expand([calibrated])
        for name, approximation in found.items():
            self._lost[name] += weighted_energy(rows - approximation, weights, moment)

    def share(self, name: str) -> float:
        """Return the share that a method explains."""
        return 1.0 - self._lost[name] / self._total if self._total > 0 else 1.0


def _centred(moment: Tensor) -> Tensor:
    """Take most of the mean's part out of a moment (d̃, d̃) of x̃ = [x; 1]; its last entry is the total weight."""
    total = moment[-1, -1]
    mean = moment[-1] / total
    return moment - CENTRED * total * outer(mean, mean)
