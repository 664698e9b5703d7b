"""Build a conversion's folder: calibrate, write the shards, then the other files."""

from __future__ import annotations

from dataclasses import replace

from uptrain.architectures.head_order import move_indices
from uptrain.architectures.rope_parameters import with_rotation
from uptrain.checkpoint.manifest import append_stage
from uptrain.checkpoint.reader import Checkpoint, read_config
from uptrain.checkpoint.shared_work import CALIBRATION
from uptrain.conversion.calibration.store import CalibratedLayers
from uptrain.conversion.class_checks.rotation import check_rotation
from uptrain.conversion.plan.planner import Plan, plan_digest
from uptrain.conversion.run.companions import write_companions
from uptrain.conversion.run.job import Job
from uptrain.conversion.run.layers import LayerMaker, choose_by_weights
from uptrain.conversion.run.pipeline import Pipeline
from uptrain.conversion.run.resume import Begun
from uptrain.conversion.run.stage import Energy, by_layer, energy_of, stage_of
from uptrain.errors import CheckpointError, needing


def build(job: Job, work: Begun) -> tuple[Plan, Energy | None]:
    """Do this process's part of the work; return the plan as it was run.

    The explained energy comes with it if this process finished OUT, else None.
    """
    with work.worker.alone(CALIBRATION) as there:
        calibrated = calibrate(job) if there else None
    if not there:
        return job.plan, None
    plan = with_rotary_pairs(job.checkpoint, job.plan, calibrated)
    if plan is not job.plan:
        check_rotation(job.checkpoint, plan, job.source.name)
    layers = LayerMaker(job.checkpoint, plan, calibrated, job.options.diagnose)
    pipeline = Pipeline(job.checkpoint, plan, work.state, layers, work.worker, job.events)
    pipeline.run()
    while left := pipeline.left():
        # Other processes do what is left. If they die, this process does it.
        work.worker.wait(left)
        pipeline.run()
    with work.worker.finishing() as needed:
        if not needed:
            return plan, None
        _finish(job, plan, work, calibrated)
    return plan, energy_of(work.state)


def calibrate(job: Job) -> CalibratedLayers | None:
    """Calibrate the job's layers; return None where its method needs no text or no layer changes."""
    plan = job.plan
    if not plan.request.chosen_method.needs_text or plan.before == plan.after:
        return None
    with needing(f"--method {plan.request.method}"):
        from uptrain.conversion.calibration.run import calibrate_plan
    memory, shared = job.options.calibration_memory, job.options.shared
    return calibrate_plan(plan, job.calibration, memory, job.events, shared)


def with_rotary_pairs(checkpoint: Checkpoint, plan: Plan, calibrated: CalibratedLayers | None) -> Plan:
    """Return the plan with the rotary table of the model's own, where it asks for one."""
    attention = plan.attention.with_rope_pairs(
        lambda spec: calibrated.rope_pairs if calibrated else choose_by_weights(checkpoint, plan.source, spec)
    )
    if attention is plan.attention:
        return plan
    return replace(plan, attention=attention, config=with_rotation(plan.config, attention.write_config()))


def _finish(job: Job, plan: Plan, work: Begun, calibrated: CalibratedLayers | None) -> None:
    """Write all but the shards, and refuse a source that changed meanwhile."""
    folder, state, checkpoint = work.state.path.parent, work.state, job.checkpoint
    write_companions(checkpoint, plan, job.sidecars, folder)
    move_indices(plan.source, by_layer(state.orders), folder)
    stage = stage_of(job, plan, state)
    if calibrated is not None:
        stage["calibration"] = {"text": calibrated.text, "layers": calibrated.notes}
    append_stage(folder, checkpoint.path, stage, known=dict(state.shards))
    _check_unchanged(checkpoint, job.plan)


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
