"""Convert a checkpoint: plan it, write the result whole or not at all, and go on after an interrupted run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from uptrain.checkpoint.events import Events
from uptrain.checkpoint.output_folder import check_out, friendly_errors, tidy
from uptrain.checkpoint.progress import State
from uptrain.checkpoint.sidecars import Sidecars
from uptrain.checkpoint.source import Source
from uptrain.conversion.class_checks.rotation import check_rotation
from uptrain.conversion.plan.planner import Plan
from uptrain.conversion.request import Request
from uptrain.conversion.run.build import build
from uptrain.conversion.run.job import Job, calibration_folder
from uptrain.conversion.run.options import RunOptions
from uptrain.conversion.run.prepare import Planned, default_out, plan_conversion, sidecars
from uptrain.conversion.run.resume import begun
from uptrain.conversion.run.stage import Energy, energy_in, energy_of
from uptrain.errors import Interrupted


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion did.

    - `out`: the result's folder.
    - `source`: where the source is.
    - `plan`: the plan as it was run.
    - `resumed`: the shards that an earlier run had finished.
    - `energy`: by layer and method, the share of key and value energy that the method explains.
    - `sidecars`: the source's other files: those that were copied, and those left out with the reason.
    """

    out: Path
    source: Source
    plan: Plan
    resumed: tuple[str, ...]
    energy: Energy
    sidecars: Sidecars


def convert(
    model: str,
    out: str | Path | None = None,
    request: Request | None = None,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    options: RunOptions = RunOptions(),
    events: Events = Events(),
) -> Conversion:
    """Convert `model` and write the result to `out`, whole or not at all.

    - `model`: a folder, `demo` or a Hub id.
    - `out`: the result's folder; None for a name made of the model's and the target's, in the current folder.
    - `request`: the target and the method; None for `Request()`.
    - `revision`: the Hub's branch, tag or commit.
    - `allow_pickle`: read `.bin` weights too, with torch's restricted unpickler.
    - `overwrite`: replace `out` if it exists.
    - `options`: how to run, such as together with other processes.
    - `events`: receives `bytes`, `layer` and `note`.

    Raises:
        UptrainError: as `plan_conversion`; OUT exists or lies in the source; the disk is full.
        Interrupted: stopped by Ctrl-C; the same call goes on where it stopped.
    """
    planned = plan_conversion(model, request or Request(), revision=revision, allow_pickle=allow_pickle)
    return run_plan(planned, out, overwrite=overwrite, options=options, events=events)


def run_plan(
    planned: Planned,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    options: RunOptions = RunOptions(),
    events: Events = Events(),
) -> Conversion:
    """Run a plan that `plan_conversion` made. Parameters and errors are those of `convert`."""
    source, checkpoint, plan = planned
    options.check(plan.request)
    folder = Path(out) if out is not None else default_out(source, plan)
    with _resumable(), friendly_errors(folder):
        found = _committed(folder, planned)
        if found is not None:
            tidy(folder, (calibration_folder(folder),))
            return found
        check_out(folder, overwrite or options.join, source.path)
        check_rotation(checkpoint, plan, source.name)
        for note in plan.notes:
            events.note(note)
        job = Job(
            source=source, checkpoint=checkpoint, plan=plan, out=folder, overwrite=overwrite,
            sidecars=sidecars(source, checkpoint), options=options, events=events,
        )  # fmt: skip
        built, energy = plan, None
        with begun(job) as work:
            if work is None:
                events.note(f"Other processes have finished {folder}.")
            else:
                built, energy = build(job, work)
    return Conversion(
        out=folder, source=source, plan=built, resumed=work.resumed if work else (),
        energy=energy_in(folder) if energy is None else energy, sidecars=job.sidecars,
    )  # fmt: skip


def _committed(out: Path, planned: Planned) -> Conversion | None:
    """Return the conversion of an earlier run of this plan that was interrupted when OUT stood already."""
    source, checkpoint, plan = planned
    state = State(out, plan.digest)
    if state.load() is None or not state.shards.keys() >= plan.shards.keys():
        return None
    return Conversion(
        out=out, source=source, plan=plan, resumed=tuple(plan.shards), energy=energy_of(state),
        sidecars=sidecars(source, checkpoint),
    )  # fmt: skip


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("Interrupted.", "Run the same command again; it goes on where it stopped.") from None
