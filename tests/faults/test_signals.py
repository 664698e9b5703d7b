"""Real signals to real processes, a real full disk and a real read-only one: what the injected faults stand for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.boundaries import watched
from tests.faults.tally import REAL, struck
from tests.small import digests, save_small
from uptrain.checkpoint.manifest import verify
from uptrain.checkpoint.output_folder import STATE, partial_of
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import Interrupted

MQA = Request("mqa")

CRASH = """
import os, signal, sys
from pathlib import Path
import uptrain.conversion.run.pipeline as pipeline
from tests.faults.boundaries import watched
from uptrain.conversion.run.convert import convert
from uptrain.conversion.request import Request

pipeline._workers = lambda: 1

def at(number, call, act, part):
    if number == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return act()

with watched(Path(sys.argv[1]).parent, at):
    convert(sys.argv[1], sys.argv[2], Request("mqa"))
"""


@pytest.fixture
def boundaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the calls of an undisturbed run, whose result stands at `undisturbed`."""
    save_small(tmp_path / "src", 3)
    convert(str(tmp_path / "src"), tmp_path / "undisturbed", MQA)
    monkeypatch.setattr("uptrain.conversion.run.pipeline._workers", lambda: 1)
    with watched(tmp_path) as seen:
        convert(str(tmp_path / "src"), tmp_path / "watched", MQA)
    return [f"{call.kind} {Path(call.name).name}" for call in seen.calls]


def kill(tmp_path: Path, boundary: int) -> set[str]:
    """Kill a run at a boundary; return the shards that it says it finished."""
    command = [sys.executable, "-c", CRASH, str(tmp_path / "src"), str(tmp_path / "out"), str(boundary)]
    killed = subprocess.run(command, check=False, cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    struck(REAL)
    state = partial_of(tmp_path / "out") / STATE
    return set(json.loads(state.read_text())["shards"]) if state.exists() else set()


def test_kill_9_keeps_the_finished_shards(boundaries: list[str], tmp_path: Path) -> None:
    """A run killed before its next shard leaves the earlier ones, and the next run does not write them again."""
    before = kill(tmp_path, boundaries.index("rename model-00003-of-00003.safetensors.tmp"))
    assert len(before) == 2 and not (tmp_path / "out").exists()
    stats = {name: (partial_of(tmp_path / "out") / name).stat() for name in before}
    done = convert(str(tmp_path / "src"), tmp_path / "out", MQA)
    assert set(done.resumed) == before
    for name, stat in stats.items():
        after = (tmp_path / "out" / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), "a finished shard was rewritten"
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")
    assert not partial_of(tmp_path / "out").exists()


def test_kill_9_after_the_rename_leaves_only_the_tidying(boundaries: list[str], tmp_path: Path) -> None:
    kill(tmp_path, boundaries.index(f"unlink {STATE}"))
    assert (tmp_path / "out" / STATE).exists()
    verify(tmp_path / "out")
    assert len(convert(str(tmp_path / "src"), tmp_path / "out", MQA).resumed) == 3
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


CTRL_C = """
import os, signal, sys, time
from pathlib import Path
import uptrain.conversion.run.pipeline as pipeline
from tests.faults.boundaries import watched
from uptrain.cli.app import run

pipeline._workers = lambda: 1

def at(number, call, act, part):
    if number == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGINT)
        # A worker thread must not be done with the rest before the main one wakes up.
        time.sleep(1)
    return act()

with watched(Path(sys.argv[1]).parent, at):
    sys.exit(run(["convert", sys.argv[1], sys.argv[2], "--to", "mqa"]))
"""


def test_ctrl_c_exits_130_and_resumes(boundaries: list[str], tmp_path: Path) -> None:
    """While the second of three shards is being written."""
    at = boundaries.index("rename model-00002-of-00003.safetensors.tmp")
    out = tmp_path / "out"
    command = [sys.executable, "-c", CTRL_C, str(tmp_path / "src"), str(out), str(at)]
    stopped = subprocess.run(command, check=False, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    assert stopped.returncode == Interrupted.exit_code, stopped.stderr
    struck(REAL)
    assert "same command" in stopped.stderr and "Traceback" not in stopped.stderr and not out.exists()
    assert convert(str(tmp_path / "src"), out, MQA).resumed
    assert digests(out) == digests(tmp_path / "undisturbed")
    verify(out)


SMALL_DISK = """
import shutil, subprocess, sys
from pathlib import Path
from tests.small import digests, save_small
from uptrain.conversion.run.convert import convert
from uptrain.errors import UptrainError
from uptrain.conversion.request import Request

def refused(says, message):
    try:
        convert(str(source), out, Request("mqa"))
    except UptrainError as error:
        assert says in error.message, error.message
        assert not out.exists()
    else:
        raise AssertionError(message)

def mount(*options):
    subprocess.run(["mount", *options], check=True)

root = Path(sys.argv[1])
source, disk = save_small(root / "src", 3, vocab_size=20_000), root / "disk"
convert(str(source), root / "undisturbed", Request("mqa"))
disk.mkdir()
mount("-t", "tmpfs", "-o", "size=800k", "tmpfs", str(disk))
out = disk / "out"
refused("The disk is too full", "1.3 MB went onto 800 kB")
usage, shutil.disk_usage = shutil.disk_usage, lambda path: usage(root)  # as if another program filled it meanwhile
refused("The disk is full", "1.3 MB went onto 800 kB")
mount("-o", "remount,ro", str(disk))
refused("can't be written: Read-only file system", "a read-only disk was written")
mount("-o", "remount,rw,size=8m", str(disk))
assert convert(str(source), out, Request("mqa")).resumed, "nothing was kept"
assert digests(out) == digests(root / "undisturbed")
mount("-o", "remount,ro", str(disk))
out = disk / "other"
refused("can't be written: Read-only file system", "a read-only disk was written")
"""


def test_a_disk_that_is_really_full_or_read_only(tmp_path: Path) -> None:
    """What tests/faults/test_boundaries.py injects at every call, once from the kernel; needs leave to mount."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk of their own")
    command = [*alone, sys.executable, "-c", SMALL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    struck(REAL, SMALL_DISK.count("refused(") - 1)
