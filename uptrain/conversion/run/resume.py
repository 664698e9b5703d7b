"""Enter a conversion's folder, alone or with other processes, and continue what an earlier run left there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from uptrain.checkpoint.checksum import DEFAULT, algorithm_of, checksum_file
from uptrain.checkpoint.manifest import read_manifest
from uptrain.checkpoint.output_folder import STATE, empty, leave, partial_of, remove, staged_output, taken
from uptrain.checkpoint.progress import Earlier, State
from uptrain.checkpoint.reflink import can_clone
from uptrain.checkpoint.shared_folder import enter_shared_folder
from uptrain.checkpoint.shared_work import SharedState, SharedWorker, SoleWorker
from uptrain.conversion.calibration.store import NOTES, CalibratedLayers
from uptrain.conversion.plan.operations import unchanged_spans
from uptrain.conversion.plan.planner import Plan
from uptrain.conversion.run.job import Job
from uptrain.errors import CheckpointError, UptrainError, UsageError


@dataclass(frozen=True)
class Begun:
    """A conversion's folder that is ready to be worked in.

    `resumed` names the shards that an earlier run had finished, `worker` locks the pieces of work for this process.
    """

    state: State
    resumed: tuple[str, ...]
    worker: SoleWorker | SharedWorker


@contextmanager
def begun(job: Job) -> Iterator[Begun | None]:
    """Enter OUT.partial for as long as the block runs; yield None where other processes have finished OUT.

    A run that works alone makes OUT of the folder at the end. Workers do it together, in their `finishing`.
    The calibration's folder is removed then. A run that ends with an error before it finished anything removes
    what it made, so that any other command can follow.

    Raises:
        UptrainError: OUT exists, is being written, or holds another plan's unfinished conversion; the disk is full.
    """
    if job.options.join:
        with _begun_together(job) as work:
            yield work
        return
    folders = (job.calibration,)
    state = State(partial_of(job.out), job.plan.digest, *job.command)
    with (
        staged_output(job.out, job.overwrite, lambda _: _left(job, state), folders),
        _without_a_trace(lambda: _leave_alone(job, state)),
    ):
        yield Begun(state, _begin(job, state), SoleWorker())


@contextmanager
def _begun_together(job: Job) -> Iterator[Begun | None]:
    """Enter OUT.partial together with other processes, as `begun` does."""
    state, resumed = State(partial_of(job.out), job.plan.digest, *job.command), tuple[str, ...]()

    def prepare(first: bool) -> None:
        nonlocal resumed
        earlier = None if first else state.load()
        if first:
            empty(partial_of(job.out), _left(job, state))
            with _without_a_trace(lambda: _leave_alone(job, state)):
                resumed = _begin(job, state)
        elif earlier is None or earlier.plan != job.plan.digest:
            raise taken(job.out)

    folders = (job.calibration,)
    shared = SharedWorker(job.out, job.overwrite, folders, job.events.note)
    with enter_shared_folder(shared, lambda: _stands(job.out, job.plan), prepare) as worker:
        if worker is None:
            yield None
        else:
            with _without_a_trace(lambda: worker.remove_unused(lambda: _unused(job, state))):
                yield Begun(SharedState(worker, job.plan.digest, *job.command), resumed, worker)

    if not _stands(job.out, job.plan):
        raise UptrainError(
            f"{partial_of(job.out)} was taken away while it was being written.", "Run the same command again."
        )


def _unused(job: Job, state: State) -> bool:
    """Say whether nothing was finished, and then remove a calibration's folder that holds nothing."""
    if _worked(state.load(), job.calibration):
        return False
    if job.calibration.is_dir() and not (job.calibration / NOTES).exists():
        remove(job.calibration)
    return True


def _leave_alone(job: Job, state: State) -> None:
    """Remove OUT.partial if nothing was finished in it."""
    if _unused(job, state):
        empty(state.path.parent, ())
        leave(state.path.parent)


@contextmanager
def _without_a_trace(leave_unused: Callable[[], None]) -> Iterator[None]:
    """Call what removes OUT.partial, if nothing was finished in it, after an error."""
    try:
        yield
    except Exception:
        with suppress(OSError, UptrainError):  # what went wrong before is what to say
            leave_unused()
        raise


def _worked(earlier: Earlier | None, calibration: Path) -> bool:
    """Say whether an earlier run finished a shard or, in the folder `calibration`, a layer."""
    if earlier is None:
        return False
    return earlier.worked or CalibratedLayers.left(calibration, earlier.plan) is not None


def _stands(out: Path, plan: Plan) -> bool:
    try:
        stages = (read_manifest(out) or {"stages": []})["stages"]
    except CheckpointError:  # not ours, or about to be replaced
        return False
    return any(stage.get("plan") == plan.digest for stage in stages[-1:])


def _left(job: Job, state: State) -> tuple[str, ...]:
    """Return the files of OUT.partial that an earlier run of this plan finished."""
    earlier = state.load()
    if earlier is None:
        return ()
    if earlier.plan == job.plan.digest:
        _drop_damaged(state, job.plan)
        return STATE, *state.shards
    if not _worked(earlier, job.calibration):
        return ()
    if earlier.command == state.command:
        job.events.note("The source or uptrain changed since the interrupted run: starting over.")
    elif not job.overwrite:
        asked = f": {earlier.asked}" if earlier.asked else ""
        raise UsageError(
            f"{state.path.parent} holds an unfinished conversion of another plan{asked}.",
            f"Repeat that command to finish it, or add --overwrite (or delete {state.path.parent}) to start this one.",
        )
    return ()


def _drop_damaged(state: State, plan: Plan) -> None:
    """Forget the finished shards whose bytes are no longer what was written."""
    for name, digest in list(state.shards.items()):
        path = state.path.parent / name
        if (
            name not in plan.shards
            or not path.is_file()
            or checksum_file(path, algorithm_of(digest) or DEFAULT) != digest
        ):
            del state.shards[name]


def _begin(job: Job, state: State) -> tuple[str, ...]:
    """Write the state to begin with; return the shards that an earlier run finished."""
    resumed = tuple(state.shards)
    _check_space(job, state.path.parent, resumed)
    state.save()
    return resumed


def _check_space(job: Job, partial: Path, resumed: tuple[str, ...]) -> None:
    left = [each for name, operations in job.plan.shards.items() if name not in resumed for each in operations]
    others = job.sidecars.nbytes(job.source.path)
    needed, free = sum(operation.output.nbytes for operation in left) + others + 2**20, shutil.disk_usage(partial).free
    if needed > free:
        # Not to the byte: what lies otherwise in blocks is copied all the same, and a disk that gets full can be freed.
        spans = unchanged_spans(left, job.checkpoint).values()
        files = {path for path in {span.path for span in spans} if can_clone(path, partial)}
        needed -= sum(span.nbytes for span in spans if span.path in files)
    if needed > free:
        raise UptrainError(
            f"The disk is too full: {partial} needs {needed:,} bytes and {free:,} are free, {needed - free:,} short.",
            "Free space and run the same command again, or choose an OUT on another disk.",
        )
