"""Search for the best conversion of one layer: the candidate with the least error on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic

import torch
from torch import Tensor

from uptrain.conversion.calibration.activations import Activations
from uptrain.conversion.calibration.block_repair import BlockSteps, LayerTensors
from uptrain.conversion.calibration.candidates import CandidateMaker, as_float
from uptrain.conversion.calibration.layer_runner import Layer
from uptrain.conversion.calibration.refit import Check, Maps, Regression, best_dampings, gradient_steps, ridge
from uptrain.conversion.calibration_settings import CalibrationSettings
from uptrain.conversion.malloc import give_back
from uptrain.methods.method import ExplainedEnergy


@dataclass(frozen=True)
class LayerChoice:
    """How a layer was converted.

    - `moments`: the activations that statistics were gathered on: `sequence` (of the converted layers), `original`, or
      `both` (blocks of either in turn).
    - `refit`: the activations that the output projection was refitted on, `sequence` or `independent` (the original's);
      None where no refit helped.
    - `drift`: the share of the error so far that the refit corrects.
    - `damping`: the refit's λ.
    - `steps`: the gradient steps of attention alone.
    - `block_steps`: the gradient steps that moved the layer's norms and MLP too.
    - `error_shared`, `error_refit`, `error_attention`, `error`: the relative squared error of the layer's output on
      held-out text, after sharing, after the best refit of those compared before the steps, after the steps of
      attention and the refit on all blocks, and after the steps of the whole layer.
    - `error_by_text`: the last error on each text; empty with one text.
    """

    moments: str
    refit: str | None
    drift: float
    damping: float
    steps: int
    block_steps: int
    error_shared: float
    error_refit: float
    error_attention: float
    error: float
    error_by_text: tuple[float, ...] = ()


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
    - `others`: the layer's tensors outside attention that block repair may change; none are changed without it.
    """

    layer: Layer
    maker: CandidateMaker[Maps]
    activations: Activations
    settings: CalibrationSettings
    device: torch.device
    index: int
    gain: float
    output_bias: Tensor | None
    others: LayerTensors | None = None

    def __post_init__(self) -> None:
        count = len(self.activations.original)
        self._check = held_out(count, self.settings.held_out, self.settings.text_of)
        self._fit = [block for block in range(count) if block not in self._check]

    def convert(self) -> tuple[Maps, dict[str, ExplainedEnergy], LayerChoice]:
        """Return the layer's new float32 maps, the energy that methods explain, and the choices; and advance."""
        shared = sorted((pair for kind in self._moment_kinds() for pair in self._made(kind)), key=_first)
        shared_error, best = shared[0]
        found = [shared[0]]
        for _, candidate in shared[: self.settings.refitted]:
            found += self._refits(candidate, "sequence", self.settings.drifts, self._trials())
        if self.index and self.settings.independent:
            found += self._refits(best, "independent", (0.0,), self._fit)
        refit_error, chosen = min(found, key=_first)
        attention_error, fitted, steps = self._fitted(refit_error, chosen)
        error, maps, block_steps = self._block_repaired(attention_error, fitted.maps)
        self.advance(maps)
        choice = LayerChoice(
            fitted.moments, fitted.refit, fitted.drift, fitted.damping, steps, block_steps,
            shared_error, refit_error, attention_error, error, self._errors_by_text(),
        )  # fmt: skip
        return maps, fitted.explained, choice

    def advance(self, maps: Maps) -> None:
        """Run the converted activations through the layer, with `maps` as its attention."""
        maps = as_float(maps, self.device)
        for block, hidden in enumerate(self.activations.converted):
            self.activations.converted[block] = self.maker.run(self.layer.on(block), hidden.to(self.device), maps).cpu()

    def _errors_by_text(self) -> tuple[float, ...]:
        """Return the error of each text's held-out blocks, after the layer has run; empty with one text."""
        sums: dict[int, list[float]] = {}
        for block in sorted(self._check) if self.settings.text_of else ():
            output = self.activations.converted[block].to(self.device)
            wrong, total = self._apart(output, self.activations.target[block].to(self.device), block)
            found = sums.setdefault(self.settings.text_of[block], [0.0, 0.0])
            found[0], found[1] = found[0] + float(wrong), found[1] + float(total)
        return tuple(wrong / total for _, (wrong, total) in sorted(sums.items()))

    def _moment_kinds(self) -> tuple[str, ...]:
        """Return the activations to try. Before the first layer both are the same."""
        return ("sequence",) if self.index == 0 else self.settings.moments

    def _made(self, kind: str) -> list[tuple[float, _Refitted[Maps]]]:
        """Return the best candidates made from one kind of activations, each after its error, the least first.

        They are as many as are refitted, or one: the others would take memory until the layer is done.
        """
        give_back()
        sequence, original = self.activations.converted, self.activations.original
        states = {"sequence": (sequence,), "original": (original,), "both": (sequence, original)}[kind]
        blocks = enumerate(spread(self._fit, self.settings.probes))
        probes = ((block, states[place % len(states)][block].to(self.device)) for place, block in blocks)
        made = [_Refitted(one.layer, dict(one.explained), kind) for one in self.maker.make(self.layer, probes)]
        return sorted(((self._error(one.maps), one) for one in made), key=_first)[: max(1, self.settings.refitted)]

    def _fitted(self, error: float, chosen: _Refitted[Maps]) -> tuple[float, _Refitted[Maps], int]:
        """Return the best of a candidate and its fits to all blocks, after its error, and how many steps it had.

        - `error`: the candidate's error.
        - `chosen`: the candidate.

        The output projection is fitted after the steps: whatever they left of it has a closed form. Where nothing was
        refitted before, they aim at the most of the drift, and the fit chooses its share.
        """
        settings, steps = self.settings, self.settings.repair_steps
        best: tuple[float, _Refitted[Maps]] = (error, chosen)
        if steps:
            drift = chosen.drift if chosen.refit else max(settings.drifts)
            loss = partial(self._attention_error, drift=drift)
            seed = settings.seed + self.index
            moved = replace(chosen, maps=gradient_steps(chosen.maps, loss, self._fit, steps, settings.rate, seed))
            after, fitted = min(self._refits(moved, "sequence", settings.drifts, self._fit), key=_first)
            if after < error:
                return after, fitted, steps
        if chosen.refit != "sequence" or len(self._trials()) < len(self._fit):
            best = min(best, *self._refits(chosen, "sequence", settings.drifts, self._fit), key=_first)
        return best[0], best[1], 0

    def _trials(self) -> Sequence[int]:
        """Return the blocks on which refits are compared."""
        return spread(self._fit, self.settings.trials)

    def _refits(
        self, candidate: _Refitted[Maps], inputs: str, drifts: tuple[float, ...], blocks: Sequence[int]
    ) -> list[tuple[float, _Refitted[Maps]]]:
        """Return a candidate with its output projection refitted, once for each drift, after their errors.

        - `candidate`: the candidate.
        - `inputs`: the activations to fit on, `sequence` or `independent` (the original's).
        - `drifts`: the shares of the error so far to correct.
        - `blocks`: the blocks to fit to.
        """
        give_back()
        if not self.index:
            drifts = (0.0,)  # nothing has drifted yet
        shared = candidate.maps
        fit, check = self._regressions(shared, inputs, drifts, blocks)
        start = shared.o.flatten(1).mT.cpu().double()
        found = []
        dampings = best_dampings(fit, check, start, drifts, self.settings.dampings)
        for drift, damping in zip(drifts, dampings, strict=True):
            solution = ridge(fit.gram, fit.product(drift), start, damping)
            output = solution.mT.reshape(shared.o.shape).float().to(self.device)
            one = replace(candidate, maps=replace(shared, o=output), refit=inputs, drift=drift, damping=damping)
            found.append((self._error(one.maps), one))
        return found

    def _regressions(
        self, shared: Maps, inputs: str, drifts: tuple[float, ...], blocks: Sequence[int]
    ) -> tuple[Regression, Check]:
        """Gather a regression of what attention should give on mixed heads, on `blocks` and on the held-out ones."""
        states = self.activations.converted if inputs == "sequence" else self.activations.original
        drifting = any(drifts)
        names = ("attention", "gap") if drifting else ("attention",)
        fit, check = Regression(shared.o[0].numel(), len(shared.o), names), Check()
        for block in sorted({*blocks, *self._check}):
            hidden = states[block].to(self.device)
            mixed = self.maker.mix(self.layer.on(block), hidden, shared)
            original = self.activations.original[block].to(self.device)
            targets = {"attention": self._attention_target(block)}
            if drifting:
                targets["gap"] = (original - hidden) / self.gain
            into = check if block in self._check else fit
            into.add(mixed, self._token_weights(original, block), targets)
        return fit, check

    def _attention_target(self, block: int) -> Tensor:
        """Return what the source's attention gives (T, d), without its bias."""
        output = self.activations.attention_output[block].to(self.device)
        return output if self.output_bias is None else output - self.output_bias

    def _attention_error(self, maps: Maps, block: int, drift: float) -> Tensor:
        """Return the relative squared error of the attention's output, towards that of the source and of the drift.

        On a block's beginning, which costs less than half and says nearly as much; later tokens count in the refit.
        """
        on = self.layer.on_beginning(block)
        tokens = len(on.positions)
        hidden, original = (
            states[block][:tokens].to(self.device) for states in (self.activations.converted, self.activations.original)
        )
        target = self._attention_target(block)[:tokens]
        if drift:
            target = target + drift * (original - hidden) / self.gain
        weights = self._token_weights(original, block)[:, None]
        output = self.maker.mix(on, hidden, maps) @ maps.o.flatten(1).mT
        return (weights * (output - target).square()).sum() / (weights * target.square()).sum()

    def _block_repaired(self, error: float, maps: Maps) -> tuple[float, Maps, int]:
        """Return maps after steps that also move norms and MLP, if they err less, after their error; and the steps."""
        settings = self.settings
        if self.others is None or not settings.block_steps:
            return error, maps, 0
        give_back()
        steps = BlockSteps(count=settings.block_steps, rate=settings.block_rate, seed=settings.seed + self.index)
        repaired = self.others.steps(maps, self._relative_error, self._fit, steps)
        after = self._error(repaired)
        if after < error:
            return after, repaired, steps.count
        self.others.put_back()
        return error, maps, 0

    def _relative_error(self, maps: Maps, block: int) -> Tensor:
        wrong, total = self._wrong(block, maps)
        return wrong / total

    def _error(self, maps: Maps) -> float:
        """Return the relative squared error of the layer's output on the held-out blocks; inf where it isn't finite."""
        pairs = [self._wrong(block, maps) for block in self._check]
        error = float(sum(wrong for wrong, _ in pairs)) / float(sum(total for _, total in pairs))
        return error if error == error else float("inf")

    def _wrong(self, block: int, maps: Maps) -> tuple[Tensor, Tensor]:
        output = self.maker.run(self.layer.on(block), self.activations.converted[block].to(self.device), maps)
        return self._apart(output, self.activations.target[block].to(self.device), block)

    def _apart(self, output: Tensor, target: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Return how far a layer's output (T, d) on a block is from its target, and the target's energy."""
        weights = self._token_weights(target, block)[:, None]
        return (weights * (output - target).square()).sum(), (weights * target.square()).sum()

    def _token_weights(self, hidden: Tensor, block: int) -> Tensor:
        """Return the weights (T,) of a block's tokens: the inverse of their energy, which the next norm removes.

        A document's first token, which attention reads when it needs nothing else, has more by the document's length.
        """
        weights = 1 / hidden.square().mean(-1).clamp(min=1e-12)
        positions = self.layer.on(block).positions[: len(hidden)]
        later = (positions > 0).to(weights.device)
        weights = weights / (weights[later] if later.any() else weights).mean()
        first = (positions == 0).nonzero().flatten()
        lengths = torch.cat([first, torch.tensor([len(positions)])]).diff()
        least = min(1.0, self.settings.first_token)
        weights[first] *= (self.settings.first_token * lengths / len(positions)).clamp(min=least).to(weights)
        return weights


def held_out(blocks: int, share: float, text_of: Sequence[int] = ()) -> frozenset[int]:
    """Return which of `blocks` blocks are held out: of each text evenly spaced, at least one, at most half.

    `text_of` says which text each block is from; empty for a single text.
    """
    found: set[int] = set()
    for text in sorted(set(text_of)) or [0]:
        own = [block for block in range(blocks) if not text_of or text_of[block] == text]
        count = min(max(1, round(len(own) * share)), len(own) // 2)
        found |= {own[int((i + 0.5) * len(own) / count)] for i in range(count)}
    return frozenset(found)


def spread(blocks: Sequence[int], count: int) -> Sequence[int]:
    """Return `count` of `blocks`, evenly spaced, all where there are no more."""
    return blocks[:: max(1, len(blocks) // count)][:count]


def _first(pair: tuple[float, object]) -> float:
    return pair[0]
