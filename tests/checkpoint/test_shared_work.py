"""Several processes convert one checkpoint: the same bytes as one, whoever is killed, and strangers are refused."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.small import digests, save_small, small_tensors
from uptrain.checkpoint import shared_work
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.locks import LOCK
from uptrain.checkpoint.manifest import verify
from uptrain.checkpoint.output_folder import STATE, partial_of
from uptrain.checkpoint.shared_work import CALIBRATION, SharedWorker
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.conversion.run.options import RunOptions
from uptrain.errors import UptrainError, UsageError

GQA2 = Request("gqa", 2, max_shard_size=800)


def finished(out: Path) -> list[str]:
    state = partial_of(out) / STATE
    return list(json.loads(state.read_text())["shards"]) if state.exists() else []


def work(source: Path, out: Path, written: Path, until: float) -> None:
    """Convert with others and put down in `written` which shards this process wrote; hang once `until` are finished."""
    write = shared_work.write_shard

    def slowly(path: Path, *rest: Any) -> None:
        time.sleep(60 if len(finished(out)) >= until else 0.05)
        write(path, *rest)
        with written.open("a") as file:
            file.write(f"{path.name}\n")

    shared_work.write_shard = slowly
    convert(str(source), out, GQA2, options=RunOptions(join=True))


def wait_until(so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not so():
        assert time.monotonic() < end
        time.sleep(0.01)


class Processes:
    """Processes that convert the source to `out` together; each is forked from one that has imported uptrain."""

    def __init__(self, root: Path) -> None:
        self.source = save_small(root / "src", 3, small_tensors(num_hidden_layers=6), num_hidden_layers=6)
        self.out, self.written = root / "out", root / "written"
        self.alone = convert(str(self.source), root / "alone", GQA2)
        self.bytes = digests(root / "alone")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__])
        self.running: list[BaseProcess] = []

    def start(self, count: int, until: float = math.inf) -> None:
        for _ in range(count):
            process = self.context.Process(target=work, args=(self.source, self.out, self.written, until))
            process.start()
            self.running.append(process)

    def wait_for(self, count: int) -> None:
        """Wait until so many shards are finished."""
        wait_until(lambda: len(finished(self.out)) >= count)

    def locked(self, number: int) -> bool:
        """Say whether a process has a shard."""
        shards = SharedWorker(self.out).work_locks.glob("shard *")
        return any(f"process {self.running[number].pid} " in path.read_text() for path in shards)

    def codes(self) -> list[int | None]:
        """Wait for all to end, and return their exit codes."""
        for process in self.running:
            process.join(60)
        return [process.exitcode for process in self.running]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    for process in made.running:
        process.kill()
        process.join()


def test_four_processes_one_killed_and_restarted_give_the_bytes_of_one(processes: Processes) -> None:
    shards = processes.alone.plan.shards
    assert len(shards) > 12
    processes.start(1, until=0)
    wait_until(lambda: processes.locked(0))
    processes.start(3)
    processes.wait_for(1)
    processes.running[0].kill()
    processes.start(1)
    assert processes.codes() == [-signal.SIGKILL, 0, 0, 0, 0]
    assert Counter(processes.written.read_text().split()) == Counter(list(shards))
    assert digests(processes.out) == processes.bytes
    assert {path.name for path in processes.out.parent.iterdir()} == {"alone", "out", "src", "written"}
    verify(processes.out)


@pytest.mark.parametrize("join", [True, False])
def test_all_killed_then_one_finishes_with_what_they_had(join: bool, processes: Processes) -> None:
    processes.start(2, until=3)
    processes.wait_for(3)
    for process in processes.running:
        process.kill()
    assert processes.codes() == [-signal.SIGKILL] * 2
    out = processes.out
    before = {name: (partial_of(out) / name).stat().st_ino for name in finished(out)}
    done = convert(str(processes.source), out, GQA2, options=RunOptions(join=join))
    assert set(done.resumed) == set(before)
    assert {name: (out / name).stat().st_ino for name in before} == before
    assert digests(out) == processes.bytes


def test_one_that_fails_leaves_its_work_to_the_others(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *rest: Any) -> None:
        processes.start(0 if processes.running else 2)
        processes.wait_for(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("uptrain.conversion.run.pipeline._workers", lambda: 1)
    monkeypatch.setattr("uptrain.checkpoint.shared_work.write_shard", full)
    with pytest.raises(UptrainError, match="disk is full"):
        convert(str(processes.source), processes.out, GQA2, options=RunOptions(join=True))
    assert processes.codes() == [0, 0]
    assert digests(processes.out) == processes.bytes


@pytest.mark.parametrize("work", ["shard {last}", CALIBRATION])
def test_one_that_waits_long_says_for_whom(work: str, processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shard is never finished while the process that has it hangs."""
    monkeypatch.setattr("uptrain.checkpoint.shared_work.PATIENCE", 0.05)
    work = work.format(last=list(processes.alone.plan.shards)[-1])
    notes, held = list[str](), ExitStack()

    def note(text: str) -> None:
        notes.append(text)
        held.close()

    with held:
        hanging = SharedWorker(processes.out)
        hanging.work_locks.mkdir(parents=True)
        (hanging.partial / LOCK).touch()
        held.enter_context(hanging.alone(work) if work == CALIBRATION else hanging.lock_work(work))
        convert(str(processes.source), processes.out, GQA2, options=RunOptions(join=True), events=Events(note=note))
    (said,) = notes
    assert f"process {os.getpid()} on {os.uname().nodename}" in said and work in said
    assert digests(processes.out) == processes.bytes


def test_one_that_comes_late_finds_it_done(tmp_path: Path) -> None:
    source, out, notes = save_small(tmp_path / "src"), tmp_path / "out", list[str]()
    first = convert(str(source), out, Request("mqa"), options=RunOptions(join=True))
    inode = out.stat().st_ino
    late = convert(str(source), out, Request("mqa"), options=RunOptions(join=True), events=Events(note=notes.append))
    assert late.energy == first.energy and "have finished" in notes[-1]
    assert out.stat().st_ino == inode and not partial_of(out).exists()
    with pytest.raises(UsageError, match="exists"):
        convert(str(source), out, GQA2, options=RunOptions(join=True))
    assert not partial_of(out).exists()


def test_one_that_waits_for_another_sees_it_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out, held = save_small(tmp_path / "src", 3), tmp_path / "out", ExitStack()
    alone = convert(str(source), tmp_path / "alone", GQA2)
    last = list(alone.plan.shards)[-1]

    def hold(count: int) -> None:
        held.enter_context(SharedWorker(out).lock_work(f"shard {last}"))

    def meanwhile(seconds: float) -> None:
        held.close()
        assert convert(str(source), out, GQA2, options=RunOptions(join=True)).energy == alone.energy

    monkeypatch.setattr("uptrain.conversion.run.pipeline._workers", lambda: 1)
    monkeypatch.setattr("time.sleep", meanwhile)
    waited = convert(str(source), out, GQA2, options=RunOptions(join=True), events=Events(bytes=hold))
    assert waited.energy == alone.energy and not partial_of(out).exists()
    assert digests(out) == digests(tmp_path / "alone")


def test_a_folder_that_is_taken_away_is_not_called_finished(tmp_path: Path) -> None:
    source, out = save_small(tmp_path / "src"), tmp_path / "out"

    def remove(text: object) -> None:
        shutil.rmtree(partial_of(out), ignore_errors=True)

    with pytest.raises((UptrainError, OSError)):
        convert(str(source), out, GQA2, options=RunOptions(join=True), events=Events(bytes=remove))
    assert not out.exists()


@pytest.mark.parametrize("join", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_runs_that_do_not_belong_together_are_refused(join: bool, overwrite: bool, tmp_path: Path) -> None:
    source, out, refused = save_small(tmp_path / "src"), tmp_path / "out", list[str]()
    strangers = [(GQA2, True), (GQA2, False), (Request("mqa"), not join)]

    def meanwhile(count: int) -> None:
        for request, joins in strangers if not refused else ():
            with pytest.raises(UsageError) as caught:
                convert(str(source), out, request, overwrite=overwrite, options=RunOptions(join=joins))
            refused.append(caught.value.message)

    convert(str(source), out, Request("mqa"), options=RunOptions(join=join), events=Events(bytes=meanwhile))
    assert len(refused) == 3
    assert all("Another run is writing" in each or "conversion of another plan" in each for each in refused)
    convert(str(source), tmp_path / "alone", Request("mqa"))
    assert digests(out) == digests(tmp_path / "alone")


def test_an_old_out_stays_until_the_new_is_whole(tmp_path: Path) -> None:
    source, out, seen = save_small(tmp_path / "src", 3), tmp_path / "out", list[dict[str, str]]()
    convert(str(source), out, Request("mqa"))
    old = digests(out)
    convert(
        str(source),
        out,
        GQA2,
        overwrite=True,
        options=RunOptions(join=True),
        events=Events(bytes=lambda count: seen.append(digests(out))),
    )
    convert(str(source), tmp_path / "alone", GQA2)
    assert seen and all(each == old for each in seen)
    assert digests(out) == digests(tmp_path / "alone")
