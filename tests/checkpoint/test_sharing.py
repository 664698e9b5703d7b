"""Where blocks can be shared, a conversion writes the same bytes, and what is unchanged takes no room."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.small import digests, save_small
from uptrain.checkpoint.checksum import Checksum, checksum_file
from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.reflink import BLOCK, Span, clone, residue
from uptrain.checkpoint.shard_writer import ShardContents, write_shard
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import Interrupted, UptrainError


class Sharing:
    """Stands for a kernel whose file systems can share blocks: by its rules, copying what it would share."""

    def __init__(self) -> None:
        self.shared = 0

    def ioctl(self, descriptor: int, request: int, argument: bytes) -> int:
        source, start, count, place = struct.unpack("@qQQQ", argument)
        assert request == getattr(fcntl, "FICLONERANGE", request) and count > 0
        if start % BLOCK or place % BLOCK or count % BLOCK or start + count > os.fstat(source).st_size:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        os.pwrite(descriptor, os.pread(source, count, start), place)
        self.shared += count
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Sharing:
    kernel = Sharing()
    monkeypatch.setattr(fcntl, "ioctl", kernel.ioctl)
    return kernel


sizes = st.one_of(st.integers(0, 40), st.integers(1, 4).map(lambda n: n * BLOCK), st.integers(0, 5 * BLOCK))
cases = st.lists(st.tuples(sizes, st.booleans(), st.integers(1, 3 * BLOCK)), min_size=1, max_size=6)


@settings(max_examples=40)
@given(st.integers(0, 2 * BLOCK), cases)
def test_a_shard_with_shared_blocks_has_the_bytes_of_one_without(
    tmp_path_factory: pytest.TempPathFactory, before: int, tensors: list[tuple[int, bool, int]]
) -> None:
    """Tensors that are unchanged and others, of any size, from any place, in chunks of any length."""
    folder = tmp_path_factory.mktemp("shared")
    source, data = folder / "source", os.urandom(before + sum(size for size, _, _ in tensors))
    source.write_bytes(data)
    infos, spans, chunks, start = [], {}, {}, before
    for number, (size, unchanged, step) in enumerate(tensors):
        name = f"t{number}"
        infos.append(TensorInfo(name, "U8", (size,), "", -1, -1))
        if unchanged:
            spans[name] = Span(source, start, size)
        chunks[name] = [memoryview(data)[at : min(at + step, start + size)] for at in range(start, start + size, step)]
        start += size
    digests = []
    for name, sharing in (("plain", None), ("shared", Sharing())):
        checksum = Checksum()
        with pytest.MonkeyPatch.context() as patch:
            if sharing:
                patch.setattr(fcntl, "ioctl", sharing.ioctl)
            contents = ShardContents(tensors=infos, chunks=chunks.__getitem__, spans=spans)
            write_shard(folder / name, contents, checksum, lambda count: None)
        assert checksum.text() == checksum_file(folder / name)
        digests.append(checksum.text())
    assert digests[0] == digests[1]
    with safe_open(folder / "shared", "np") as file:
        assert all(file.get_tensor(name).tobytes() == b"".join(parts) for name, parts in chunks.items())


places = st.tuples(st.integers(0, 4 * BLOCK), st.integers(0, 4 * BLOCK), st.integers(0, 3 * BLOCK))


@given(st.lists(places, max_size=5))
def test_data_begins_where_most_bytes_can_be_shared(found: list[tuple[int, int, int]]) -> None:
    spans = [(Span(Path(), start, size), position) for start, position, size in found]

    def fitting(begin: int) -> int:
        return sum(span.nbytes for span, position in spans if (begin + position - span.start) % BLOCK == 0)

    chosen = residue(spans)
    assert chosen % 8 == 0 and fitting(chosen) == max(fitting(begin) for begin in range(0, BLOCK, 8))


def test_nothing_is_shared_that_lies_otherwise_in_blocks_or_fills_none(tmp_path: Path, kernel: Sharing) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(4 * BLOCK))
    with (tmp_path / "out").open("wb") as out:
        assert not clone(Span(source, 8, 2 * BLOCK), out.fileno(), 16)
        assert not clone(Span(source, 8, BLOCK + 100), out.fileno(), 8)
        assert clone(Span(source, 8, 2 * BLOCK), out.fileno(), 8) == range(BLOCK, 2 * BLOCK)
        assert clone(Span(source, 0, 3 * BLOCK), out.fileno(), BLOCK) == range(BLOCK, 4 * BLOCK)
    assert kernel.shared == 4 * BLOCK


def test_a_conversion_shares_all_but_what_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_small(tmp_path / "src", 3, vocab_size=20_000)
    convert(str(source), tmp_path / "plain", Request("mqa"))
    kernel = Sharing()
    monkeypatch.setattr(fcntl, "ioctl", kernel.ioctl)
    done = convert(str(source), tmp_path / "shared", Request("mqa"))
    assert digests(tmp_path / "shared") == digests(tmp_path / "plain")
    assert kernel.shared > 0.9 * done.plan.total_bytes


@pytest.mark.parametrize("calls", [0, 1])
def test_a_run_that_dies_or_is_refused_while_it_shares_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Killed with a block shared and nothing written yet, and on a disk that is full or broken from then on."""
    source = save_small(tmp_path / "src", 3, vocab_size=20_000)
    convert(str(source), tmp_path / "plain", Request("mqa"))
    kernel, left = Sharing(), [calls]

    def dying(descriptor: int, request: int, argument: bytes) -> int:
        kernel.ioctl(descriptor, request, argument)
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return 0

    def refusing(descriptor: int, request: int, argument: bytes) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "ioctl", dying)
    with pytest.raises(Interrupted):
        convert(str(source), tmp_path / "shared", Request("mqa"))
    assert kernel.shared and not (tmp_path / "shared").exists()
    monkeypatch.setattr(fcntl, "ioctl", refusing)
    convert(str(source), tmp_path / "shared", Request("mqa"))
    assert digests(tmp_path / "shared") == digests(tmp_path / "plain")


def test_a_disk_with_room_for_the_changes_alone_is_enough_where_blocks_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Sharing
) -> None:
    source = save_small(tmp_path / "src", 3, vocab_size=20_000)
    free = type("Usage", (), {"free": 2**20 + 200_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    convert(str(source), tmp_path / "shared", Request("mqa"))
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(UptrainError, match="disk is too full"):
        convert(str(source), tmp_path / "plain", Request("mqa"))


REAL = """
import subprocess, sys
from pathlib import Path
from tests.small import digests, save_small
from uptrain.conversion.run.convert import convert
from uptrain.conversion.request import Request

def used():
    subprocess.run(["sync", "-f", str(disk)], check=True)
    return int(subprocess.check_output(["df", "-B1", "--output=used", str(disk)], text=True).split()[1])

root = Path(sys.argv[1])
disk = root / "disk"
disk.mkdir()
subprocess.run(["mount", "-o", "loop", str(root / "image"), str(disk)], check=True)
try:
    source = save_small(disk / "src", 3, vocab_size=200_000)
    before = used()
    done = convert(str(source), disk / "out", Request("mqa"))
    taken = used() - before
    convert(str(source), root / "plain", Request("mqa"))
    assert digests(disk / "out") == digests(root / "plain")
    assert taken < done.plan.total_bytes / 4, (taken, done.plan.total_bytes)
finally:
    subprocess.run(["umount", str(disk)], check=True)
"""


@pytest.mark.parametrize("system", ["xfs", "btrfs"])
def test_on_a_real_file_system_the_result_takes_little_room(tmp_path: Path, system: str) -> None:
    """Needs its tools, and leave to mount an image of it."""
    make: Any = shutil.which(f"mkfs.{system}", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(400 * 2**20)
    if make is None or os.geteuid() or subprocess.run([make, "-q", str(image)], capture_output=True).returncode:
        pytest.skip(f"no {system} can be made here")
    command = ["unshare", "--mount", sys.executable, "-c", REAL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if "mount: " in done.stderr:
        pytest.skip(f"this machine lets nobody mount an image of {system}")
    assert done.returncode == 0, done.stderr
