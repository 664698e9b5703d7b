"""Calibrate a planned conversion: read text, and convert the layers that an earlier run did not."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from uptrain import formatting
from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.nonfinite import ALLOW, finite
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.calibration.activation_cache import ActivationCache
from uptrain.conversion.calibration.activations import activation_bytes
from uptrain.conversion.calibration.engine import LayerReport, calibrate
from uptrain.conversion.calibration.isolation import boundary_in
from uptrain.conversion.calibration.memory import held_bytes, mask_bytes, working_bytes
from uptrain.conversion.calibration.rope_pairs import rope_pairs_by_text
from uptrain.conversion.calibration.store import CalibratedLayers
from uptrain.conversion.calibration.targets import CalibrationTarget, HeadsTarget, MLATarget
from uptrain.conversion.calibration_settings import BLOCK_STEPS, CalibrationSettings
from uptrain.conversion.malloc import give_back, giving_back
from uptrain.conversion.plan.mla import MLAPlan
from uptrain.data.boundary import Boundary
from uptrain.data.sources import text_of_option
from uptrain.data.token_text import TokenText, read_tokens
from uptrain.errors import UsageError
from uptrain.methods.mla_conversion import latent_shape
from uptrain.models import devices, loading

if TYPE_CHECKING:
    from uptrain.conversion.plan.planner import Plan

BLOCK = 1024
"""Tokens of a calibration block, where the model's positions allow it."""
STRANGE = 0.6
"""Tokens per byte from which text is probably of a script or kind the tokenizer was not made for."""
LARGE = 2**32
"""Bytes of weights that take more than a few seconds to read."""
ROPE_BLOCKS = 4
"""Blocks of text by which rotary pairs are chosen."""


class SharedCalibration:
    """What calibrations of one source on one text share: the tokens, and the activations of the source's layers."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._text: TokenText | None = None
        self.cache = ActivationCache()

    def text(self, plan: Plan) -> TokenText:
        """Return the tokens of the plan's text, read once; another source or text begins again. Raises as below."""
        key = (plan.source.checkpoint.path, plan.request.chosen_text, plan.request.chosen_tokens)
        if self._text is None or key != self._key:
            self._key, self._text = key, calibration_text(plan)
            self.cache = ActivationCache()
        return self._text


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
    blocks = _blocks(plan, text, events)
    boundary = boundary_in(plan.source, blocks, events)
    done = _begun(folder, plan, blocks, boundary, done, events)
    target, cache = calibration_target(plan), None if shared is None else shared.cache
    give_back()  # What the tokenizer has done with.
    working = working_bytes(target, blocks.shape[1], blocks.shape[0], plan.request.repairs_blocks)
    if boundary is not None:
        divided = int(boundary.starts(blocks.numpy()).any(axis=1).sum())
        working += mask_bytes(target, blocks.shape[1], divided)
    room = memory - held_bytes() - working + (cache.nbytes if cache else 0)
    if room < 0:
        events.note(
            f"Converting one layer of this model will hold about {formatting.size(memory - room)}, more than the "
            f"{formatting.size(memory)} of --memory."
        )
    settings = replace(_settings(plan, room, folder), boundary=boundary)
    # Where all that memory may hold leaves no room for what the C library keeps of freed memory.
    cached = 0 if cache is None else len(plan.before)
    every = activation_bytes((*blocks.shape, plan.source.hidden_size), cached)
    with giving_back() if room < every + working else nullcontext():
        target = _with_rope_pairs(plan, target, blocks[:ROPE_BLOCKS], boundary, done, events)
        for _, heads, report in calibrate(target, blocks, settings, cache, done.made):
            done.add(heads, _described(report), report.others)
            events.layer(len(done), len(plan.before))
    return done


def _settings(plan: Plan, room: int, folder: Path) -> CalibrationSettings:
    """Return what calibration tries, with `room` bytes for activations, which otherwise are files in `folder`."""
    request = plan.request
    settings = CalibrationSettings(memory=room, folder=folder, seed=request.chosen_seed)
    if request.repair_steps is not None:
        settings = replace(settings, repair_steps=request.repair_steps)
    return replace(settings, block_steps=BLOCK_STEPS) if request.repairs_blocks else settings


def _blocks(plan: Plan, text: TokenText, events: Events) -> torch.Tensor:
    """Return the text's tokens in blocks (n, T) int64, n ≥ 2.

    Raises:
        UsageError: the text has less than two blocks.
    """
    if text.bytes and len(text.ids) / text.bytes > STRANGE:
        events.note(
            f"The calibration text takes {len(text.ids) / text.bytes:.2f} tokens per byte: it may be of a script or "
            "kind this model was not trained on, and fit it badly."
        )
    longest = plan.source.config.get(plan.source.family.keys.max_position_embeddings)
    length = min(BLOCK, longest if isinstance(longest, int) else BLOCK)
    count = len(text.ids) // length
    if count < 2:
        raise UsageError(
            f"--calibrate {plan.request.chosen_text} has {len(text.ids)} tokens, less than two blocks of {length}.",
            "Give more text, or raise --calibration-tokens.",
        )
    return torch.from_numpy(text.ids[: count * length]).view(count, length)


def _refuse_nonfinite(checkpoint: Checkpoint, events: Events) -> None:
    """Refuse NaN before hours are spent, though writing would find it too."""
    size = sum(info.nbytes for info in checkpoint.tensors.values())
    if size > LARGE:
        events.note(f"Looking for NaN and infinity in {formatting.size(size)} of weights.")
    for name in checkpoint.tensors:
        for _ in finite(checkpoint, name, ALLOW):
            pass


def _begun(
    folder: Path,
    plan: Plan,
    blocks: torch.Tensor,
    boundary: Boundary | None,
    left: CalibratedLayers | None,
    events: Events,
) -> CalibratedLayers:
    """Return the layers that an earlier run left, if it was on the same text, else none yet.

    - `folder`: where layers are stored.
    - `plan`: the conversion.
    - `blocks`: the text's tokens.
    - `boundary`: the token between documents that are kept apart, None for none.
    - `left`: the layers that an earlier run of the same plan left, None where it left none.
    - `events`: receives `note`.
    """
    digest = Checksum()
    digest.update(blocks.numpy().tobytes())
    text = {"name": plan.request.chosen_text, "tokens": int(blocks.numel()), "token_digest": digest.text()}
    if boundary is not None:
        text["documents"] = "apart"
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


def calibration_text(plan: Plan) -> TokenText:
    """Tokenize the text that `--calibrate` names with the source's own tokenizer.

    Raises:
        UsageError: it names no text, or text that is empty or binary.
    """
    name = plan.request.chosen_text
    source = text_of_option("--calibrate", "python-stdlib" if name == "builtin" else name)
    tokenizer = loading.load_tokenizer(plan.source.checkpoint.path)
    try:
        return read_tokens([source], tokenizer, plan.request.chosen_tokens)
    except UsageError as error:
        raise UsageError(f"--calibrate {name}: {error.message}", error.hint) from None


def _described(report: LayerReport) -> dict[str, Any]:
    explained = {
        name: {"keys": round(share.keys, 4), "values": round(share.values, 4)}
        for name, share in report.explained.items()
    }
    found = {"kept": explained, "choice": asdict(report.choice) if report.choice else None}
    return {**found, "changed": sorted(report.others)} if report.others else found
