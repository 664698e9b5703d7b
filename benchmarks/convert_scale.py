"""Convert Llamas of 1 B to 671 B parameters without their bytes: how long it takes, and the peak memory.

    python -m benchmarks convert_scale [--models 1B 7B 70B] [--layers N] [--dry] [--dir /tmp] [--json]

The source's shards are sparse files of the declared size, which take no disk and read as zeros. The real pipeline
reads, pools and digests them; only its last step, writing to the disk, is left out. With `--dry` they are only planned.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.common import Llama, child, options, peak_memory, shard_name, timed, write_index
from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.progress import State
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.shard_writer import ShardContents, shard_header
from uptrain.checkpoint.shared_work import SoleWorker
from uptrain.conversion import plan_conversion
from uptrain.conversion.plan.planner import Plan
from uptrain.conversion.request import Request
from uptrain.conversion.run.layers import LayerMaker
from uptrain.conversion.run.pipeline import Pipeline

SHARD = 5 * 10**9
"""Bytes of a shard, as large checkpoints are published."""
GROUPS = 8


MODELS = {
    "1B": Llama(22, 2048, 5632, 32000, 32),
    "7B": Llama(32, 4096, 11008, 32000, 32),
    "70B": Llama(80, 8192, 28672, 32000, 64),
    "671B": Llama(182, 16384, 53248, 128256, 128),
}


def make_sparse(folder: Path, shape: Llama, limit: int = SHARD) -> int:
    """Write the checkpoint, its weights as holes, in shards of at most `limit` bytes; return their bytes."""
    folder.mkdir()
    parts: list[list[TensorInfo]] = [[]]
    for info in (TensorInfo(name, "BF16", sizes, "", -1, -1) for name, sizes in shape.tensors().items()):
        if parts[-1] and sum(each.nbytes for each in parts[-1]) + info.nbytes > limit:
            parts.append([])
        parts[-1].append(info)
    weight_map, total = {}, 0
    for number, part in enumerate(parts, start=1):
        name = shard_name(number, len(parts))
        header, size = shard_header(part), sum(info.nbytes for info in part)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + size)
        weight_map |= {info.name: name for info in part}
        total += size
    write_index(folder, weight_map)
    (folder / "config.json").write_text(json.dumps(shape.config()))
    return total


class NoDisk(SoleWorker):
    """Takes all work, and digests shards without writing them."""

    @staticmethod
    def write_shard(
        path: Path, shard: ShardContents, checksum: Checksum, on_bytes: Callable[[int], None], ending: str = ""
    ) -> None:
        """Do as `uptrain.checkpoint.shard_writer.write_shard` does, but for the writing."""
        checksum.update(shard_header(shard.tensors, shard.spans))
        for info in shard.tensors:
            for chunk in shard.chunks(info.name):
                checksum.update(chunk)
                on_bytes(len(chunk))


def convert(source: Path, dry: bool) -> dict[str, float]:
    """Plan the conversion of `source`, run it unless `dry`, and return what this process took."""
    with timed() as planning:
        _, checkpoint, plan = plan_conversion(str(source), Request("gqa", GROUPS), dry=dry)
    with timed() as running:
        if not dry:
            run(checkpoint, plan, source.parent)
    return {
        "shards": len(plan.shards),
        "output_bytes": plan.total_bytes,
        "plan_seconds": planning.seconds,
        "run_seconds": running.seconds,
        "peak_rss_bytes": peak_memory(),
    }


def run(checkpoint: Checkpoint, plan: Plan, folder: Path) -> None:
    """Run a plan without its disk, in a temporary folder in `folder`."""
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        state = State(Path(partial), plan.digest)
        Pipeline(checkpoint, plan, state, LayerMaker(checkpoint, plan), NoDisk(), Events()).run()


def measure(work: Path, shape: Llama, dry: bool) -> dict[str, float]:
    """Convert a Llama of `shape` in a process of its own."""
    source = work / "source"
    total = make_sparse(source, shape)
    return {"source_bytes": total, **child("convert_scale", "--source", source, *(["--dry"] if dry else []))}


def main() -> None:
    parser = options("--dir", "--json")
    parser.add_argument("--models", nargs="+", default=["1B", "7B", "70B"], choices=list(MODELS))
    parser.add_argument("--layers", type=int, help="layers, instead of the model's own number")
    parser.add_argument("--dry", action="store_true", help="only plan")
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.source:
        print(json.dumps(convert(asked.source, asked.dry)))
        return
    for name in asked.models:
        shape = MODELS[name]
        if asked.layers:
            shape = replace(shape, num_hidden_layers=asked.layers)
        with tempfile.TemporaryDirectory(prefix="uptrain-convert-scale-", dir=asked.dir) as work:
            found = measure(Path(work), shape, asked.dry)
        if asked.json:
            print(json.dumps({"model": name, "num_hidden_layers": shape.num_hidden_layers, **found}), flush=True)
            continue
        print(
            f"{name:>5}  {shape.num_hidden_layers} layers, {found['source_bytes'] / 1e9:,.1f} GB in {found['shards']} "
            f"shards: planned in {found['plan_seconds']:.1f} s, run in {found['run_seconds']:.1f} s, "
            f"peak RSS {found['peak_rss_bytes'] / 1e6:,.0f} MB",
            flush=True,
        )
