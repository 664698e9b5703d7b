"""Time `uptrain convert --to gqa` against `cp -r` of the same synthetic sharded Llama checkpoint.

    python -m benchmarks convert_speed [--gigabytes 8] [--shards 16] [--dir /dev/shm] [--json]
    python -m benchmarks convert_speed --gigabytes 2 --heads 32:32:8 --heads 64:64:8 --heads 32:8:2 --profile

Each --heads is one source: its attention heads, its key/value heads, and how many of those stay. Many key/value heads
are what makes pooling work hard. Both commands run as processes of their own, in turns, each after its earlier output
is removed; the first turn warms up and does not count. On a memory file system neither waits for a disk, so the ratio
is the converter's own cost. On a disk both end when their bytes are on it: a conversion flushes what it writes, so the
copy is followed by `sync`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, Llama, options, shard_name, timed, write_index


@dataclass(frozen=True)
class Shape:
    """A Llama's width: attention heads, key/value heads, and how many of them the conversion keeps."""

    heads: int
    key_value_heads: int
    groups: int
    head_dim: int = 64

    @classmethod
    def read(cls, text: str) -> Shape:
        """Read `heads:key_value_heads:groups` or, with the dims of a head, `heads:key_value_heads:groups:head_dim`."""
        return cls(*map(int, text.split(":")))

    def llama(self, total_bytes: int = 0) -> Llama:
        """Return the Llama of this width whose bfloat16 weights are nearest to as many bytes."""
        hidden = self.heads * self.head_dim
        # The MLP's width is in Llama's proportion.
        llama = Llama(0, hidden, hidden * 11 // 4, 32000, self.heads, self.key_value_heads, self.head_dim)
        left = total_bytes - sum(map(size, llama.tensors().values()))
        return replace(llama, num_hidden_layers=max(1, round(left / sum(map(size, llama.layer(0).values())))))


# Multi-head attention narrow and wide, and grouped heads.
SHAPES = ("32:32:8", "24:24:8:128", "64:64:8", "32:8:2")


def size(shape: tuple[int, ...]) -> int:
    """Return a bf16 tensor's bytes."""
    return 2 * int(np.prod(shape))


def split(tensors: dict[str, tuple[int, ...]], shards: int) -> list[dict[str, tuple[int, ...]]]:
    """Cut in order into `shards` parts of nearly equal bytes."""
    target = sum(map(size, tensors.values())) / shards
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    written = 0
    for name, shape in tensors.items():
        parts[min(int((written + size(shape) / 2) / target), shards - 1)][name] = shape
        written += size(shape)
    return [part for part in parts if part]


def noise() -> Iterator[memoryview]:
    """Yield 8 MiB blocks of finite bf16 bytes at a weight's scale, no two neighbours alike."""
    values = np.random.default_rng(0).normal(scale=0.02, size=4 << 20).astype(np.float32)
    block = (values.view(np.uint32) >> 16).astype(np.uint16)
    while True:
        block = np.roll(block, 12345)
        yield block.view(np.uint8).data


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], blocks: Iterator[memoryview]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size(shape)]}
        offset += size(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while offset:
            block = next(blocks)[:offset]
            file.write(block)
            offset -= len(block)


def make_source(folder: Path, shape: Shape, total_bytes: int, shards: int) -> int:
    """Write the checkpoint and return its weights' bytes."""
    folder.mkdir()
    llama = shape.llama(total_bytes)
    tensors = llama.tensors()
    parts, blocks = split(tensors, shards), noise()
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        name = shard_name(number, len(parts))
        write_shard(folder / name, part, blocks)
        weight_map |= dict.fromkeys(part, name)
    total = sum(map(size, tensors.values()))
    write_index(folder, weight_map, total_size=total)
    config = llama.config(
        max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu", bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return total


def run(command: list[str], outputs: tuple[Path, ...]) -> tuple[float, float, int]:
    """Run one command and return its wall seconds, its processor seconds and its peak resident bytes."""
    # Both outputs go, so that either command finds the same memory free and already touched by the other.
    for output in outputs:
        shutil.rmtree(output, ignore_errors=True)
    with tempfile.TemporaryFile() as log:
        # The first turn leaves compiled modules, as an installation does, also where this shell forbids it.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        with timed() as timer:
            child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(child.pid, 0)
        # wait4 took the child from under Popen, which would otherwise wait for it again.
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed ({child.returncode}):\n{log.read().decode()}")
    return timer.seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def measure(
    work: Path, shape: Shape, total_bytes: int, shards: int, runs: int, profile: bool
) -> dict[str, float | list[str]]:
    source, copy, out = work / "source", work / "copy", work / "converted"
    weights = make_source(source, shape, total_bytes, shards)
    arguments = ["-m", "uptrain", "convert", str(source), str(out), "--to", "gqa", "--groups", str(shape.groups)]
    convert = [sys.executable, *arguments]
    cp = ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(source), str(copy)]
    pairs = []
    for _ in range(runs + 1):
        pairs.append((run(cp, (copy, out)), run(convert, (copy, out))))
    (copies, copy_busy, _), (conversions, busy, peaks) = (
        zip(*found, strict=True) for found in zip(*pairs[1:], strict=True)
    )
    copied, converted = statistics.median(copies), statistics.median(conversions)
    largest = largest_items(arguments, (copy, out), work / "profile") if profile else []
    return {
        **asdict(shape),
        "largest": largest,
        "source_bytes": weights,
        "output_bytes": sum(path.stat().st_size for path in out.rglob("*.safetensors")),
        "cp_seconds": copied,
        "convert_seconds": converted,
        "ratio": converted / copied,
        # Far from 1 on a busy machine, where the medians then mean little.
        "cp_spread": max(copies) / min(copies),
        "convert_spread": max(conversions) / min(conversions),
        "cp_cpu_seconds": statistics.median(copy_busy),
        "convert_cpu_seconds": statistics.median(busy),
        # Counts the pages of mapped input files too, so it is an upper bound of what convert allocates.
        "peak_rss_bytes": max(peaks),
        "runs": runs,
    }


def largest_items(arguments: list[str], outputs: tuple[Path, ...], report: Path, count: int = 5) -> list[str]:
    """Convert once more under py-spy (pip install py-spy); return the functions that ran longest and their share."""
    tool = shutil.which("py-spy") or sys.exit("--profile needs py-spy: pip install py-spy")
    run([tool, "record", "-r", "500", "-f", "raw", "-o", str(report), "--", sys.executable, *arguments], outputs)
    items: Counter[str] = Counter()
    for line in report.read_text().splitlines():
        stack, _, samples = line.rpartition(" ")
        function = re.sub(r":\d+\)$", ")", stack.rpartition(";")[2])
        if function and "thread" not in function:  # neither an unreadable stack nor a worker that waits for work
            items[function] += int(samples)
    return [f"{samples / items.total():4.0%}  {name}" for name, samples in items.most_common(count)]


def main() -> None:
    parser = options("--dir", "--json", dir={"default": Path("/dev/shm")})
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument(
        "--heads", action="append", type=Shape.read, metavar="HEADS:KEY_VALUE_HEADS:GROUPS[:HEAD_DIM]",
        help=f"a source; may be repeated; default: {', '.join(SHAPES)}",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print the functions that take longest (needs py-spy)")
    asked = parser.parse_args()
    total = int(asked.gigabytes * 1e9)
    if shutil.disk_usage(asked.dir).free < 3 * total:
        sys.exit(f"{asked.dir} has less than the {3 * asked.gigabytes:g} GB free that this needs")
    for shape in asked.heads or map(Shape.read, SHAPES):
        with tempfile.TemporaryDirectory(prefix="uptrain-convert-speed-", dir=asked.dir) as work:
            result = measure(Path(work), shape, total, asked.shards, asked.runs, asked.profile)
        if asked.json:
            print(json.dumps(result), flush=True)
        else:
            show(result, asked.runs)


def show(result: dict[str, Any], runs: int) -> None:
    """Print one source's figures."""
    print(f"heads      {result['heads']}, key/value heads {result['key_value_heads']} to {result['groups']}")
    print(f"source     {result['source_bytes'] / 1e9:7.3f} GB, output {result['output_bytes'] / 1e9:.3f} GB")
    for label, key in (("cp -r", "cp"), ("convert", "convert")):
        seconds, busy, spread = (result[f"{key}_{what}"] for what in ("seconds", "cpu_seconds", "spread"))
        print(f"{label:<10} {seconds:7.3f} s   median of {runs}, slowest / fastest {spread:.2f}", end="")
        print(f", processors {busy:.3f} s")
    print(f"ratio      {result['ratio']:7.2f}")
    print(f"peak RSS   {result['peak_rss_bytes'] / 1e6:7.0f} MB")
    for line in result["largest"]:
        print(f"           {line}")
    print(flush=True)
