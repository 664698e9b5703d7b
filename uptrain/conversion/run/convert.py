"""Convert a checkpoint: find it, plan it, write the result whole or not at all, resume what was cut off."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uptrain.architectures.head_order import move_indices
from uptrain.architectures.rope_parameters import with_rotation
from uptrain.checkpoint.checksum import Checksum, checksum_file
from uptrain.checkpoint.files import write_atomic
from uptrain.checkpoint.jsonfile import dump_json
from uptrain.checkpoint.manifest import append_stage, read_manifest
from uptrain.checkpoint.output_folder import check_out, friendly_errors, tidy
from uptrain.checkpoint.progress import State
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint, read_config
from uptrain.checkpoint.remote import open_headers
from uptrain.checkpoint.shared_work import CALIBRATION
from uptrain.checkpoint.sidecars import Sidecars, carry, reading_code, sidecars_of
from uptrain.checkpoint.source import Source, resolve
from uptrain.checkpoint.weight_files import INDEX
from uptrain.conversion.class_checks.rotation import check_rotation
from uptrain.conversion.class_checks.weights import check_classes
from uptrain.conversion.plan.planner import Plan, make_plan, plan_digest
from uptrain.conversion.request import Request, option_words
from uptrain.conversion.run.layers import choose_by_weights
from uptrain.conversion.run.pipeline import Pipeline, Progress
from uptrain.conversion.run.resume import Begun, begun
from uptrain.errors import CheckpointError, Interrupted, UsageError, needing
from uptrain.models.target import REMOTE_CODE

if TYPE_CHECKING:
    from uptrain.conversion.calibration.run import SharedCalibration
    from uptrain.conversion.calibration.store import CalibratedLayers

MEMORY = 4 * 2**30
"""Default bytes that a process may hold while it calibrates."""

Kept = dict[int, dict[str, dict[str, float]]]
"""By layer and method, the share of key and of value energy that was kept, or would have been."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion did: where the result is, its plan, and which shards an earlier run had finished.

    `sidecars` names the source's other files: those that went along, and those left out, by the reason why.
    """

    out: Path
    source: Source
    plan: Plan
    resumed: tuple[str, ...]
    kept: Kept
    sidecars: Sidecars


def plan_conversion(
    model: str,
    request: Request,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    dry: bool = False,
) -> tuple[Source, Checkpoint, Plan]:
    """Find and open `model` and plan its conversion, reading headers and config only.

    A Hub model is downloaded first, unless `dry`: then only its headers are, and the plan can't be run.

    Raises:
        UptrainError: the model can't be found or read, lacks weights, or the request is impossible for it.
    """
    if dry:
        source, checkpoint = open_headers(model, revision, allow_pickle)
    else:
        source = resolve(model, revision, allow_pickle)
        checkpoint = open_checkpoint(source.path, allow_pickle)
    plan = make_plan(checkpoint, request, source.name)
    return source, checkpoint, replace(plan, notes=check_classes(checkpoint, plan, source.name))


def check_memory(memory: int | None, request: Request) -> None:
    """Refuse a limit on what a calibration may hold where nothing is calibrated.

    Raises:
        UsageError: as said.
    """
    if memory is not None and not request.chosen_method.needs_text:
        raise UsageError(
            f"--memory is for --method calibrated, not {request.method}.",
            "Leave it out: other methods hold a few layers at a time, as --dry-run says.",
        )


def sidecars(source: Source, checkpoint: Checkpoint, dry: bool = False) -> Sidecars:
    """Return which files of `source` go along into a conversion; with `dry`, they need not be downloaded yet.

    Raises:
        CheckpointError: one of them can't be read.
    """
    read = (*checkpoint.files, *filter(None, [checkpoint.index]))
    return sidecars_of(source.path, source.listed, read, dry=dry)


def default_out(source: Source, plan: Plan) -> Path:
    """Return `./NAME-gqa4`, `./NAME-mqa` or, with the values a token that are cached, `./NAME-mla576`."""
    groups = plan.after[0].num_key_value_heads
    if plan.latent is not None:
        return Path(f"{source.short_name}-mla{plan.after[0].cache_values_per_token}")
    return Path(f"{source.short_name}-{'mqa' if groups == 1 else f'gqa{groups}'}")


def convert(
    model: str,
    out: str | Path | None = None,
    request: Request | None = None,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    join: bool = False,
    diagnose: bool = False,
    memory: int | None = None,
    on_progress: Progress = lambda count: None,
    on_layer: Callable[[int, int], None] = lambda done, layers: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Conversion:
    """Convert `model` (a folder, `demo` or a Hub id) and write the result to `out`, whole or not at all.

    With `join`, other processes may make the same call with the same `out` at the same time: they share the work, and
    each returns when `out` stands. With `diagnose`, every layer is measured too: what each method keeps of its energy,
    and how similar the heads are that come to share.

    Raises:
        UptrainError: as `plan_conversion`; OUT exists or lies in the source; the disk is full.
        Interrupted: stopped by Ctrl-C; the same call resumes.
    """
    source, checkpoint, plan = plan_conversion(
        model, request or Request(), revision=revision, allow_pickle=allow_pickle
    )
    return run_plan(
        source,
        checkpoint,
        plan,
        out,
        overwrite=overwrite,
        join=join,
        diagnose=diagnose,
        memory=memory,
        on_progress=on_progress,
        on_layer=on_layer,
        on_note=on_note,
    )


def run_plan(
    source: Source,
    checkpoint: Checkpoint,
    plan: Plan,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    join: bool = False,
    diagnose: bool = False,
    memory: int | None = None,
    on_progress: Progress = lambda count: None,
    on_layer: Callable[[int, int], None] = lambda done, layers: None,
    on_note: Callable[[str], None] = lambda text: None,
    shared: SharedCalibration | None = None,
) -> Conversion:
    """Run a plan made by `plan_conversion`, with `join` together with other processes. Raises as `convert` does.

    `memory`, in bytes, is what a calibration may hold (default: MEMORY); `on_layer` gets its layers done and all.
    `shared` lets calibrations of one source share what they have in common.
    """
    if diagnose and plan.latent is not None:
        raise UsageError(
            "--diagnose compares heads that come to share one, and --to mla has none.", "Leave --diagnose out."
        )
    check_memory(memory, plan.request)
    memory = MEMORY if memory is None else memory
    folder = Path(out) if out is not None else default_out(source, plan)
    with _resumable(), friendly_errors(folder):
        found = _committed(folder, source, checkpoint, plan)
        if found is not None:
            tidy(folder, (_calibration_of(folder),))
            return found
        check_out(folder, overwrite or join, source.path)
        check_rotation(checkpoint, plan, source.name)
        for note in plan.notes:
            on_note(note)
        beside = sidecars(source, checkpoint)
        filled, kept = plan, None
        with begun(
            folder,
            checkpoint,
            plan,
            (_command(source, plan.request), _asked(source, plan.request)),
            overwrite=overwrite,
            join=join,
            temporary_folders=(_calibration_of(folder),),
            others=beside.nbytes(source.path),
            on_note=on_note,
        ) as work:
            if work is None:
                on_note(f"Other processes have finished {folder}.")
            else:
                calibrating = partial(_calibrated, checkpoint, plan, folder, memory, on_layer, on_note, shared)
                filled, kept = _build(source, checkpoint, plan, work, beside, calibrating, on_progress, diagnose)
    resumed = work.resumed if work else ()
    return Conversion(folder, source, filled, resumed, _kept_in(folder) if kept is None else kept, beside)


def _build(
    source: Source,
    checkpoint: Checkpoint,
    plan: Plan,
    work: Begun,
    beside: Sidecars,
    calibrating: Callable[[], CalibratedLayers | None],
    on_progress: Progress,
    diagnose: bool,
) -> tuple[Plan, Kept | None]:
    """Do this process's part of the work; return the plan as it was run, and what was kept if it came to finish OUT."""
    folder, state = work.state.path.parent, work.state
    with work.worker.alone(CALIBRATION) as there:
        calibrated = calibrating() if there else None
    if not there:
        return plan, None
    filled = _with_slots(checkpoint, plan, calibrated)
    if filled is not plan:
        check_rotation(checkpoint, filled, source.name)
    runner = Pipeline(checkpoint, filled, folder, state, on_progress, calibrated, work.worker, diagnose)
    runner.run()
    while left := runner.left():
        # What is left is others' work; should they die, it is ours.
        work.worker.wait(left)
        runner.run()
    with work.worker.finishing() as needed:
        if not needed:
            return filled, None
        _write_companions(checkpoint, filled, beside, folder)
        move_indices(filled.source, _by_layer(state.orders), folder)
        notes = {"energy_kept": _kept(state), "head_similarity": _by_layer(state.similarity)}
        if state.orders:
            notes["head_order"] = _by_layer(state.orders)
        stage = {**_stage(source, checkpoint, filled, beside, state.sources), **notes}
        if calibrated is not None:
            stage["calibration"] = {"text": calibrated.text, "layers": calibrated.notes}
        append_stage(folder, checkpoint.path, stage, known=dict(state.shards))
        _check_unchanged(checkpoint, plan)
    return filled, _kept(state)


def _calibration_of(out: Path) -> Path:
    return out.with_name(out.name + ".uptrain-calibration")


def _command(source: Source, request: Request) -> str:
    running = Checksum()
    running.update(json.dumps([str(source.path), request.recorded()], sort_keys=True).encode())
    return running.text()


def _asked(source: Source, request: Request) -> str:
    revision = ["--revision", source.revision] if source.revision else []
    return shlex.join(["uptrain", "convert", source.name, *option_words(asdict(request)), *revision])


def _kept(state: State) -> Kept:
    return _by_layer(state.layers)


def _by_layer(notes: dict[str, Any]) -> dict[int, Any]:
    return {int(layer): found for layer, found in sorted(notes.items(), key=lambda item: int(item[0]))}


def _kept_in(folder: Path) -> Kept:
    stages = (read_manifest(folder) or {"stages": [{}]})["stages"]
    return _by_layer(stages[-1].get("energy_kept", {}))


def _committed(out: Path, source: Source, checkpoint: Checkpoint, plan: Plan) -> Conversion | None:
    """Return the conversion of an earlier run of this plan that was cut off when OUT stood already."""
    state = State(out, plan.digest)
    if state.load() is None or not state.shards.keys() >= plan.shards.keys():
        return None
    return Conversion(out, source, plan, tuple(plan.shards), _kept(state), sidecars(source, checkpoint))


def _check_unchanged(checkpoint: Checkpoint, plan: Plan) -> None:
    try:
        same = plan_digest(plan, checkpoint) == plan.digest
    except FileNotFoundError:
        same = False
    if not same or read_config(checkpoint.path) != checkpoint.config:
        raise CheckpointError(
            f"{checkpoint.path} changed while it was converted, so the result would be of neither.",
            "Run the same command again once nothing writes there.",
        )


def _calibrated(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    memory: int,
    on_layer: Callable[[int, int], None],
    on_note: Callable[[str], None],
    shared: SharedCalibration | None,
) -> CalibratedLayers | None:
    if not plan.request.chosen_method.needs_text or plan.before == plan.after:
        return None
    with needing(f"--method {plan.request.method}"):
        from uptrain.conversion.calibration.run import calibrate_plan
    return calibrate_plan(checkpoint, plan, _calibration_of(out), memory, on_layer, on_note, shared)


def _with_slots(checkpoint: Checkpoint, plan: Plan, calibrated: CalibratedLayers | None) -> Plan:
    """Put the rotary table of the model's own into the plan, where it asks for one."""
    if plan.latent is None or not plan.latent.own_slots:
        return plan
    slots = calibrated.slots if calibrated else choose_by_weights(checkpoint, plan)
    latent = plan.latent.with_slots(slots)
    return replace(plan, latent=latent, config=with_rotation(plan.config, latent.config))


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("Interrupted.", "Run the same command again; it goes on where it stopped.") from None


def _write_companions(checkpoint: Checkpoint, plan: Plan, beside: Sidecars, partial: Path) -> None:
    carry(checkpoint.path, beside, partial)
    for name in plan.target.code_files:
        shutil.copyfile(REMOTE_CODE / name, partial / name)
    whole = plan.whole_config
    code = {**reading_code(checkpoint.config), **whole.get("auto_map", {})}
    config = {**whole, "auto_map": code} if code else whole
    write_atomic(partial / "config.json", dump_json(config, allow_nan=True))
    if len(plan.shards) > 1:
        index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": plan.weight_map()}
        write_atomic(partial / INDEX, dump_json(index))


def _stage(
    source: Source, checkpoint: Checkpoint, plan: Plan, beside: Sidecars, sources: dict[str, str]
) -> dict[str, Any]:
    # An index that was not read, such as one left beside a single file, is no part of the source.
    wanted = (*beside.along, "config.json", *filter(None, [checkpoint.index]))
    others = [name for name in wanted if (checkpoint.path / name).is_file()]
    read = {name: sources[name] for name in checkpoint.files}
    files = {**read, **{name: checksum_file(checkpoint.path / name) for name in others}}
    return {
        "stage": "convert",
        "source": {
            "name": source.name,
            "origin": source.origin,
            "revision": source.revision,
            "model_type": str(checkpoint.config["model_type"]),
            "files": dict(sorted(files.items())),
        },
        "request": plan.request.recorded(plan.before != plan.after),
        "num_attention_heads": plan.after[0].num_attention_heads,
        "num_key_value_heads": {
            "before": plan.before[0].num_key_value_heads,
            "after": plan.after[0].num_key_value_heads,
        },
        **_latent_stage(plan),
        "cache_bytes_per_token": {"before": plan.cache_before, "after": plan.cache_after},
        "host": {"model_type": plan.holder, "remote_code": bool(plan.target.remote_code)},
        "plan": plan.digest,
    }


def _latent_stage(plan: Plan) -> dict[str, Any]:
    if plan.latent is None:
        return {}
    sizes = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    return {
        "latent": {
            **{name: getattr(plan.after[0], name) for name in sizes},
            "q_lora_rank": plan.latent.stored.q_lora_rank,
            "rope": plan.latent.target.form,
            "slots": plan.latent.target.slots,
            "residual_scale": plan.latent.alpha,
        }
    }
