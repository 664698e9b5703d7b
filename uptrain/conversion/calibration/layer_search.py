"""Search for the best conversion of one layer: the candidate with the least error on held-out text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor

from uptrain.conversion.calibration.activations import Activations
from uptrain.conversion.calibration.candidates import CandidateMaker, as_float
from uptrain.conversion.calibration.layer_runner import Layer
from uptrain.conversion.calibration.refit import Check, Maps, Regression, best_dampings, gradient_steps, ridge
from uptrain.conversion.calibration_settings import CalibrationSettings
from uptrain.conversion.malloc import give_back
from uptrain.methods.method import ExplainedEnergy


@dataclass(frozen=True)
class LayerChoice:
    """How a layer was converted.

    - `moments`: the activations that statistics were gathered on, `sequence` (of the converted layers) or `original`.
    - `refit`: the activations that the output projection was refitted on, `sequence` or `independent` (the original's);
      None where no refit helped.
    - `drift`: the share of the error so far that the refit corrects.
    - `damping`: the refit's λ.
    - `steps`: the gradient steps of the result.
    - `error_shared`, `error_refit`, `error`: the relative squared error of the layer's output on held-out text, after
      sharing, after the refit and after the gradient steps.
    """

    moments: str
    refit: str | None
    drift: float
    damping: float
    steps: int
    error_shared: float
    error_refit: float
    error: float


@dataclass(frozen=True)
class _Refitted(Generic[Maps]):
    """A candidate, and how its output projection was refitted, if it was."""

    maps: Maps
    explained: dict[str, ExplainedEnergy]
    moments: str
    refit: str | None = None
    drift: float = 0.0
    damping: float = 0.0


@dataclass(kw_only=True)
class LayerSearch(Generic[Maps]):
    """One layer to convert.

    - `layer`: the source's layer.
    - `maker`: makes candidates and runs the layer with them.
    - `activations`: around the layer.
    - `settings`: what is tried.
    - `device`: what computes.
    - `index`: the layer's number.
    - `gain`: what the layer multiplies its attention's output by.
    - `output_bias`: (d,), the bias of the attention's output, None where it has none.
    """

    layer: Layer
    maker: CandidateMaker[Maps]
    activations: Activations
    settings: CalibrationSettings
    device: torch.device
    index: int
    gain: float
    output_bias: Tensor | None

    def __post_init__(self) -> None:
        count = len(self.activations.original)
        self._check = held_out(count, self.settings.held_out)
        self._fit = [block for block in range(count) if block not in self._check]

    def convert(self) -> tuple[Maps, dict[str, ExplainedEnergy], LayerChoice]:
        """Return the layer's new float32 maps, the energy that methods explain, and the choices; and advance."""
        unfitted: list[tuple[float, _Refitted[Maps]]] = [self._made(kind) for kind in self._moment_kinds()]
        best = min(unfitted, key=_first)
        for _, candidate in unfitted:
            best = min(best, *self._refits(candidate, "sequence"), key=_first)
        if self.index and self.settings.independent:
            # On the original activations only for the moments that won: it seldom wins, and runs over all blocks.
            winner = next(c for _, c in unfitted if c.moments == best[1].moments)
            best = min(best, *self._refits(winner, "independent"), key=_first)
        refit_error, chosen = best
        maps, steps, error = self._repaired(chosen.maps, refit_error)
        self.advance(maps)
        choice = LayerChoice(
            chosen.moments, chosen.refit, chosen.drift, chosen.damping, steps,
            min(error for error, _ in unfitted), refit_error, error,
        )  # fmt: skip
        return maps, chosen.explained, choice

    def advance(self, maps: Maps) -> None:
        """Run the converted activations through the layer, with `maps` as its attention."""
        maps = as_float(maps, self.device)
        for block, hidden in enumerate(self.activations.converted):
            self.activations.converted[block] = self.maker.run(self.layer.on(block), hidden.to(self.device), maps).cpu()

    def _moment_kinds(self) -> tuple[str, ...]:
        """Return the activations to try. Before the first layer both are the same."""
        return ("sequence",) if self.index == 0 else self.settings.moments

    def _made(self, kind: str) -> tuple[float, _Refitted[Maps]]:
        """Return the candidate of least error among those made from one kind of activations, after its error."""
        give_back()
        states = self.activations.original if kind == "original" else self.activations.converted
        stride = max(1, len(self._fit) // self.settings.probes)
        probes = ((block, states[block].to(self.device)) for block in self._fit[::stride][: self.settings.probes])
        made = [_Refitted(one.layer, dict(one.explained), kind) for one in self.maker.make(self.layer, probes)]
        return min(((self._error(one.maps), one) for one in made), key=_first)

    def _refits(self, unfitted: _Refitted[Maps], inputs: str) -> list[tuple[float, _Refitted[Maps]]]:
        """Return candidates with the output projection refitted on `sequence` activations, or `independent` of them."""
        give_back()
        shared = unfitted.maps
        found = []
        for drift, damping, output in self._outputs(shared, inputs):
            candidate = replace(unfitted, maps=replace(shared, o=output), refit=inputs, drift=drift, damping=damping)
            found.append((self._error(candidate.maps), candidate))
        return found

    def _outputs(self, shared: Maps, inputs: str) -> list[tuple[float, float, Tensor]]:
        """Return each drift, its best damping, and the output projection refitted with both."""
        drifts = self.settings.drifts if inputs == "sequence" and self.index else (0.0,)
        fit, check = self._regressions(shared, inputs, any(drifts))
        start = shared.o.flatten(1).mT.cpu().double()
        dampings = best_dampings(fit, check, start, drifts, self.settings.dampings)
        found = []
        for drift, damping in zip(drifts, dampings, strict=True):
            solution = ridge(fit.gram, fit.product(drift), start, damping)
            found.append((drift, damping, solution.mT.reshape(shared.o.shape).float().to(self.device)))
        return found

    def _regressions(self, shared: Maps, inputs: str, drifting: bool) -> tuple[Regression, Check]:
        """Gather a regression of the source's attention output on mixed heads, and if `drifting` of the error."""
        activations = self.activations
        states = activations.converted if inputs == "sequence" else activations.original
        names = ("attention", "gap") if drifting else ("attention",)
        fit, check = Regression(shared.o[0].numel(), len(shared.o), names), Check()
        bias = 0.0 if self.output_bias is None else self.output_bias
        for block, hidden in enumerate(states):
            mixed = self.maker.mix(self.layer.on(block), hidden.to(self.device), shared)
            original = activations.original[block].to(self.device)
            targets = {"attention": activations.attention_output[block].to(self.device) - bias}
            if drifting:
                targets["gap"] = (original - hidden.to(self.device)) / self.gain
            into = check if block in self._check else fit
            into.add(mixed, self._token_weights(original), targets)
        return fit, check

    def _repaired(self, maps: Maps, error: float) -> tuple[Maps, int, float]:
        steps, settings = self.settings.repair_steps, self.settings
        if not steps:
            return maps, 0, error

        def loss(heads: Maps, batch: int) -> Tensor:
            wrong, total = self._wrong(self._fit[batch], heads)
            return wrong / total

        repaired = gradient_steps(maps, loss, len(self._fit), steps, settings.rate, settings.seed + self.index)
        after = self._error(repaired)
        return (repaired, steps, after) if after < error else (maps, 0, error)

    def _error(self, maps: Maps) -> float:
        """Return the relative squared error of the layer's output on the held-out blocks; inf where it isn't finite."""
        pairs = [self._wrong(block, maps) for block in self._check]
        error = float(sum(wrong for wrong, _ in pairs)) / float(sum(total for _, total in pairs))
        return error if error == error else float("inf")

    def _wrong(self, block: int, maps: Maps) -> tuple[Tensor, Tensor]:
        target = self.activations.target[block].to(self.device)
        weights = self._token_weights(target)[:, None]
        output = self.maker.run(self.layer.on(block), self.activations.converted[block].to(self.device), maps)
        return (weights * (output - target).square()).sum(), (weights * target.square()).sum()

    def _token_weights(self, hidden: Tensor) -> Tensor:
        """Return the weights (T,) of tokens: the inverse of their energy, which the next norm removes."""
        weights = 1 / hidden.square().mean(-1).clamp(min=1e-12)
        weights = weights / weights[1:].mean()
        weights[0] *= self.settings.first_token
        return weights


def held_out(blocks: int, share: float) -> frozenset[int]:
    """Return which of `blocks` blocks are held out: evenly spaced, at least one, at most half."""
    count = min(max(1, round(blocks * share)), blocks // 2)
    return frozenset(int((i + 0.5) * blocks / count) for i in range(count))


def _first(pair: tuple[float, object]) -> float:
    return pair[0]
