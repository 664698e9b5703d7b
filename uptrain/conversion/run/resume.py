"""Begin a conversion's folder, alone or with other processes, and go on with what earlier runs left there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from uptrain.checkpoint.checksum import DEFAULT, algorithm_of, checksum_file
from uptrain.checkpoint.manifest import read_manifest
from uptrain.checkpoint.output_folder import STATE, empty, leave, partial_of, remove, staged_output, taken
from uptrain.checkpoint.progress import Earlier, State
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.reflink import can_clone
from uptrain.checkpoint.shared_folder import enter_shared_folder
from uptrain.checkpoint.shared_work import SharedState, SharedWorker, SoleWorker
from uptrain.conversion.calibration.store import NOTES, CalibratedLayers
from uptrain.conversion.plan.operations import unchanged_spans
from uptrain.conversion.plan.planner import Plan
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
def begun(
    out: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    command: tuple[str, str],
    *,
    overwrite: bool,
    join: bool,
    temporary_folders: tuple[Path, ...],
    others: int,
    on_note: Callable[[str], None],
) -> Iterator[Begun | None]:
    """Enter OUT.partial for as long as the block runs; with `join`, yield None where others have finished OUT.

    Without `join`, OUT is made of it at the end; with it, by the worker's `finishing`. Then `temporary_folders` are
    removed.
    `command` is that of `State`, and its words; `others` are the bytes of the files that go along with the weights. A
    run that ends with an error before it finished anything leaves nothing, and binds nobody.

    Raises:
        UptrainError: OUT exists, is being written, or holds another plan's unfinished conversion; the disk is full.
    """
    state, resumed = State(partial_of(out), plan.digest, *command), tuple[str, ...]()

    def unused() -> bool:
        if _worked(state.load(), temporary_folders):
            return False
        for folder in temporary_folders:
            if folder.is_dir() and not (folder / NOTES).exists():
                remove(folder)
        return True

    def leave_alone() -> None:
        if unused():
            empty(state.path.parent, ())
            leave(state.path.parent)

    left = partial(_left, state, plan, overwrite, temporary_folders, on_note)
    if not join:
        with staged_output(out, overwrite, lambda _: left(), temporary_folders), _without_a_trace(leave_alone):
            yield Begun(state, _begin(state, checkpoint, plan, others), SoleWorker())
        return

    def prepare(first: bool) -> None:
        nonlocal resumed
        earlier = None if first else state.load()
        if first:
            empty(partial_of(out), left())
            with _without_a_trace(leave_alone):
                resumed = _begin(state, checkpoint, plan, others)
        elif earlier is None or earlier.plan != plan.digest:
            raise taken(out)

    shared = SharedWorker(out, overwrite, temporary_folders, on_note)
    with enter_shared_folder(shared, lambda: _stands(out, plan), prepare) as worker:
        if worker is None:
            yield None
        else:
            with _without_a_trace(lambda: worker.remove_unused(unused)):
                yield Begun(SharedState(worker, plan.digest, *command), resumed, worker)

    if not _stands(out, plan):
        raise UptrainError(
            f"{partial_of(out)} was taken away while it was being written.", "Run the same command again."
        )


@contextmanager
def _without_a_trace(leave_unused: Callable[[], None]) -> Iterator[None]:
    """Call what removes OUT.partial, if nothing was finished in it, after an error."""
    try:
        yield
    except Exception:
        with suppress(OSError, UptrainError):  # what went wrong before is what to say
            leave_unused()
        raise


def _worked(earlier: Earlier | None, temporary_folders: tuple[Path, ...]) -> bool:
    """Say whether an earlier run finished a shard or, in a temporary folder, the calibration of a layer."""
    if earlier is None:
        return False
    return earlier.worked or any(
        CalibratedLayers.left(folder, earlier.plan) is not None for folder in temporary_folders
    )


def _stands(out: Path, plan: Plan) -> bool:
    try:
        stages = (read_manifest(out) or {"stages": []})["stages"]
    except CheckpointError:  # not ours, or about to be replaced
        return False
    return any(stage.get("plan") == plan.digest for stage in stages[-1:])


def _left(
    state: State, plan: Plan, overwrite: bool, temporary_folders: tuple[Path, ...], on_note: Callable[[str], None]
) -> tuple[str, ...]:
    """Return the files of OUT.partial that an earlier run of this plan finished."""
    earlier = state.load()
    if earlier is None:
        return ()
    if earlier.plan == plan.digest:
        _drop_damaged(state, plan)
        return STATE, *state.shards
    if not _worked(earlier, temporary_folders):
        return ()
    if earlier.command == state.command:
        on_note("The source or uptrain changed since the run that was cut off: starting over.")
    elif not overwrite:
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


def _begin(state: State, checkpoint: Checkpoint, plan: Plan, others: int) -> tuple[str, ...]:
    """Write the state to begin with; return the shards an earlier run finished."""
    resumed = tuple(state.shards)
    _check_space(state.path.parent, checkpoint, plan, resumed, others)
    state.save()
    return resumed


def _check_space(partial: Path, checkpoint: Checkpoint, plan: Plan, resumed: tuple[str, ...], others: int) -> None:
    left = [tensor for name, tensors in plan.shards.items() if name not in resumed for tensor in tensors]
    needed, free = sum(tensor.info.nbytes for tensor in left) + others + 2**20, shutil.disk_usage(partial).free
    if needed > free:
        # Not to the byte: what lies otherwise in blocks is copied all the same, and a disk that gets full can be freed.
        spans = unchanged_spans(left, checkpoint).values()
        files = {path for path in {span.path for span in spans} if can_clone(path, partial)}
        needed -= sum(span.nbytes for span in spans if span.path in files)
    if needed > free:
        raise UptrainError(
            f"The disk is too full: {partial} needs {needed:,} bytes and {free:,} are free, {needed - free:,} short.",
            "Free space and run the same command again, or choose an OUT on another disk.",
        )
