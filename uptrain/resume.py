"""Begin a conversion's folder, alone or with other processes, and go on with what earlier runs left there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from uptrain.checkpoint.checksum import DEFAULT, algorithm_of, checksum_file
from uptrain.checkpoint.clone import can_clone
from uptrain.checkpoint.joining import joined
from uptrain.checkpoint.joint import Alone, Joint, JointState
from uptrain.checkpoint.manifest import read_manifest
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.state import State
from uptrain.checkpoint.writer import STATE, empty, partial_of, staged, taken
from uptrain.errors import CheckpointError, UptrainError, UsageError
from uptrain.plan import Plan
from uptrain.plan_tensors import unchanged_spans


@dataclass(frozen=True)
class Begun:
    """A conversion's folder that is ready to be worked in.

    `resumed` names the shards that an earlier run had finished, `party` says which work is whose.
    """

    state: State
    resumed: tuple[str, ...]
    party: Alone | Joint


@contextmanager
def begun(
    out: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    command: str,
    *,
    overwrite: bool,
    join: bool,
    beside: tuple[Path, ...],
    others: int,
    on_note: Callable[[str], None],
) -> Iterator[Begun | None]:
    """Enter OUT.partial for as long as the block runs; with `join`, yield None where others have finished OUT.

    Alone, OUT is made of it at the end; together, by the party's `finishing`. The folders `beside` it are removed then.
    `command` is that of `State`, `others` the bytes of the files that go along with the weights.

    Raises:
        UptrainError: OUT exists, is being written, or holds another plan's unfinished conversion; the disk is full.
    """
    state, resumed = State(partial_of(out), plan.digest, command), tuple[str, ...]()
    if not join:
        with staged(out, overwrite, lambda _: _left(state, plan, overwrite, on_note), beside):
            yield Begun(state, _begin(state, checkpoint, plan, others), Alone())
        return

    def prepare(first: bool) -> None:
        nonlocal resumed
        if first:
            empty(partial_of(out), _left(state, plan, overwrite, on_note))
            resumed = _begin(state, checkpoint, plan, others)
        elif (state.load() or ("",))[0] != plan.digest:
            raise taken(out)

    with joined(out, overwrite, beside, on_note, lambda: _stands(out, plan), prepare) as joint:
        yield Begun(JointState(joint, plan.digest, command), resumed, joint) if joint else None

    if not _stands(out, plan):
        raise UptrainError(
            f"{partial_of(out)} was taken away while it was being written.", "Run the same command again."
        )


def _stands(out: Path, plan: Plan) -> bool:
    try:
        stages = (read_manifest(out) or {"stages": []})["stages"]
    except CheckpointError:  # not ours, or about to be replaced
        return False
    return any(stage.get("plan") == plan.digest for stage in stages[-1:])


def _left(state: State, plan: Plan, overwrite: bool, on_note: Callable[[str], None]) -> tuple[str, ...]:
    """Return the files of OUT.partial that an earlier run of this plan finished."""
    earlier = state.load()
    if earlier is None:
        return ()
    digest, command = earlier
    if digest == plan.digest:
        _drop_damaged(state, plan)
        return STATE, *state.shards
    if command == state.command:
        on_note("The source or uptrain changed since the run that was cut off: starting over.")
    elif not overwrite:
        raise UsageError(
            f"{state.path.parent} holds an unfinished conversion of another plan.",
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
