"""A file or a folder is replaced whole or not at all, and locks end with who holds them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from uptrain.checkpoint.files import rename_folder, replaced_file, sync_folder, write_atomic
from uptrain.checkpoint.locks import alone_in, is_open_at, try_lock


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what is flushed to the disk and what is renamed, in order."""
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def flushed(descriptor: int) -> None:
        calls.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        calls.append(f"rename {path.name} {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    return calls


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch)
    write_atomic(tmp_path / "a", "ü\n")
    assert calls == ["sync a.tmp", "rename a.tmp a"]
    assert (tmp_path / "a").read_bytes() == "ü\n".encode()


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), replaced_file(tmp_path / "a", ".mine") as file:
        file.write(b"new")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old"


def test_a_folder_is_on_the_disk_before_and_its_name_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out.partial"
    (folder / "inner").mkdir(parents=True)
    (folder / "b").write_text("1")
    (folder / "inner" / "c").write_text("2")
    calls = calls_of(monkeypatch)
    sync_folder(folder)
    rename_folder(folder, tmp_path / "out")
    assert calls == ["sync b", "sync c", "sync out.partial", "rename out.partial out", f"sync {tmp_path.name}"]


def test_one_lock_excludes_another_unless_both_are_shared(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as mine, (tmp_path / "lock").open("w") as yours:
        assert try_lock(mine) and not try_lock(yours) and not try_lock(yours, shared=True)
        assert try_lock(mine, shared=True) and try_lock(yours, shared=True) and not try_lock(yours)
    with (tmp_path / "lock").open("w") as next_one:
        assert try_lock(next_one)


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    program = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    lock = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        with lock.open("r") as file:
            assert not try_lock(file)
            holder.kill()
            holder.wait()
            assert try_lock(file)


def test_a_lock_on_a_file_that_was_replaced_is_no_longer_at_its_place(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as file:
        assert is_open_at(tmp_path / "lock", file.fileno())
        (tmp_path / "lock").rename(tmp_path / "moved")
        assert not is_open_at(tmp_path / "lock", file.fileno())
        (tmp_path / "lock").write_text("")
        assert not is_open_at(tmp_path / "lock", file.fileno())


def test_a_folder_without_locks_is_entered_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    with alone_in(tmp_path):
        (tmp_path / "a").write_text("1")
    assert (tmp_path / "a").exists()
