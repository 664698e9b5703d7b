"""Several processes convert one checkpoint: the same bytes as one, whoever is killed, and strangers are refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from uptrain.checkpoint.checksum import checksum_file
from uptrain.checkpoint.joint import Joint
from uptrain.checkpoint.manifest import verify
from uptrain.checkpoint.writer import STATE, partial_of
from uptrain.convert import convert
from uptrain.errors import UptrainError, UsageError
from uptrain.request import Request

Save = Callable[..., Path]
GQA2 = Request("gqa", 2, max_shard_size=6_000)
ARGUMENTS = ["--to", "gqa", "--groups", "2", "--max-shard-size", "6000", "--join"]
SLOW = """
import sys, time
from uptrain import cli
from uptrain.checkpoint import joint

write = joint.write_shard
def slowly(path, *rest):
    time.sleep(0.1)  # so that there is a middle to be killed in
    write(path, *rest)
    print(path.name, file=sys.stderr, flush=True)
joint.write_shard = slowly
sys.exit(cli.run(["convert", *sys.argv[1:]]))
"""


def digests(folder: Path) -> dict[str, str]:
    return {path.name: checksum_file(path) for path in folder.iterdir()}


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(source), str(out), *ARGUMENTS]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(out: Path) -> list[str]:
    state = partial_of(out) / STATE
    return list(json.loads(state.read_text())["shards"]) if state.exists() else []


def wait_for(count: int, out: Path) -> None:
    end = time.monotonic() + 60
    while len(finished(out)) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_four_processes_one_killed_and_restarted_give_the_bytes_of_one(save_tiny: Save, tmp_path: Path) -> None:
    source, out = save_tiny("llama", max_shard_size="20KB"), tmp_path / "out"
    shards = convert(str(source), tmp_path / "alone", GQA2).plan.shards
    assert len(shards) > 12
    processes = [start(source, out) for _ in range(4)]
    wait_for(1, out)
    time.sleep(random.uniform(0, 0.2))
    processes[0].kill()
    processes.append(start(source, out))
    ended = [(process.communicate(timeout=60), process.returncode) for process in processes]
    assert [code for _, code in ended] == [-signal.SIGKILL, 0, 0, 0, 0], ended
    written = Counter(line for (_, errors), _ in ended for line in errors.split() if line in shards)
    # What the killed one wrote but had not yet put down as finished is the one thing that may be done again.
    assert set(written) == set(shards) and written.total() <= len(shards) + (os.cpu_count() or 1) + 2
    assert digests(out) == digests(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out", "src"]
    verify(out)


@pytest.mark.parametrize("join", [True, False])
def test_all_killed_then_one_finishes_with_what_they_had(join: bool, save_tiny: Save, tmp_path: Path) -> None:
    source, out = save_tiny("llama", max_shard_size="20KB"), tmp_path / "out"
    convert(str(source), tmp_path / "alone", GQA2)
    processes = [start(source, out) for _ in range(2)]
    wait_for(3, out)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    before = {name: (partial_of(out) / name).stat().st_ino for name in finished(out)}
    done = convert(str(source), out, GQA2, join=join)
    assert set(done.resumed) == set(before)
    assert {name: (out / name).stat().st_ino for name in before} == before
    assert digests(out) == digests(tmp_path / "alone")


def test_one_that_comes_late_finds_it_done(save_tiny: Save, tmp_path: Path) -> None:
    source, out, notes = save_tiny("llama"), tmp_path / "out", list[str]()
    first = convert(str(source), out, Request("mqa"), join=True)
    inode = out.stat().st_ino
    late = convert(str(source), out, Request("mqa"), join=True, on_note=notes.append)
    assert late.kept == first.kept and "have finished" in notes[-1]
    assert out.stat().st_ino == inode and not partial_of(out).exists()
    with pytest.raises(UsageError, match="exists already"):
        convert(str(source), out, GQA2, join=True)
    assert not partial_of(out).exists()


def test_one_that_waits_for_another_sees_it_finish(
    save_tiny: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, held = save_tiny("llama", max_shard_size="20KB"), tmp_path / "out", ExitStack()
    alone = convert(str(source), tmp_path / "alone", GQA2)
    last = list(alone.plan.shards)[-1]

    def hold(count: int) -> None:
        held.enter_context(Joint(out).claim(f"write {last}"))

    def meanwhile(seconds: float) -> None:
        held.close()
        assert convert(str(source), out, GQA2, join=True).kept == alone.kept

    monkeypatch.setattr("uptrain.pipeline._workers", lambda: 1)
    monkeypatch.setattr("time.sleep", meanwhile)
    waited = convert(str(source), out, GQA2, join=True, on_progress=hold)
    assert waited.kept == alone.kept and not partial_of(out).exists()
    assert digests(out) == digests(tmp_path / "alone")


def test_a_folder_that_is_taken_away_is_not_called_finished(save_tiny: Save, tmp_path: Path) -> None:
    source, out = save_tiny("llama"), tmp_path / "out"

    def remove(text: object) -> None:
        shutil.rmtree(partial_of(out), ignore_errors=True)

    with pytest.raises((UptrainError, OSError)):
        convert(str(source), out, GQA2, join=True, on_progress=remove)
    assert not out.exists()


@pytest.mark.parametrize("join", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_runs_that_do_not_belong_together_are_refused(
    join: bool, overwrite: bool, save_tiny: Save, tmp_path: Path
) -> None:
    source, out, refused = save_tiny("llama"), tmp_path / "out", list[str]()
    strangers = [(GQA2, True), (GQA2, False), (Request("mqa"), not join)]

    def meanwhile(count: int) -> None:
        for request, joins in strangers if not refused else ():
            with pytest.raises(UsageError) as caught:
                convert(str(source), out, request, join=joins, overwrite=overwrite)
            refused.append(caught.value.message)

    convert(str(source), out, Request("mqa"), join=join, on_progress=meanwhile)
    assert len(refused) == 3
    assert all("Another run is writing" in each or "conversion of another plan" in each for each in refused)
    convert(str(source), tmp_path / "alone", Request("mqa"))
    assert digests(out) == digests(tmp_path / "alone")


def test_an_old_out_stays_until_the_new_is_whole(save_tiny: Save, tmp_path: Path) -> None:
    source, out, seen = save_tiny("llama", max_shard_size="20KB"), tmp_path / "out", list[dict[str, str]]()
    convert(str(source), out, Request("mqa"))
    old = digests(out)
    convert(str(source), out, GQA2, join=True, overwrite=True, on_progress=lambda count: seen.append(digests(out)))
    convert(str(source), tmp_path / "alone", GQA2)
    assert seen and all(each == old for each in seen)
    assert digests(out) == digests(tmp_path / "alone")
