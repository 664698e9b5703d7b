"""Calibrate a planned conversion: read text, and convert the layers that an earlier run did not."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from uptrain import formatting
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.nonfinite import ALLOW, finite
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.calibration.activations import activation_bytes
from uptrain.conversion.calibration.engine import LayerReport, calibrate
from uptrain.conversion.calibration.isolation import boundary_in
from uptrain.conversion.calibration.layer_search import held_out
from uptrain.conversion.calibration.memory import held_bytes, mask_bytes, working_bytes
from uptrain.conversion.calibration.rope_pairs import rope_pairs_by_text
from uptrain.conversion.calibration.store import CalibratedLayers
from uptrain.conversion.calibration.targets import CalibrationTarget, HeadsTarget, MLATarget
from uptrain.conversion.calibration.text import (
    SharedCalibration,
    calibration_text,
    described,
    note_errors,
    note_strange,
)
from uptrain.conversion.malloc import give_back, giving_back
from uptrain.conversion.plan.mla import MLAPlan
from uptrain.data.boundary import Boundary
from uptrain.methods.mla_conversion import latent_shape
from uptrain.models import devices, loading

if TYPE_CHECKING:
    from uptrain.conversion.plan.planner import Plan

LARGE = 2**32
"""Bytes of weights that take more than a few seconds to read."""
ROPE_BLOCKS = 4
"""Blocks of text by which rotary pairs are chosen."""


@devices.full_fp32()
@devices.enough_memory(
    "Calibrating", "Lower --memory or --calibration-tokens, or calibrate on --device cpu; finished layers stay."
)
def calibrate_plan(
    plan: Plan, folder: Path, memory: int, events: Events, shared: SharedCalibration | None = None
) -> CalibratedLayers:
    """Calibrate every layer of a plan but those that an earlier run of it, on the same text, left in `folder`.

    - `plan`: the conversion.
    - `folder`: where the layers are stored as they are made; activations for which memory leaves no room too.
    - `memory`: bytes that this process may hold.
    - `events`: receives `layer` after each layer, and `note`.
    - `shared`: what calibrations of the same source share, None for a single one.

    Raises:
        UptrainError: the text is unfit, activations are not finite, or the disk is too small for them.
    """
    done = CalibratedLayers.left(folder, plan.digest)
    if done is not None and len(done) == len(plan.before):
        events.note("Calibration was finished by an earlier run.")
        return done
    if done is None and not plan.request.allow_nonfinite:
        _refuse_nonfinite(plan.source.checkpoint, events)
    loading.quiet()
    text = calibration_text(plan) if shared is None else shared.text(plan)
    note_strange(text, events)
    blocks = torch.from_numpy(text.ids)
    boundary = boundary_in(plan.source, blocks, text.boundary, events)
    apart = {} if boundary is None else {"documents": "apart"}
    done = _begun(folder, plan, described(plan, text) | apart, done, events)
    target, cache = calibration_target(plan), None if shared is None else shared.cache
    give_back()  # What the tokenizer has done with.
    text_of = text.text_of if len(text.texts) > 1 else ()
    settings = replace(plan.request.calibration_settings, folder=folder, text_of=text_of, boundary=boundary)
    checked = held_out(len(blocks), settings.held_out, text_of)
    working = working_bytes(target, blocks.shape[1], len(checked), plan.request.repairs_blocks)
    if boundary is not None:
        divided = int(boundary.starts(text.ids).any(axis=1).sum())
        working += mask_bytes(target, blocks.shape[1], divided)
    room = memory - held_bytes() - working + (cache.nbytes if cache else 0)
    if room < 0:
        events.note(
            f"Converting one layer of this model will hold about {formatting.size(memory - room)}, more than the "
            f"{formatting.size(memory)} of --memory."
        )
    settings = replace(settings, memory=room)
    # Where all that memory may hold leaves no room for what the C library keeps of freed memory.
    cached = 0 if cache is None else len(plan.before)
    every = activation_bytes((*blocks.shape, plan.source.hidden_size), cached)
    with giving_back() if room < every + working else nullcontext():
        target = _with_rope_pairs(plan, target, blocks[:ROPE_BLOCKS], boundary, done, events)

        def estimated(seconds: float) -> None:
            layers = formatting.counted(len(plan.before) - len(done), "layer")
            events.note(
                f"Calibrating {layers} on {blocks.numel():,} tokens will take about {formatting.duration(seconds)}."
            )

        for _, heads, report in calibrate(target, blocks, settings, cache, done.made, estimated):
            done.add(heads, _described(report), report.others)
            events.layer(len(done), len(plan.before))
    note_errors(text, done.errors_by_text, events)
    return done


def _refuse_nonfinite(checkpoint: Checkpoint, events: Events) -> None:
    """Refuse NaN before hours are spent, though writing would find it too."""
    size = sum(info.nbytes for info in checkpoint.tensors.values())
    if size > LARGE:
        events.note(f"Looking for NaN and infinity in {formatting.size(size)} of weights.")
    for name in checkpoint.tensors:
        for _ in finite(checkpoint, name, ALLOW):
            pass


def _begun(
    folder: Path, plan: Plan, text: dict[str, Any], left: CalibratedLayers | None, events: Events
) -> CalibratedLayers:
    """Return the layers that an earlier run left, if it was on the same text, else none yet.

    - `folder`: where layers are stored.
    - `plan`: the conversion.
    - `text`: describes the text.
    - `left`: the layers that an earlier run of the same plan left, None where it left none.
    - `events`: receives `note`.
    """
    if left is not None and left.text != text:
        events.note("The calibration text changed since the run that was cut off: starting over.")
    elif left is not None:
        events.note(f"Going on after {len(left)} of {len(plan.before)} layers, which an earlier run calibrated.")
    done = left if left is not None and left.text == text else CalibratedLayers(folder, plan.digest, text)
    done.begin()
    return done


def calibration_target(plan: Plan) -> CalibrationTarget[Any]:
    """Return what a plan makes of its source's layers."""
    if not isinstance(plan.attention, MLAPlan):
        return HeadsTarget(source=plan.source, groups=plan.after[0].num_key_value_heads)
    wanted = plan.attention.spec
    return MLATarget(
        source=plan.source,
        shape=latent_shape(wanted),
        inverse_frequencies=wanted.inverse_frequencies,
        attention_factor=wanted.attention_factor,
        key_weight=wanted.key_weight,
    )


def _with_rope_pairs(
    plan: Plan,
    target: CalibrationTarget[Any],
    blocks: torch.Tensor,
    boundary: Boundary | None,
    done: CalibratedLayers,
    events: Events,
) -> CalibrationTarget[Any]:
    """Return the target with the rotary pairs that text chooses, where the plan asks for a choice.

    - `plan`: the conversion.
    - `target`: what the plan makes of the layers.
    - `blocks`: the text's tokens.
    - `boundary`: the token between documents that are kept apart, None for none.
    - `done`: remembers the choice.
    - `events`: receives `note`.
    """
    if not isinstance(target, MLATarget) or not plan.attention.chooses_rope_pairs:
        return target
    if not done.rope_pairs:
        events.note("Choosing the rope pairs of the shared rotary key.")
        places = plan.after[0].qk_rope_head_dim // 2
        done.rope_pairs = rope_pairs_by_text(target, blocks, boundary, places)
    return replace(target, shape=replace(target.shape, pairs=done.rope_pairs))


def _described(report: LayerReport) -> dict[str, Any]:
    explained = {
        name: {"keys": round(share.keys, 4), "values": round(share.values, 4)}
        for name, share in report.explained.items()
    }
    found = {"kept": explained, "choice": asdict(report.choice) if report.choice else None}
    return {**found, "changed": sorted(report.others)} if report.others else found
