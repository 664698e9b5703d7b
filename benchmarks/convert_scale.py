"""Convert Llamas of 1 B to 671 B parameters without their bytes: how long it takes, and the peak memory.

    python benchmarks/convert_scale.py [--models 1B 7B 70B] [--layers N] [--dry] [--dir /tmp] [--json]

The source's shards are sparse files of the declared size, which take no disk and read as zeros. The real pipeline
reads, pools and digests them; only its last step, writing to the disk, is left out. With `--dry` they are only planned.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from uptrain.checkpoint.checksum import Checksum  # noqa: E402
from uptrain.checkpoint.header import TensorInfo  # noqa: E402
from uptrain.checkpoint.progress import State  # noqa: E402
from uptrain.checkpoint.shard_writer import ShardContents, shard_header  # noqa: E402
from uptrain.checkpoint.shared_work import SoleWorker  # noqa: E402
from uptrain.conversion.request import Request  # noqa: E402
from uptrain.conversion.run.convert import plan_conversion  # noqa: E402
from uptrain.conversion.run.pipeline import Pipeline  # noqa: E402

SHARD = 5 * 10**9
"""Bytes of a shard, as large checkpoints are published."""
GROUPS = 8


@dataclass(frozen=True)
class Shape:
    """A Llama with as many key/value heads as heads."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_attention_heads: int

    def tensors(self) -> Iterable[TensorInfo]:
        """Yield its tensors in bfloat16, in the order they are stored."""
        hidden, inner = self.hidden_size, self.intermediate_size
        yield _info("model.embed_tokens.weight", self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            base = f"model.layers.{layer}."
            yield _info(f"{base}input_layernorm.weight", hidden)
            for part in "qkvo":
                yield _info(f"{base}self_attn.{part}_proj.weight", hidden, hidden)
            yield _info(f"{base}post_attention_layernorm.weight", hidden)
            for part in ("gate", "up"):
                yield _info(f"{base}mlp.{part}_proj.weight", inner, hidden)
            yield _info(f"{base}mlp.down_proj.weight", hidden, inner)
        yield _info("model.norm.weight", hidden)
        yield _info("lm_head.weight", self.vocab_size, hidden)


MODELS = {
    "1B": Shape(22, 2048, 5632, 32000, 32),
    "7B": Shape(32, 4096, 11008, 32000, 32),
    "70B": Shape(80, 8192, 28672, 32000, 64),
    "671B": Shape(182, 16384, 53248, 128256, 128),
}


def _info(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, "BF16", shape, "", -1, -1)


def make_sparse(folder: Path, shape: Shape, limit: int = SHARD) -> int:
    """Write the checkpoint, its weights as holes, in shards of at most `limit` bytes; return their bytes."""
    folder.mkdir()
    parts: list[list[TensorInfo]] = [[]]
    for info in shape.tensors():
        if parts[-1] and sum(each.nbytes for each in parts[-1]) + info.nbytes > limit:
            parts.append([])
        parts[-1].append(info)
    weight_map, total = {}, 0
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        header, size = shard_header(part), sum(info.nbytes for info in part)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + size)
        weight_map |= {info.name: name for info in part}
        total += size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = dict(vars(shape))
    config |= {"model_type": "llama", "num_key_value_heads": shape.num_attention_heads, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
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
    start = time.perf_counter()
    _, checkpoint, plan = plan_conversion(str(source), Request("gqa", GROUPS), dry=dry)
    planned = time.perf_counter()
    if not dry:
        with tempfile.TemporaryDirectory(dir=source.parent) as partial:
            state = State(Path(partial), plan.digest)
            Pipeline(checkpoint, plan, Path(partial), state, lambda count: None, worker=NoDisk()).run()
    return {
        "shards": len(plan.shards),
        "output_bytes": plan.total_bytes,
        "plan_seconds": planned - start,
        "run_seconds": time.perf_counter() - planned,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure(work: Path, shape: Shape, dry: bool) -> dict[str, float]:
    """Convert a Llama of `shape` in a process of its own."""
    source = work / "source"
    total = make_sparse(source, shape)
    command = [sys.executable, __file__, "--source", str(source), *(["--dry"] if dry else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"source_bytes": total, **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert large sparse checkpoints with the disk left out.")
    parser.add_argument("--models", nargs="+", default=["1B", "7B", "70B"], choices=list(MODELS))
    parser.add_argument("--layers", type=int, help="Layers, instead of the model's own number.")
    parser.add_argument("--dry", action="store_true", help="Only plan.")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.source:
        print(json.dumps(convert(options.source, options.dry)))
        return
    for name in options.models:
        shape = MODELS[name]
        if options.layers:
            shape = replace(shape, num_hidden_layers=options.layers)
        with tempfile.TemporaryDirectory(prefix="uptrain-convert-scale-", dir=options.dir) as work:
            found = measure(Path(work), shape, options.dry)
        if options.json:
            print(json.dumps({"model": name, "num_hidden_layers": shape.num_hidden_layers, **found}), flush=True)
            continue
        print(
            f"{name:>5}  {shape.num_hidden_layers} layers, {found['source_bytes'] / 1e9:,.1f} GB in {found['shards']} "
            f"shards: planned in {found['plan_seconds']:.1f} s, run in {found['run_seconds']:.1f} s, "
            f"peak RSS {found['peak_rss_bytes'] / 1e6:,.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
