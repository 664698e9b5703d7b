"""Fuzz what reads a checkpoint's files guided by coverage: headers, indexes, configs, tokenizers, manifests, recipes.

    pip install atheris          # Linux, Python 3.11 to 3.13
    python -m benchmarks fuzz_atheris header -max_total_time=600
    python -m benchmarks fuzz_atheris recipe -max_total_time=600 corpus/

The first word is the kind, the rest libFuzzer's own options. Each input is held to the rule of tests/fuzz: it works or
is refused in one sentence. What fails is written to crash-*; put it into the tests as an example.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["uptrain", "yaml"]):
    from tests.fuzz.attempt import attempt
    from tests.fuzz.test_files import SETTINGS, TOKENIZERS, load
    from tests.small import save_small
    from uptrain.checkpoint.header import read_header
    from uptrain.checkpoint.manifest import MANIFEST, converted_from, verify
    from uptrain.checkpoint.reader import open_checkpoint
    from uptrain.conversion import plan_conversion
    from uptrain.conversion.request import Request
    from uptrain.training import recipes


def header(data: bytes, folder: Path) -> None:
    """Read it as a header of the length that it has."""
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(40))
    attempt(read_header, path)


def index(data: bytes, folder: Path) -> None:
    """Open a checkpoint with it as the index."""
    (folder / "model.safetensors.index.json").write_bytes(data)
    attempt(open_checkpoint, folder)


def config(data: bytes, folder: Path) -> None:
    """Plan a conversion of a checkpoint with it as the config."""
    (folder / "config.json").write_bytes(data)
    attempt(plan_conversion, str(folder), Request("gqa", 2))


def tokenizer(data: bytes, folder: Path) -> None:
    """Load it as tokenizer.json and use it; it is parsed in Rust, whose coverage is not seen."""
    load(folder, data, json.dumps(SETTINGS).encode())


def manifest(data: bytes, folder: Path) -> None:
    """Verify a folder with it as uptrain.json, and read its history."""
    (folder / MANIFEST).write_bytes(data)
    attempt(verify, folder)
    attempt(converted_from, folder)


def recipe(data: bytes, folder: Path) -> None:
    """Load it as a recipe."""
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    attempt(recipes.load_recipe, str(path))


KINDS = {kind.__name__: kind for kind in (header, index, config, tokenizer, manifest, recipe)}


def right(kind: str, folder: Path) -> list[bytes]:
    """Return right files of the kind, to start from."""
    if kind == "header":
        data = (folder / "model.safetensors").read_bytes()
        return [data[8 : 8 + struct.unpack("<Q", data[:8])[0]]]
    if kind == "config":
        return [(folder / "config.json").read_bytes()]
    if kind == "tokenizer":
        return [json.dumps(tokenizer).encode() for tokenizer in TOKENIZERS]
    if kind == "recipe":
        return [recipes.find_recipe("demo-uptrain").read_bytes()]
    if kind == "index":
        return [b'{"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}}']
    files = {"config.json": {"size": 1, "checksum": "blake3:0"}}
    return [json.dumps({"format": 1, "stages": [], "files": files}).encode()]


def main() -> None:
    """Hand the kind's function to libFuzzer."""
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        sys.exit(f"Say what to fuzz: {', '.join(KINDS)}.")
    kind = KINDS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory() as work:
        folder = save_small(Path(work) / "model")
        seeds = Path(work) / "seeds"
        seeds.mkdir()
        for number, seed in enumerate(right(kind.__name__, folder)):
            (seeds / f"right-{number}").write_bytes(seed)
        # What is right is kept however small an input covers as much, for much of what reads it is not seen.
        atheris.Setup([*sys.argv, "-keep_seed=1", str(seeds)], lambda data: kind(data, folder))
        atheris.Fuzz()
