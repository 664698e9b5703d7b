"""Calibrate a planned conversion: read text, and convert layer by layer, after those that an earlier run made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from uptrain import formatting
from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.nonfinite import ALLOW, finite
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.calibration.activation_cache import SourceRun
from uptrain.conversion.calibration.activations import stream_bytes
from uptrain.conversion.calibration.engine import LayerReport, Target, calibrate
from uptrain.conversion.calibration.memory import held_bytes, working_bytes
from uptrain.conversion.calibration.rope_pairs import slots_by_text
from uptrain.conversion.calibration.store import CalibratedLayers
from uptrain.conversion.calibration_settings import CalibrationSettings
from uptrain.conversion.malloc import give_back, giving_back
from uptrain.data.sources import parse_source
from uptrain.data.token_text import TokenText, read_tokens
from uptrain.errors import UsageError
from uptrain.methods.mla_conversion import latent_shape
from uptrain.models import devices, loading

if TYPE_CHECKING:
    from uptrain.conversion.plan.planner import Plan

BLOCK = 1024
"""Tokens of a calibration block, where the model's positions allow it."""
STRANGE = 0.6
"""Tokens a byte from which text is probably of a script or kind the tokenizer was not made for."""
LARGE = 2**32
"""Bytes of weights that take more than a few seconds to look at."""
SLOT_BLOCKS = 4
"""Blocks that the choice of rotary frequencies is made on."""


class SharedCalibration:
    """What calibrations of one source on one text have in common: its tokens, and the source's own run over them."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._text: TokenText | None = None
        self.run = SourceRun()

    def text(self, checkpoint: Checkpoint, plan: Plan) -> TokenText:
        """Return the tokens of the plan's text, read once; another source or text starts anew. Raises as below."""
        key = (checkpoint.path, plan.request.chosen_text, plan.request.chosen_tokens)
        if self._text is None or key != self._key:
            self._key, self._text = key, calibration_text(checkpoint, plan)
            self.run = SourceRun()
        return self._text


@devices.full_fp32()
@devices.enough_memory(
    "Calibrating", "Lower --memory or --calibration-tokens, or calibrate on --device cpu; finished layers stay."
)
def calibrate_plan(
    checkpoint: Checkpoint,
    plan: Plan,
    folder: Path,
    memory: int,
    on_layer: Callable[[int, int], None],
    on_note: Callable[[str], None],
    shared: SharedCalibration | None = None,
) -> CalibratedLayers:
    """Calibrate every layer of `plan` but those that an earlier run of it, on the same text, left in `folder`.

    `memory` is what this process may hold, in bytes; activations for which that leaves no room go to files beside the
    layers. `on_layer` is called with the layers done and all; `on_note` with a sentence worth the user's attention.
    `shared` is what other calibrations of the same source leave for this one.

    Raises:
        UptrainError: the text is unfit, activations are not finite, or the disk is too small for them.
    """
    done = CalibratedLayers.left(folder, plan.digest)
    if done is not None and len(done) == len(plan.before):
        on_note("Calibration was finished by an earlier run.")
        return done
    if done is None and not plan.request.allow_nonfinite:
        _refuse_nonfinite(checkpoint, on_note)
    loading.quiet()
    text = calibration_text(checkpoint, plan) if shared is None else shared.text(checkpoint, plan)
    if text.bytes and len(text.ids) / text.bytes > STRANGE:
        on_note(
            f"The calibration text takes {len(text.ids) / text.bytes:.2f} tokens a byte: it may be of a script or kind "
            "this model was not trained on, and fit it badly."
        )
    longest = plan.source.config.get(plan.source.family.keys.max_position_embeddings)
    length = min(BLOCK, longest if isinstance(longest, int) else BLOCK)
    count = len(text.ids) // length
    if count < 2:
        raise UsageError(
            f"--calibrate {plan.request.chosen_text} has {len(text.ids)} tokens, less than two blocks of {length}.",
            "Give more text, or raise --calibration-tokens.",
        )
    blocks = torch.from_numpy(text.ids[: count * length]).view(count, length)
    done = _begun(folder, plan, blocks, done, on_note)
    target, run = _target(plan), None if shared is None else shared.run
    give_back()  # What the tokenizer has done with.
    working = working_bytes(checkpoint, target, length, count)
    room = memory - held_bytes() - working + (run.nbytes if run else 0)
    if room < 0:
        on_note(
            f"Converting one layer of this model will hold about {formatting.size(memory - room)}, more than the "
            f"{formatting.size(memory)} of --memory."
        )
    settings = CalibrationSettings(memory=room, folder=folder, seed=plan.request.chosen_seed)
    if plan.request.repair_steps is not None:
        settings = replace(settings, repair_steps=plan.request.repair_steps)
    # Where all that may be kept in memory leaves no room for what the C library keeps of what is freed.
    all_kept = stream_bytes((*blocks.shape, target.source.hidden_size), 0 if run is None else len(plan.before))
    with giving_back() if room < all_kept + working else nullcontext():
        if plan.latent is not None and plan.latent.own_slots:
            if not done.slots:
                on_note("Choosing which rotary frequencies to keep.")
                pairs = plan.latent.target.qk_rope_head_dim // 2
                done.slots = slots_by_text(checkpoint, target, blocks[:SLOT_BLOCKS], pairs)
            target = _target(replace(plan, latent=plan.latent.with_slots(done.slots)))
        for _, heads, report in calibrate(checkpoint, target, blocks, settings, run=run, made=done.made):
            done.add(heads, _noted(report))
            on_layer(len(done), len(plan.before))
    return done


def _refuse_nonfinite(checkpoint: Checkpoint, on_note: Callable[[str], None]) -> None:
    """Look for NaN before hours are spent, though writing would find it too."""
    size = sum(info.nbytes for info in checkpoint.tensors.values())
    if size > LARGE:
        on_note(f"Looking for NaN and infinity in {formatting.size(size)} of weights.")
    for name in checkpoint.tensors:
        for _ in finite(checkpoint, name, ALLOW):
            pass


def _begun(
    folder: Path, plan: Plan, blocks: torch.Tensor, left: CalibratedLayers | None, on_note: Callable[[str], None]
) -> CalibratedLayers:
    """Return what an earlier run `left` if it was on the same text, or begin anew."""
    digest = Checksum()
    digest.update(blocks.numpy().tobytes())
    text = {"name": plan.request.chosen_text, "tokens": int(blocks.numel()), "token_digest": digest.text()}
    if left is not None and left.text != text:
        on_note("The calibration text changed since the run that was cut off: starting over.")
    elif left is not None:
        on_note(f"Going on after {len(left)} of {len(plan.before)} layers, which an earlier run calibrated.")
    done = left if left is not None and left.text == text else CalibratedLayers(folder, plan.digest, text)
    done.begin()
    return done


def _target(plan: Plan) -> Target:
    target = Target(plan.source, plan.after[0].num_key_value_heads)
    if plan.latent is None:
        return target
    wanted = plan.latent.target
    return replace(
        target,
        latent=latent_shape(wanted),
        frequencies=wanted.frequencies,
        rotary_factor=wanted.rotary_factor,
        key_weight=wanted.key_weight,
    )


def calibration_text(checkpoint: Checkpoint, plan: Plan) -> TokenText:
    """Tokenise the text that `--calibrate` names with the source's own tokenizer.

    Raises:
        UsageError: it names no text, or text that is empty or binary.
    """
    name = plan.request.chosen_text
    try:
        source = parse_source("python-stdlib" if name == "builtin" else name)
    except ValueError:
        raise UsageError(f"--calibrate {name} is not a text.", "Name a file, a dataset, or 'builtin'.") from None
    tokenizer = loading.load_tokenizer(checkpoint.path)
    try:
        return read_tokens([source], tokenizer, plan.request.chosen_tokens)
    except UsageError as error:
        raise UsageError(f"--calibrate {name}: {error.message}", error.hint) from None


def _noted(report: LayerReport) -> dict[str, Any]:
    kept = {
        name: {"keys": round(share.keys, 4), "values": round(share.values, 4)} for name, share in report.kept.items()
    }
    return {"kept": kept, "choice": asdict(report.choice) if report.choice else None}
