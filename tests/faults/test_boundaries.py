"""Whatever happens at whichever call to the disk: the old state or a resumable one, and in the end the same bytes."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.faults.boundaries import At, Boundaries, Call, Killed, failing_at, killed_at, watched
from tests.faults.tally import CHANGED, SECOND, struck
from tests.small import digests, save_small, small_tensors
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.locks import LOCK, WORK_LOCKS
from uptrain.checkpoint.manifest import MANIFEST, verify
from uptrain.checkpoint.output_folder import STATE
from uptrain.conversion.plan.planner import PLAN_FORMAT
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.conversion.run.options import RunOptions
from uptrain.errors import CheckpointError, UptrainError, UsageError

MQA = Request("mqa")
ENDINGS = (".uptrain-replaced", ".partial")


@pytest.fixture(autouse=True)
def _in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "uptrain.conversion.run.pipeline._workers", lambda: 1
    )  # so that a boundary has the same number every time
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # a process dies here, not the machine
    monkeypatch.setattr("uptrain.checkpoint.manifest.versions", dict)  # slow, and the same for every run


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class World:
    """A source, what it becomes, and an older OUT that an overwriting run replaces."""

    def __init__(self, root: Path) -> None:
        self.root, self.source, self.out = root, save_small(root / "src", 3), root / "place" / "out"
        self.join = False
        (self.source / "tokenizer.json").write_text("{}")
        self.wanted, self.old = root / "wanted", root / "old"
        convert(str(self.source), self.wanted, MQA)
        save_small(root / "other", seed=5)
        convert(str(root / "other"), self.old, Request("gqa", 2))
        self.final, self.before = digests(self.wanted), digests(self.old)

    def fresh(self, overwrite: bool) -> None:
        """Empty the place where OUT stands, but for the older OUT if that is to be replaced."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir()
        if overwrite:
            shutil.copytree(self.old, self.out)

    def run(self, overwrite: bool) -> None:
        convert(str(self.source), self.out, MQA, overwrite=overwrite, options=RunOptions(join=self.join))

    def calls(self, overwrite: bool) -> list[Call]:
        self.fresh(overwrite)
        with watched(self.root) as seen:
            self.run(overwrite)
        return seen.calls

    def boundaries(self, overwrite: bool) -> list[tuple[int, Call]]:
        """Return the calls that change something; of a run of the same, the first and the last."""
        calls = [(number, call) for number, call in enumerate(self.calls(overwrite)) if call.changes]
        pairs = zip([None, *calls[:-1]], calls, [*calls[1:], None], strict=True)
        return [now for before, now, after in pairs if not before or not after or not before[1] == now[1] == after[1]]

    def disturbed(self, overwrite: bool, at: At, expected: type[BaseException]) -> bool:
        """Run once with `at` between the run and the disk; say whether it failed, as it must if it did."""
        self.fresh(overwrite)
        with watched(self.root, at):
            try:
                self.run(overwrite)
            except expected as error:
                assert "\n" not in str(error)
                return True
        return False

    def cut_off(self) -> None:
        """Leave a run that was killed when its last shard was written, but for its name."""
        calls = self.calls(False)
        shard = max(number for number, call in enumerate(calls) if call.name.endswith(".safetensors.tmp"))
        assert self.disturbed(False, killed_at(shard), Killed)

    def check_nothing_lost(self, overwrite: bool) -> None:
        """OUT is whole, the older one or the new one, or it isn't there."""
        replaced = self.out.with_name("out.uptrain-replaced")
        if self.out.exists():
            ours = (STATE, LOCK, WORK_LOCKS)
            found = {name: text for name, text in digests(self.out).items() if name.partition("/")[0] not in ours}
            assert found in ([self.final, self.before] if overwrite else [self.final])
        elif overwrite:
            assert digests(replaced) == self.before

    def check_ends_well(self, overwrite: bool) -> None:
        """The same command gives an undisturbed run's bytes, and leaves nothing else."""
        self.run(overwrite)
        assert digests(self.out) == self.final
        assert [path.name for path in self.out.parent.iterdir()] == ["out"]
        verify(self.out)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_boundaries_are_all_there(overwrite: bool, world: World) -> None:
    """What the tests below go through by number is what a conversion is known to do."""
    calls = world.calls(overwrite)
    shards = [name for name in world.final if name.endswith(".safetensors")]
    assert len(shards) == 3
    for shard in shards:
        temporary = f"place/out.partial/{shard}.tmp"
        assert {call.kind for call in calls if call.name == temporary} >= {"open to write", "write", "fsync", "rename"}
        assert Call("read", f"src/{shard}") in calls
    for name in ("config.json", "model.safetensors.index.json", MANIFEST, STATE):
        assert Call("rename", f"place/out.partial/{name}.tmp") in calls
    assert Call("open to write", "place/out.partial/tokenizer.json") in calls
    renames = [call.name for call in calls if call.kind == "rename"]
    assert renames[-1] == "place/out.partial"
    assert ("place/out" in renames) == overwrite
    assert [call.name for call in calls if call.changes][-1] == f"place/out/{STATE}"


@pytest.mark.parametrize(
    ("overwrite", "join"), [(False, False), (True, False), (True, True)], ids=["fresh", "overwrite", "join"]
)
def test_killed_at_any_boundary(overwrite: bool, join: bool, world: World) -> None:
    """Just before a call, and in the middle of a write."""
    world.join = join
    for number, call in world.boundaries(overwrite):
        for torn in (False, True) if call.kind == "write" else (False,):
            assert world.disturbed(overwrite, killed_at(number, torn), Killed)
            world.check_nothing_lost(overwrite)
            world.check_ends_well(overwrite)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overwrite", "error", "says", "join"),
    [
        (False, errno.ENOSPC, "disk", False),
        (True, errno.ENOSPC, "disk", False),
        (False, errno.EIO, "Input/output error", False),
        (False, errno.EROFS, "written", False),
        (False, errno.EIO, "Input/output error", True),
    ],
)
def test_a_call_that_fails(overwrite: bool, error: int, says: str, join: bool, world: World) -> None:
    """A full disk, a broken one and one that became read-only, met at each call that changes something."""
    world.join = join
    for number, call in world.boundaries(overwrite):
        world.fresh(overwrite)
        with watched(world.root, failing_at(number, error, torn=True)):
            try:
                world.run(overwrite)
                assert call.kind == "sendfile", call  # for which Python has another way
            except UptrainError as caught:
                assert says in caught.message and "\n" not in str(caught)
        world.check_nothing_lost(overwrite)
        if not world.out.exists() or overwrite or (world.out / STATE).exists():
            world.check_ends_well(overwrite)


def test_a_source_that_cannot_be_read(world: World) -> None:
    reads = {call: number for number, call in enumerate(world.calls(False)) if not call.changes}
    for call, number in reads.items():
        assert world.disturbed(False, failing_at(number, errno.EIO), UptrainError), call
        world.check_nothing_lost(False)
        world.check_ends_well(False)


def test_a_second_run_at_any_boundary_of_the_first(world: World) -> None:
    """It is refused, or it was there first; OUT is one whole result either way, and the other run says so."""
    ends: list[str] = []

    def second() -> None:
        try:
            world.run(False)
            ends.append("done")
        except UsageError as error:
            assert "Another run is writing" in error.message or "exists already" in error.message
            ends.append("refused")

    for number, call in world.boundaries(False):
        ends.clear()
        world.fresh(False)
        with watched(world.root) as seen:
            seen.at = _between(seen, number, SECOND, second)
            second()
        assert "done" in ends, call
        assert digests(world.out) == world.final
        assert [path.name for path in world.out.parent.iterdir()] == ["out"]


def _between(seen: Boundaries, boundary: int, kind: str, other: Callable[[], Any]) -> At:
    def at(number: int, call: Call, act: Callable[[], Any], part: Callable[[int], Any] | None) -> Any:
        if number == boundary:
            struck(kind)
            with seen.aside():
                other()
        return act()

    return at


def test_a_source_that_changes_underneath(world: World) -> None:
    """Before the end it is noticed, and the same command then converts what is there."""
    changed = save_small(world.root / "changed", 3, small_tensors(7))
    shutil.copyfile(world.source / "tokenizer.json", changed / "tokenizer.json")
    kept = shutil.copytree(world.source, world.root / "kept")
    convert(str(changed), world.root / "later", MQA)
    calls = world.calls(False)
    commit = max(number for number, call in enumerate(calls) if call.name.endswith(MANIFEST + ".tmp"))
    for number in range(0, commit, 7):
        world.fresh(False)
        with watched(world.root) as seen:
            seen.at = _between(seen, number, CHANGED, lambda: _replace(changed, world.source))
            with suppress(CheckpointError):
                world.run(False)
                # Nothing of the source had been looked at yet.
                assert _weights(world.out) == _weights(world.root / "later")
        if not world.out.exists():
            world.run(False)
        assert _weights(world.out) == _weights(world.root / "later"), calls[number]
        _replace(kept, world.source)


def _replace(new: Path, folder: Path) -> None:
    for path in new.iterdir():
        shutil.copyfile(path, folder / path.name)


def _weights(folder: Path) -> dict[str, str]:
    return {name: text for name, text in digests(folder).items() if name != MANIFEST}


def test_a_source_that_changed_since_a_run_was_cut_off(world: World) -> None:
    world.cut_off()
    save_small(world.source, 3, small_tensors(7))
    notes: list[str] = []
    convert(str(world.source), world.out, MQA, events=Events(note=notes.append))
    assert notes == ["The source or uptrain changed since the interrupted run: starting over."]
    convert(str(world.source), world.root / "later", MQA)
    assert digests(world.out) == digests(world.root / "later")


def test_an_unfinished_run_of_an_older_plan_format_starts_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that an older format finished gets into the result; another request is refused as ever."""
    with monkeypatch.context() as patch:
        patch.setattr("uptrain.conversion.plan.planner.PLAN_FORMAT", PLAN_FORMAT - 1)
        world.cut_off()
    left = world.out.with_name("out.partial")
    assert list(left.glob("model-*.safetensors"))
    for path in left.glob("model-*.safetensors"):
        path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(UsageError, match="unfinished conversion"):
        convert(str(world.source), world.out, Request("gqa", 2))
    notes: list[str] = []
    assert convert(str(world.source), world.out, MQA, events=Events(note=notes.append)).resumed == ()
    assert ["uptrain changed" in note for note in notes] == [True]
    assert digests(world.out) == world.final


def test_a_finished_shard_that_was_damaged_is_written_again(world: World) -> None:
    world.cut_off()
    first, second = sorted(world.out.with_name("out.partial").glob("model-*.safetensors"))
    first.write_bytes(b"\0" * 100)
    assert convert(str(world.source), world.out, MQA).resumed == (second.name,)
    assert digests(world.out) == world.final


def test_another_request_does_not_resume_the_first(world: World) -> None:
    world.cut_off()
    with pytest.raises(UsageError, match="unfinished conversion"):
        convert(str(world.source), world.out, Request("gqa", 2))
    world.check_ends_well(False)
    world.cut_off()
    convert(str(world.source), world.out, Request("gqa", 2), overwrite=True)
    convert(str(world.source), world.root / "gqa", Request("gqa", 2))
    assert digests(world.out) == digests(world.root / "gqa")


def test_a_folder_of_somebody_else_is_not_touched(world: World) -> None:
    world.fresh(False)
    mine = world.out.with_name("out.partial")
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"out\.partial"):
        world.run(False)
    assert (mine / "thesis.txt").read_text() == "years of work" and not world.out.exists()


def test_what_lies_about_in_an_unfinished_folder_does_not_get_into_the_result(world: World) -> None:
    world.cut_off()
    partial, outside = world.out.with_name("out.partial"), world.root / "outside"
    outside.write_text("mine")
    (partial / "tokenizer.json").symlink_to(outside)
    (partial / "modeling.py").write_text("raise SystemExit")
    world.check_ends_well(False)
    assert outside.read_text() == "mine"


def test_a_clock_that_jumps_backwards(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes don't depend on it, and a shard from the future is taken for what it is."""
    ticks = itertools.count()
    monkeypatch.setattr("time.time", lambda: 4e9 - 1000.0 * next(ticks))
    monkeypatch.setattr("time.time_ns", lambda: 10**9 * (4 * 10**9 - 1000 * next(ticks)))
    world.cut_off()
    for path in world.out.with_name("out.partial").iterdir():
        os.utime(path, (5e9, 5e9))
    done = convert(str(world.source), world.out, MQA)
    assert len(done.resumed) == 2
    assert digests(world.out) == world.final
