"""Fit a shared rotary key and a latent to a layer's logits and output, over the distances that attention spans."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uptrain.methods.distance_kernel import DistanceKernel
from uptrain.methods.energy import output_energy
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.low_rank import damped
from uptrain.methods.method import ExplainedEnergy
from uptrain.methods.mla_energy import LatentMoments, map_columns
from uptrain.methods.mla_latent import LatentFit, Side, TwoMoments
from uptrain.methods.rotary import Rotary
from uptrain.methods.shared_heads import DAMPING

ROUNDS = 12
"""Alternations of the shared rotary key and its queries before the latent is fitted with them."""
JOINT_ROUNDS = 10
"""Alternations with the latent, at most."""
LATENT_SHARE = 0.1
"""What a unit of unrotated energy costs before the latent is known: the latent will lose a part of it."""
RIDGE = 1e-8
"""What is added to the diagonal of the small equations, relative to its mean."""


@dataclass(frozen=True)
class RotaryFit:
    """A shared rotary key, the queries for it, and the latent.

    - `key`: (Dr, d̃), the shared rotary key's map, the two dims of a rope pair neighbours.
    - `factors`: (H, D, Dr); a query q reads the rotary key by factorsᵀ q.
    - `latent`: the latent's map and what expands it, for each query head.
    """

    key: Tensor
    factors: Tensor
    latent: LatentFit


class RotaryProblem:
    """A layer whose keys become one shared rotary key S x̃ and a latent A x̃ that sees no rotation.

    What is minimised is Σ_h E[(qᵀR_Δ k − (F_hᵀ q)ᵀ R'_Δ S x̃ − qᵀ B_h A x̃)²], R' the rotation of the shared rotary
    key, plus the error of the output by the values V_g A x̃. Queries, keys and distances count as independent. What
    all keys of a row have in common is left out, because softmax does not see it. Each step is a least squares
    problem with the other parts fixed, so no round raises the error. The D dims are in the order of `order`: pairs
    are neighbours.

    The rotary key needs no rope pair of its own for each of the source's: a pair may be read at any angle near its own,
    and several may be mixed in one. The kernel of distances says what each costs.

    Source: Meng et al. 2025, TransMLA, section 4, folds neighbouring pairs; here all pairs, with the distances' kernel.
    """

    def __init__(self, layer: HeadMaps, pairs: tuple[int, ...], position: Rotary, moments: LatentMoments) -> None:
        """Begin.

        - `layer`: the source's layer, float64.
        - `pairs`: which of the source's rope pairs each pair of the shared rotary key has.
        - `position`: how the source's keys rotate: in every dim.
        - `moments`: of the layer's queries and inputs, and the distances.

        Raises:
            ValueError: the moments have no inverse frequencies.
        """
        if moments.inverse_frequencies is None:
            raise ValueError("a shared rotary key needs rotary positions")
        self.order = torch.stack(position.indices(), dim=1).flatten()
        self._dims = len(self.order)
        columns = map_columns(layer)
        self._per = layer.queries_per_kv
        self._keys = layer.k_rows[:, self.order, columns]
        self._queries = moments.queries[:, self.order][:, :, self.order]
        self._values = Side(layer.v_rows[..., columns], output_energy(layer))
        frequencies = torch.cat([moments.inverse_frequencies, moments.inverse_frequencies[list(pairs)]])
        stacked = Rotary("interleaved", 2 * len(frequencies))
        self._kernel = DistanceKernel.of(stacked, frequencies, moments.distances)
        self._means = _mean_rotations(self._kernel.means)
        sigma, self._mean = moments.of_keys(columns)
        self._sigma = damped(sigma, DAMPING)
        self._solved = torch.linalg.solve(self._sigma, self._mean)
        self._read = self._keys @ self._sigma
        self._centred = self._sigma - torch.outer(self._mean, self._mean)
        self._two = TwoMoments.of(self._centred, damped(moments.values[columns, columns], DAMPING))

    def rotary(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shared rotary key (Dr, d̃) and its queries' factors (H, D, Dr), alternated from a `key`."""
        factors = self.fit_factors(key, None)
        for _ in range(ROUNDS):
            key = self.fit_key(factors, None)
            factors = self.fit_factors(key, None)
        return key, factors

    def fit(self, key: Tensor, factors: Tensor, rank: int, key_weight: float) -> tuple[RotaryFit, ExplainedEnergy]:
        """Return the fit of a latent and of a shared rotary key, and the energy that they explain.

        - `key`, `factors`: where to begin.
        - `rank`: the latent's size.
        - `key_weight`: weight of a share of key energy relative to a share of value energy.
        """
        totals = self._totals(key)
        values = Side(self._values.rows, self._values.weights * (totals[0] / (totals[1] * key_weight)))
        best = RotaryFit(key, factors, self._two.start(self._rest(key, factors), values, rank))
        best = RotaryFit(key, factors, self._two.expand(best.latent.down, self._rest(key, factors), values))
        lost = self.lost(best, values)
        for _ in range(JOINT_ROUNDS):
            current = self._round(best, values)
            after = self.lost(current, values)
            if not sum(after) < sum(lost):
                break
            best, lost = current, after
        return best, ExplainedEnergy(1 - lost[0] / totals[0], 1 - lost[1] * key_weight / totals[0])

    def lost(self, fit: RotaryFit, values: Side) -> tuple[float, float]:
        """Return the error of the keys, and of `values`."""
        averaged, unturned = self._averaged(fit.key)
        reading = self._reading(fit.factors)
        unseen = float((self._queries * (reading @ (averaged - unturned) @ reading.mT)).sum())
        of_keys, of_values = self._two.lost(fit.latent, self._rest(fit.key, fit.factors), values)
        return unseen + of_keys, of_values

    def cost(self, key: Tensor, factors: Tensor) -> float:
        """Return the share of key energy that is lost, where the latent loses `LATENT_SHARE` of what it should hold."""
        (averaged, unturned), reading = self._averaged(key), self._reading(factors)
        lost = averaged - (1 - LATENT_SHARE) * unturned
        return float((self._queries * (reading @ lost @ reading.mT)).sum()) / self._totals(key)[0]

    def _totals(self, key: Tensor) -> tuple[float, float]:
        """Return the energy of all keys and values."""
        averaged = self._averaged(key)[0][:, : self._dims, : self._dims]
        rows = self._values.rows
        values = (self._values.weights * ((rows @ self._two.values) @ rows.mT)).sum()
        return max(float((self._queries * averaged).sum()), 1e-30), max(float(values), 1e-30)

    def _round(self, fit: RotaryFit, values: Side) -> RotaryFit:
        key = self.fit_key(fit.factors, fit.latent)
        factors = self.fit_factors(key, fit.latent)
        rest = self._rest(key, factors)
        latent = self._two.refit(self._two.expand(fit.latent.down, rest, values), rest, values)
        return RotaryFit(key, factors, latent)

    def _rest(self, key: Tensor, factors: Tensor) -> Side:
        """Return what the latent should hold of each query head's keys, on average over distances."""
        of_source, of_key = self._means[:, : self._dims, : self._dims], self._means[:, self._dims :, self._dims :]
        return Side(of_source @ self._per_query(self._keys) - factors @ (of_key @ key), self._queries)

    def _per_query(self, of_keys: Tensor) -> Tensor:
        repeated: Tensor = of_keys.repeat_interleave(self._per, 0)
        return repeated

    def _reading(self, factors: Tensor) -> Tensor:
        """Return (H, D, D + Dr), what a query reads keys less the rotary key with."""
        return torch.cat([torch.eye(self._dims, dtype=torch.float64).expand_as(self._queries), -factors], dim=2)

    def _averaged(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return E[R M Rᵀ] and E[R] M E[R]ᵀ of keys and rotary key, stacked, (H, D + Dr, D + Dr) each.

        Both are without what the keys of a row have in common.
        """
        crossed, own = self._read @ key.mT, (key @ self._sigma) @ key.mT
        upper = torch.cat([self._read @ self._keys.mT, crossed], dim=2)
        lower = torch.cat([crossed.mT, own.expand(len(crossed), -1, -1)], dim=2)
        mean = torch.cat([self._keys @ self._mean, (key @ self._mean).expand(len(crossed), -1)], dim=1)
        products, mean = self._per_query(torch.cat([upper, lower], dim=1)), self._per_query(mean)
        common = (self._means @ mean[..., None])[..., 0]
        averaged = self._kernel.average(products) - common[..., None] * common[:, None, :]
        unturned = self._means @ (products - mean[..., None] * mean[:, None, :]) @ self._means.mT
        return averaged, unturned

    def fit_factors(self, key: Tensor, fit: LatentFit | None) -> Tensor:
        """Return the best factors for a rotary key; without a latent, for one that holds all but `LATENT_SHARE`."""
        (averaged, unturned), dims = self._averaged(key), self._dims
        if fit is None:
            averaged = averaged - (1 - LATENT_SHARE) * unturned
            crossed = averaged[:, :dims, dims:]
        else:
            read = self._means[:, dims:, dims:] @ key
            crossed = averaged[:, :dims, dims:] - fit.k_ups @ ((fit.down @ self._centred) @ read.mT)
        factors: Tensor = torch.linalg.solve(_ridged(averaged[:, dims:, dims:]), crossed.mT).mT
        return factors

    def fit_key(self, factors: Tensor, fit: LatentFit | None) -> Tensor:
        """Return the best rotary key for its queries' factors; without a latent, as `fit_factors`.

        M S Σ − N S m mᵀ = T Σ − U m mᵀ. With s = S m: M S = T + (N s − U m) (Σ⁻¹m)ᵀ, and a small equation for s.
        """
        dims, means, reading = self._dims, self._means, self._reading(factors)
        weights = reading.mT @ self._queries @ reading
        spread, common = self._kernel.conjugate().average(weights), means.mT @ weights @ means
        if fit is None:
            spread, common = spread - (1 - LATENT_SHARE) * common, LATENT_SHARE * common
        matrix, of_mean = _ridged(spread[:, dims:, dims:].sum(0)), common[:, dims:, dims:].sum(0)
        target, target_mean = (self._asked(part[:, dims:, :dims]) for part in (spread, common))
        if fit is not None:
            read = means[:, dims:, dims:].mT @ factors.mT @ self._queries
            held = (read @ fit.k_ups).sum(0) @ fit.down
            target, target_mean = target - held, target_mean - held
        share = float(self._solved @ self._mean)
        seen = target @ self._mean - share * (target_mean @ self._mean)
        seen = torch.linalg.solve(matrix - share * of_mean, seen)
        target = target + torch.outer(of_mean @ seen - target_mean @ self._mean, self._solved)
        key: Tensor = torch.linalg.solve(matrix, target)
        return key

    def _asked(self, weights: Tensor) -> Tensor:
        """Return −Σ_h weights_h k_h of the keys, from weights (H, Dr, D)."""
        by_key = weights.unflatten(0, (len(self._keys), self._per)).sum(1)
        asked: Tensor = -(by_key @ self._keys).sum(0)
        return asked


def _mean_rotations(means: Tensor) -> Tensor:
    """Return (H, 2·pairs, 2·pairs), what multiplies neighbouring pairs by complex `means` (H, pairs)."""
    places = torch.arange(means.shape[1])
    result = torch.zeros(len(means), len(places), 2, len(places), 2, dtype=torch.float64)
    result[:, places, 0, places, 0] = result[:, places, 1, places, 1] = means.real
    result[:, places, 1, places, 0], result[:, places, 0, places, 1] = means.imag, -means.imag
    return result.flatten(3).flatten(1, 2)


def _ridged(matrix: Tensor) -> Tensor:
    """Add a little to the diagonal of (…, n, n)."""
    level = RIDGE * matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    return matrix + level[..., None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype)
