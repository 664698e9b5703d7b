"""Convert a model layer by layer on calibration text, holding one layer's weights at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic

import torch
from torch import Tensor

from uptrain.checkpoint.dtypes import Array
from uptrain.conversion.calibration.activation_cache import ActivationCache
from uptrain.conversion.calibration.activations import Activations, open_activations
from uptrain.conversion.calibration.block_repair import LayerTensors
from uptrain.conversion.calibration.layer_runner import Layer, LayerRunner
from uptrain.conversion.calibration.layer_search import LayerChoice, LayerSearch
from uptrain.conversion.calibration.made_layer import CalibratedLayer, MadeLayer
from uptrain.conversion.calibration.refit import Maps
from uptrain.conversion.calibration.targets import CalibrationTarget, SourceLayer
from uptrain.conversion.calibration_settings import CalibrationSettings
from uptrain.conversion.plan.repairs import repairable
from uptrain.errors import CheckpointError, UsageError
from uptrain.methods.method import ExplainedEnergy
from uptrain.models import devices


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What was done to a layer.

    - `layer`: the layer's number.
    - `explained`: the energy that each method explains, by the method's name.
    - `choice`: how the layer was converted, None where nothing is shared.
    - `seconds`: how long it took.
    - `others`: the tensors outside attention that block repair changed, float32, by their names in the source.
    """

    layer: int
    explained: dict[str, ExplainedEnergy]
    choice: LayerChoice | None
    seconds: float
    others: Mapping[str, Array] = field(default_factory=dict)


def calibrate(
    target: CalibrationTarget[Any],
    blocks: Tensor,
    settings: CalibrationSettings,
    cache: ActivationCache | None = None,
    made: Callable[[int], MadeLayer | None] = lambda layer: None,
) -> Iterator[tuple[int, CalibratedLayer, LayerReport]]:
    """Yield each layer's number, its new heads or its latent (float32), and its report.

    The source's own heads are yielded, in their own dtype, where nothing is shared.

    - `target`: what the layers become.
    - `blocks`: (n, T) int64 calibration tokens, n ≥ 2. Some blocks are held out, and every choice is made by the error
      of the layer's output on those.
    - `settings`: what is tried, and what may be used.
    - `cache`: the activations of the source's own layers, which several conversions of the same source on the same
      blocks share; None to keep none.
    - `made`: returns a layer that an earlier run made, None for one to make. Layers that it returns are replayed, not
      yielded; the remaining layers are bit-identical to an uninterrupted run.

    Raises:
        UsageError: fewer than two blocks.
        CheckpointError: a tensor is missing, or a layer's activations are not finite.
        UptrainError: the activations need files, and the disk is too small for them.
    """
    if target.unchanged:
        for index in range(len(target.before)):
            explained = dict.fromkeys(("calibrated", "svd", "mean"), ExplainedEnergy(1.0, 1.0))
            yield index, target.read(index), LayerReport(layer=index, explained=explained, choice=None, seconds=0.0)
        return
    if len(blocks) < 2:
        raise UsageError("Calibration needs at least two blocks of text, one of them to check on.", "Give more text.")
    runner = LayerRunner(target.source, devices.device())
    shape = (*blocks.shape, runner.config.hidden_size)
    with open_activations(shape, settings.memory, settings.folder) as activations:
        for block, hidden in enumerate(runner.embed(blocks, settings.boundary)):
            activations.original[block] = activations.converted[block] = hidden.cpu()
        converter = _Converter(target, runner, activations, settings, cache)
        for index in range(len(target.before)):
            found = converter.convert(index, made(index))
            activations.advance()
            if found is not None:
                yield index, *found


@dataclass(frozen=True)
class _Converter(Generic[Maps]):
    """Converts layers one after the other, and takes the activations through them."""

    target: CalibrationTarget[Maps]
    runner: LayerRunner
    activations: Activations
    settings: CalibrationSettings
    cache: ActivationCache | None

    def convert(self, index: int, made: MadeLayer | None) -> tuple[CalibratedLayer, LayerReport] | None:
        """Convert a layer; None for one that is `made` already and only run."""
        began = time.monotonic()
        target, device = self.target, self.runner.device
        source = SourceLayer(heads=target.arranged(index), spec=target.before[index], device=device)
        with self.runner.layer(index) as layer, torch.no_grad():
            self._run_source(layer, index)
            others = LayerTensors(layer, repairable(target.source, index))
            search = LayerSearch(
                layer=layer,
                maker=target.maker(source),
                activations=self.activations,
                settings=self.settings,
                device=device,
                index=index,
                gain=_gain(self.runner),
                output_bias=source.output_bias,
                others=others,
            )
            if made is not None:
                others.write(made.others)
                search.advance(target.maps(made.attention))
                return None
            maps, explained, choice = search.convert()
            changed = others.changed()
        seconds = time.monotonic() - began
        report = LayerReport(layer=index, explained=explained, choice=choice, seconds=seconds, others=changed)
        return target.arrays(maps, source.heads), report

    def _run_source(self, layer: Layer, index: int) -> None:
        """Run the source's own layer over its activations, unless another conversion did."""
        if self.cache is not None and self.cache.restore(index, self.activations):
            return
        _trace(layer, self.activations, self.runner.device, index)
        if self.cache is not None:
            self.cache.store(index, len(self.target.before), self.activations, self.settings.memory)


def _trace(layer: Layer, activations: Activations, device: torch.device, index: int) -> None:
    """Record the attention's output and the layer's, of the source's own layer."""
    for block, hidden in enumerate(activations.original):
        trace = layer.on(block).trace(hidden.to(device))
        activations.attention_output[block], activations.target[block] = trace.attention.cpu(), trace.output.cpu()
        if not torch.isfinite(activations.target[block]).all():
            raise CheckpointError(
                f"Layer {index} of the source gives NaN or infinite activations.",
                "Nothing useful can be made of it; download the checkpoint again.",
            )


def _gain(runner: LayerRunner) -> float:
    """Return what attention's output is multiplied by before it joins the hidden states (Granite's multiplier)."""
    return float(getattr(runner.config, "residual_multiplier", 1.0) or 1.0)
