"""Measure what calibrating a large model takes: peak memory and time of `uptrain convert --calibrate`.

    python -m benchmarks calibrate_scale --dir /dev/shm [--memory 6GB] [--calibration-tokens 1024] [--repair-steps 0]
    python -m benchmarks calibrate_scale --model ./SmolLM2-135M --groups 1 --memory 500MB

Without --model it makes a Llama of 3.6 billion random bfloat16 weights (Llama 3.2 3B's shape with a head of its own,
but for 512 positions, which makes blocks of as many tokens) with the demo's tokenizer, a shard at a time. Random
weights say nothing of quality; memory and time are those of a real model.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks.common import ROOT, Llama, options, peak_memory, shard_name, timed, write_index

DEMO = ROOT / "uptrain/workflows/demo/checkpoint"
SHARD = 2**30
"""Bytes of a shard before the next one is begun."""
LLAMA_3B = Llama(28, 3072, 8192, 128256, num_attention_heads=24, num_key_value_heads=8, head_dim=128)


def make_llama(folder: Path, layers: int) -> None:
    """Write the random Llama to `folder`: weights of standard deviation 0.02, norms of one."""
    llama = replace(LLAMA_3B, num_hidden_layers=layers)
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    config = llama.config(max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=10000.0, hidden_act="silu")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    parts: list[list[str]] = [[]]
    shapes = llama.tensors()
    held = 0
    for name, shape in shapes.items():
        if held >= SHARD:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += 2 * math.prod(shape)
    random, weight_map = np.random.default_rng(0), {}
    for number, names in enumerate(parts, start=1):
        file = shard_name(number, len(parts))
        save_file({name: weights(shapes[name], random) for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    write_index(folder, weight_map)


def weights(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Return a norm's ones (one axis), or random weights (two axes), bfloat16."""
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    rows = (random.standard_normal((1, shape[1]), np.float32) * 0.02 for _ in range(shape[0]))
    return np.concatenate([row.astype(ml_dtypes.bfloat16) for row in rows])


def main() -> None:
    parser = options(
        "--model", "--calibration-tokens", "--repair-steps", "--dir",
        model={"type": Path, "default": None, "help": "calibrate this checkpoint instead of a random Llama"},
        calibration_tokens={"default": 1024}, repair_steps={"default": 0},
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=28, help="of the random Llama; memory hardly depends on it")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--memory", default="6GB")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="uptrain-calibrate-", dir=asked.dir) as work:
        model = asked.model or Path(work) / "llama"
        if asked.model is None:
            make_llama(model, asked.layers)
        command = [sys.executable, "-m", "uptrain", "convert", str(model), str(Path(work) / "out"), "--to", "gqa"]
        for name in ("groups", "memory", "calibration_tokens", "repair_steps"):
            command += [f"--{name.replace('_', '-')}", str(getattr(asked, name))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with timed() as timer:
            subprocess.run([*command, "--calibrate", "builtin"], check=True, env=environment)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(f"{size / 1e9:,.2f} GB of weights, {asked.calibration_tokens:,} tokens, --memory {asked.memory}: ")
    print(f"peak RSS {peak_memory(resource.RUSAGE_CHILDREN) / 1e9:.2f} GB, {timer.seconds:,.0f} s")
