"""Convert a model layer by layer on calibration text, holding one layer's weights at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.mla_projections import LatentHeads
from uptrain.architectures.projections import LayerHeads, read_layer
from uptrain.checkpoint.dtypes import as_float32
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.calibration.activation_cache import SourceRun
from uptrain.conversion.calibration.activations import Streams, open_streams
from uptrain.conversion.calibration.candidates import KEY_WEIGHTS, DecoupledLatent, Form, PlainLatent, SharedHeads
from uptrain.conversion.calibration.layer_runner import Layer, LayeredModel
from uptrain.conversion.calibration.layer_search import Choice, LayerTask
from uptrain.conversion.calibration_settings import CalibrationSettings
from uptrain.errors import CheckpointError, UsageError
from uptrain.methods.head_conversion import ModuleWeights, heads_of, maps_of, rotary_of
from uptrain.methods.method import ExplainedEnergy
from uptrain.methods.mla import LatentShape
from uptrain.methods.mla_conversion import heads_of_latent, maps_of_latent
from uptrain.methods.mla_layer import LatentMaps
from uptrain.models import devices

Result = LayerHeads | LatentHeads


@dataclass(frozen=True)
class Target:
    """Say what is converted: the layers of `source`, to `groups` heads or a latent.

    `frequencies` are the source's rotary ones, (pairs,) radians a token, and `rotary_factor` what its tables are
    multiplied by; `key_weight` is tried alone where it is given. `arrange` may put a layer's heads in another order
    first, as long as it changes no output.
    """

    source: CheckpointDescription
    groups: int
    latent: LatentShape | None = None
    frequencies: tuple[float, ...] = ()
    rotary_factor: float = 1.0
    key_weight: float | None = None
    arrange: Callable[[LayerHeads], LayerHeads] | None = None

    @property
    def before(self) -> tuple[AttentionSpec, ...]:
        """Return the attention of the source's layers."""
        return self.source.attention


@dataclass(frozen=True)
class LayerReport:
    """Tell what was done to a layer: the energy each method keeps, the choices made, and the seconds it took."""

    layer: int
    kept: dict[str, ExplainedEnergy]
    choice: Choice | None
    seconds: float


def calibrate(
    checkpoint: Checkpoint,
    target: Target,
    blocks: Tensor,
    settings: CalibrationSettings,
    on_layer: Callable[[LayerReport], None] | None = None,
    run: SourceRun | None = None,
    made: Callable[[int], Result | None] = lambda layer: None,
) -> Iterator[tuple[int, Result, LayerReport]]:
    """Yield each layer's number, its new heads (float32; the source's own where nothing is shared) and its report.

    For a latent they are that instead.

    `blocks` (n, T) int64 are calibration tokens, n ≥ 2; some are held out, and every choice is made by the error of
    the layer's output on those. `run` is what earlier conversions of the same source on the same blocks kept of its
    own layers, or is to keep. Layers that `made` returns are run as they are and not yielded: the others come out to
    the bit as if an equal call had made all.

    Raises:
        UsageError: fewer than two blocks.
        CheckpointError: a tensor is missing, or a layer's activations are not finite.
        UptrainError: the activations need files, and the disk is too small for them.
    """
    if target.latent is None and target.groups == target.before[0].num_key_value_heads:
        for layer in range(len(target.before)):
            kept = dict.fromkeys(("calibrated", "svd", "mean"), ExplainedEnergy(1.0, 1.0))
            report = LayerReport(layer, kept, None, 0.0)
            yield layer, read_heads(checkpoint, target, layer), report
        return
    if len(blocks) < 2:
        raise UsageError("Calibration needs at least two blocks of text, one of them to check on.", "Give more text.")
    device = devices.device()
    model = LayeredModel(target.source, device)
    shape = (*blocks.shape, model.config.hidden_size)
    with open_streams(shape, settings.memory, settings.folder) as streams:
        for index, hidden in enumerate(model.embed(blocks)):
            streams.original[index] = streams.converted[index] = hidden.cpu()
        for index in range(len(target.before)):
            found = _layer(checkpoint, target, model, streams, settings, index, run, made(index))
            streams.advance()
            if found is not None and on_layer is not None:
                on_layer(found[1])
            if found is not None:
                yield index, *found


def _layer(
    checkpoint: Checkpoint,
    target: Target,
    model: LayeredModel,
    streams: Streams,
    settings: CalibrationSettings,
    index: int,
    run: SourceRun | None,
    made: Result | None,
) -> tuple[Result, LayerReport] | None:
    """Convert a layer, or take the streams through what was `made` of it."""
    began = time.monotonic()
    spec = target.before[index]
    source = read_heads(checkpoint, target, index)
    if target.arrange is not None:
        source = target.arrange(source)
    with model.layer(index) as layer, torch.no_grad():
        if run is None or not run.lend(index, streams):
            _trace(layer, streams, model.device, index)
            if run is not None:
                run.keep(index, len(target.before), streams, settings.memory)
        bias = source.part("o").bias
        output_bias = None if bias is None else torch.from_numpy(as_float32(bias)).to(model.device)
        rest = (streams, settings, model.device, index, _gain(model), output_bias)
        if target.latent is None:
            sharing = LayerTask(layer, _heads_form(target, spec, source, model.device), *rest)
            if isinstance(made, LayerHeads):
                sharing.advance(maps_of(made))
                return None
            heads, kept, choice = sharing.convert()
            return heads_of(heads, source), LayerReport(index, kept, choice, time.monotonic() - began)
        latent = LayerTask(layer, _latent_form(target, target.latent, spec, source, model.device, output_bias), *rest)
        if isinstance(made, LatentHeads):
            latent.advance(maps_of_latent(made))
            return None
        maps, kept, choice = latent.convert()
    return heads_of_latent(maps, bias), LayerReport(index, kept, choice, time.monotonic() - began)


def _trace(layer: Layer, streams: Streams, device: torch.device, index: int) -> None:
    """Run the source's own layer over its stream."""
    for block, hidden in enumerate(streams.original):
        trace = layer.trace(hidden.to(device))
        streams.attended[block], streams.target[block] = trace.attended.cpu(), trace.output.cpu()
        if not torch.isfinite(streams.target[block]).all():
            raise CheckpointError(
                f"Layer {index} of the source gives NaN or infinite activations.",
                "Nothing useful can be made of it; download the checkpoint again.",
            )


def _heads_form(target: Target, spec: AttentionSpec, source: LayerHeads, device: torch.device) -> SharedHeads:
    family = target.source.family
    weights, position = ModuleWeights(family.projections, spec), rotary_of(family.position, spec)
    return SharedHeads(source, weights, position, target.groups, device)


def _latent_form(
    target: Target,
    shape: LatentShape,
    spec: AttentionSpec,
    source: LayerHeads,
    device: torch.device,
    output_bias: Tensor | None,
) -> Form[LatentMaps]:
    position = rotary_of(target.source.family.position, spec)
    key_weights = KEY_WEIGHTS if target.key_weight is None else (target.key_weight,)
    frequencies = torch.tensor(target.frequencies, dtype=torch.float64)
    if shape.form == "decoupled":
        factor = target.rotary_factor
        return DecoupledLatent(source, position, shape, frequencies, device, output_bias, factor, key_weights)
    weights = ModuleWeights(target.source.family.projections, spec)
    known = frequencies if target.frequencies else None
    return PlainLatent(source, weights, position, shape, known, device, key_weights)


def _gain(model: LayeredModel) -> float:
    """Return what attention's output is multiplied by before it joins the hidden states (Granite's multiplier)."""
    return float(getattr(model.config, "residual_multiplier", 1.0) or 1.0)


def read_heads(checkpoint: Checkpoint, target: Target, layer: int) -> LayerHeads:
    """Return one layer's heads, as the checkpoint stores them."""
    base = target.source.attention_name(layer)
    return read_layer(checkpoint, target.source.family.projections, target.before[layer], base)
