"""What benchmarks share: options, clocks, processes of their own, made-up Llamas, tables and results as JSON."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

OPTIONS: dict[str, dict[str, Any]] = {
    "--model": {"default": "demo", "help": "checkpoint folder, Hub id or `demo` (default: demo)"},
    "--text": {"default": "python-stdlib:held-out", "help": "file or builtin text to score"},
    "--calibrate": {"default": "python-stdlib", "help": "text of the calibrated methods"},
    "--calibration-tokens": {"type": int, "default": 65_536},
    "--repair-steps": {"type": int, "help": "gradient steps per layer (default: the converter's)"},
    "--dir": {"type": Path, "default": Path(tempfile.gettempdir()), "help": "where temporary folders are made"},
    "--work": {"help": "folder for converted checkpoints (default: the system's)"},
    "--out": {"type": Path, "help": "JSON file for the results"},
    "--json": {"action": "store_true", "help": "print one JSON object per result"},
}
"""Options that several benchmarks have, in the same words."""


def options(*names: str, **changes: Mapping[str, Any]) -> argparse.ArgumentParser:
    """Return a parser that shows the calling module's docstring, with some of OPTIONS.

    - `names`: which of OPTIONS, such as "--model";
    - `changes`: what differs here, by the option's Python name: `calibration_tokens={"default": 1024}`.
    """
    caller = inspect.stack()[1].frame.f_globals
    parser = argparse.ArgumentParser(
        prog=f"python -m {caller['__spec__'].name.replace('.', ' ')}" if caller.get("__spec__") else None,
        description=caller["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in names:
        parser.add_argument(name, **{**OPTIONS[name], **changes.pop(name.lstrip("-").replace("-", "_"), {})})
    assert not changes, f"not among the options of this benchmark: {changes}"
    return parser


@dataclass
class Timer:
    """Seconds since it was begun, or until the block that it timed has ended."""

    began: float
    ended: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of wall time."""
        return (time.perf_counter() if self.ended is None else self.ended) - self.began


@contextmanager
def timed() -> Iterator[Timer]:
    """Time the block: `with timed() as timer: …`, then `timer.seconds`."""
    timer = Timer(time.perf_counter())
    try:
        yield timer
    finally:
        timer.ended = time.perf_counter()


def peak_memory(of: int = resource.RUSAGE_SELF) -> int:
    """Return the largest resident set of this process (or of its children) so far, in bytes."""
    return resource.getrusage(of).ru_maxrss * 1024


def child(name: str, *words: object) -> Any:
    """Run a benchmark in a process of its own; return the JSON on the last line that it prints."""
    command = [sys.executable, "-m", "benchmarks", name, *map(str, words)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama whose weights are made up, and the tensors that it promises."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    """0: as many as attention heads."""
    head_dim: int = 0
    """0: hidden_size / num_attention_heads."""

    @property
    def key_value_heads(self) -> int:
        """Return the number of key/value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def dims_per_head(self) -> int:
        """Return the dims of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def layer(self, number: int) -> dict[str, tuple[int, ...]]:
        """Return a layer's tensors and their shapes, in the order in which checkpoints store them."""
        base, hidden, inner = f"model.layers.{number}.", self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.dims_per_head
        keys = self.key_value_heads * self.dims_per_head
        return {
            f"{base}input_layernorm.weight": (hidden,),
            f"{base}self_attn.q_proj.weight": (queries, hidden),
            f"{base}self_attn.k_proj.weight": (keys, hidden),
            f"{base}self_attn.v_proj.weight": (keys, hidden),
            f"{base}self_attn.o_proj.weight": (hidden, queries),
            f"{base}post_attention_layernorm.weight": (hidden,),
            f"{base}mlp.gate_proj.weight": (inner, hidden),
            f"{base}mlp.up_proj.weight": (inner, hidden),
            f"{base}mlp.down_proj.weight": (hidden, inner),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return all tensors and their shapes."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for number in range(self.num_hidden_layers):
            found |= self.layer(number)
        return found | {"model.norm.weight": (self.hidden_size,), "lm_head.weight": (self.vocab_size, self.hidden_size)}

    def config(self, **more: Any) -> dict[str, Any]:
        """Return its config.json, with `more` keys."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size, "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads, "num_key_value_heads": self.key_value_heads,
            "head_dim": self.dims_per_head, "vocab_size": self.vocab_size, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", **more,
        }  # fmt: skip


def shard_name(number: int, count: int) -> str:
    """Return the file name of a shard, counted from 1."""
    return f"model-{number:05}-of-{count:05}.safetensors"


def write_index(folder: Path, weight_map: Mapping[str, str], **metadata: Any) -> None:
    """Write a checkpoint's index: which tensor is in which file."""
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def table(columns: Mapping[str, str], rows: Iterable[Iterable[object]] = ()) -> str:
    """Return a Markdown table.

    - `columns`: each column's name and its alignment, "left" or "right";
    - `rows`: the cells, in the columns' order.
    """
    lines = [row(columns), "|" + "|".join("---:" if side == "right" else "---" for side in columns.values()) + "|"]
    return "\n".join([*lines, *map(row, rows)])


def row(cells: Iterable[object]) -> str:
    """Return one line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def settings_of(arguments: argparse.Namespace, **more: object) -> dict[str, Any]:
    """Return what was asked for, as JSON can hold it."""
    return {key: str(value) for key, value in vars(arguments).items()} | more


def write_json(path: Path, result: object) -> None:
    """Write a result, for people to read too."""
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
