"""Calibrate a planned conversion: read text, convert layer by layer, and keep each layer's heads until they are joined.

Layers wait in a folder beside OUT, so that a run cut off after calibration needs only to write; it goes with success.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from uptrain import models, words
from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.jsonfile import dump_json, read_json
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.writer import write_atomic
from uptrain.data import TokenText, read_tokens
from uptrain.errors import UsageError
from uptrain.heap import give_back, giving_back
from uptrain.latent_packing import LatentHeads
from uptrain.methods.calibrate import LayerReport, Target, calibrate
from uptrain.methods.footprint import held_bytes, hidden_size_of, working_bytes
from uptrain.methods.latent_bridge import latent_shape
from uptrain.methods.settings import CalibrationSettings
from uptrain.methods.slots import slots_by_text
from uptrain.methods.source_run import SourceRun
from uptrain.methods.streams import stream_bytes
from uptrain.packing import Heads, LayerHeads
from uptrain.recipe_schema import parse_source

if TYPE_CHECKING:
    from uptrain.plan import Plan

BLOCK = 1024
"""Tokens of a calibration block, where the model's positions allow it."""
STRANGE = 0.6
"""Tokens a byte from which text is probably of a script or kind the tokenizer was not made for."""
SLOT_BLOCKS = 4
"""Blocks that the choice of rotary frequencies is made on."""
DONE = "calibration.json"


@dataclass(frozen=True)
class CalibratedLayers:
    """The heads that calibration made, kept as .npz files of float32, and what was noted about text and layers."""

    folder: Path
    notes: dict[str, Any]

    def read(self, layer: int) -> LayerHeads:
        """Return one layer's heads."""
        with np.load(self.folder / f"layer-{layer}.npz", allow_pickle=False) as stored:
            parts = {part: Heads(stored[part], stored.get(f"{part}_bias")) for part in "qkvo"}
        return LayerHeads(**parts)

    def read_latent(self, layer: int) -> LatentHeads:
        """Return one layer's latent."""
        with np.load(self.folder / f"layer-{layer}.npz", allow_pickle=False) as stored:
            return LatentHeads(**{name: stored[name] for name in stored.files})

    def kept(self, layer: int) -> dict[str, dict[str, float]]:
        """Return the share of key and value energy that calibrated, svd and mean keep in one layer."""
        found: dict[str, dict[str, float]] = self.notes["layers"][layer]["kept"]
        return found


class SharedCalibration:
    """What calibrations of one source on one text have in common: its tokens, and the source's own run over them."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._text: TokenText | None = None
        self.run = SourceRun()

    def text(self, checkpoint: Checkpoint, plan: Plan) -> TokenText:
        """Return the tokens of the plan's text, read once; another source or text starts anew. Raises as below."""
        key = (checkpoint.path, plan.request.calibrate, plan.request.calibration_tokens)
        if self._text is None or key != self._key:
            self._key, self._text = key, calibration_text(checkpoint, plan)
            self.run = SourceRun()
        return self._text


def calibrate_plan(
    checkpoint: Checkpoint,
    plan: Plan,
    folder: Path,
    memory: int,
    on_layer: Callable[[int, int], None],
    on_note: Callable[[str], None],
    shared: SharedCalibration | None = None,
) -> CalibratedLayers:
    """Calibrate every layer of `plan`, or take what an earlier run of the same plan left in `folder`.

    `memory` is what this process may hold, in bytes; activations for which that leaves no room go to files beside the
    layers. `on_layer` is called with the layers done and all; `on_note` with a sentence worth the user's attention.
    `shared` is what other calibrations of the same source leave for this one.

    Raises:
        UptrainError: the text is unfit, activations are not finite, or the disk is too small for them.
    """
    if (folder / DONE).is_file():
        notes = read_json(folder / DONE)
        if notes.get("plan") == plan.digest:
            on_note("Calibration was finished by an earlier run.")
            return CalibratedLayers(folder, notes)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    models.quiet()
    text = calibration_text(checkpoint, plan) if shared is None else shared.text(checkpoint, plan)
    if text.bytes and len(text.ids) / text.bytes > STRANGE:
        on_note(
            f"The calibration text takes {len(text.ids) / text.bytes:.2f} tokens a byte: it may be of a script or kind "
            "this model was not trained on, and fit it badly."
        )
    longest = checkpoint.config.get(plan.architecture.keys.max_position_embeddings)
    length = min(BLOCK, longest if isinstance(longest, int) else BLOCK)
    count = len(text.ids) // length
    if count < 2:
        raise UsageError(
            f"--calibrate {plan.request.calibrate} has {len(text.ids)} tokens, less than two blocks of {length}.",
            "Give more text, or raise --calibration-tokens.",
        )
    target, run = _target(plan), None if shared is None else shared.run
    give_back()  # What the tokenizer has done with.
    working = working_bytes(checkpoint, target, length, count)
    room = memory - held_bytes() - working + (run.nbytes if run else 0)
    if room < 0:
        on_note(
            f"Converting one layer of this model will hold about {words.size(memory - room)}, more than the "
            f"{words.size(memory)} of --memory."
        )
    settings = CalibrationSettings(memory=room, folder=folder, seed=plan.request.seed)
    if plan.request.repair_steps is not None:
        settings = replace(settings, repair_steps=plan.request.repair_steps)
    blocks = torch.from_numpy(text.ids[: count * length]).view(count, length)
    # Where all that may be kept in memory leaves no room for what the C library keeps of what is freed.
    all_kept = stream_bytes((*blocks.shape, hidden_size_of(checkpoint, target)), 0 if run is None else len(plan.before))
    slots: tuple[int, ...] = ()
    reports = []
    with giving_back() if room < all_kept + working else nullcontext():
        if plan.latent is not None and plan.latent.own_slots:
            on_note("Choosing which rotary frequencies to keep.")
            slots = slots_by_text(checkpoint, target, blocks[:SLOT_BLOCKS], plan.latent.target.qk_rope_head_dim // 2)
            target = _target(replace(plan, latent=plan.latent.with_slots(slots)))
        for layer, heads, report in calibrate(checkpoint, target, blocks, settings, run=run):
            _save(folder / f"layer-{layer}.npz", heads)
            reports.append(_noted(report))
            on_layer(len(reports), len(plan.before))
    digest = Checksum()
    digest.update(blocks.numpy().tobytes())
    notes = {
        "plan": plan.digest,
        "text": {"name": plan.request.calibrate, "tokens": int(blocks.numel()), "token_digest": digest.text()},
        "slots": slots,
        "layers": reports,
    }
    write_atomic(folder / DONE, dump_json(notes))
    return CalibratedLayers(folder, notes)


def _target(plan: Plan) -> Target:
    target = Target(plan.architecture, plan.prefix, plan.before, plan.after[0].num_key_value_heads)
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
    name = plan.request.calibrate
    try:
        source = parse_source("python-stdlib" if name == "builtin" else name)
    except ValueError:
        raise UsageError(f"--calibrate {name} is not a text.", "Name a file, a dataset, or 'builtin'.") from None
    tokenizer = models.load_tokenizer(checkpoint.path)
    try:
        return read_tokens([source], tokenizer, plan.request.calibration_tokens)
    except UsageError as error:
        raise UsageError(f"--calibrate {name}: {error.message}", error.hint) from None


def _save(path: Path, heads: LayerHeads | LatentHeads) -> None:
    if isinstance(heads, LatentHeads):
        found = {name: array for name, array in vars(heads).items() if array is not None}
        np.savez(path, **{name: np.asarray(array, np.float32) for name, array in found.items()})  # type: ignore[arg-type]
        return
    arrays = {part: heads.part(part).weight for part in "qkvo"}
    arrays |= {f"{part}_bias": bias for part in "qkvo" if (bias := heads.part(part).bias) is not None}
    np.savez(path, **{name: np.asarray(array, np.float32) for name, array in arrays.items()})  # type: ignore[arg-type]


def _noted(report: LayerReport) -> dict[str, Any]:
    kept = {
        name: {"keys": round(share.keys, 4), "values": round(share.values, 4)} for name, share in report.kept.items()
    }
    return {"kept": kept, "choice": json.loads(json.dumps(asdict(report.choice))) if report.choice else None}
