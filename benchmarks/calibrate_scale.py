"""Measure what calibrating a large model takes: peak memory and time of `uptrain convert --calibrate`.

    python benchmarks/calibrate_scale.py --dir /dev/shm [--memory 6GB] [--calibration-tokens 1024] [--repair-steps 0]
    python benchmarks/calibrate_scale.py --model ./SmolLM2-135M --groups 1 --memory 500MB

Without --model it makes a Llama of 3.6 billion random bfloat16 weights (Llama 3.2 3B's shape with a head of its own,
but for 512 positions, which makes blocks of as many tokens) with the demo's tokenizer, a shard at a time. Random
weights say nothing of quality; memory and time are those of a real model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from accelerate import init_empty_weights
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "uptrain/workflows/demo/checkpoint"
SHARD = 2**30
"""Bytes of a shard before the next one is begun."""
LLAMA_3B = LlamaConfig(
    vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False, max_position_embeddings=512, dtype="bfloat16",
)  # fmt: skip


def make_llama(folder: Path, layers: int) -> None:
    """Write the random Llama to `folder`: weights of standard deviation 0.02, norms of one."""
    LLAMA_3B.num_hidden_layers = layers
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    LLAMA_3B.architectures = ["LlamaForCausalLM"]
    LLAMA_3B.save_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(LLAMA_3B)
    parts: list[list[str]] = [[]]
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    held = 0
    for name, shape in shapes.items():
        if held >= SHARD:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += 2 * math.prod(shape)
    random, weight_map = np.random.default_rng(0), {}
    for number, names in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({name: weights(shapes[name], random) for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def weights(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Return a norm's ones (one axis), or random weights (two axes), bfloat16."""
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    rows = (random.standard_normal((1, shape[1]), np.float32) * 0.02 for _ in range(shape[0]))
    return np.concatenate([row.astype(ml_dtypes.bfloat16) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Calibrate this checkpoint instead of a random Llama.")
    parser.add_argument("--layers", type=int, default=28, help="Of the random Llama; memory hardly depends on it.")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--memory", default="6GB")
    parser.add_argument("--calibration-tokens", type=int, default=1024)
    parser.add_argument("--repair-steps", type=int, default=0)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="Has room for twice the model.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="uptrain-calibrate-", dir=options.dir) as work:
        model = options.model or Path(work) / "llama"
        if options.model is None:
            make_llama(model, options.layers)
        command = [sys.executable, "-m", "uptrain", "convert", str(model), str(Path(work) / "out"), "--to", "gqa"]
        for name in ("groups", "memory", "calibration_tokens", "repair_steps"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        began = time.perf_counter()
        subprocess.run([*command, "--calibrate", "builtin"], check=True, env=environment)
        took = time.perf_counter() - began
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{size / 1e9:,.2f} GB of weights, {options.calibration_tokens:,} tokens, --memory {options.memory}: ")
    print(f"peak RSS {peak / 1e9:.2f} GB, {took:,.0f} s")


if __name__ == "__main__":
    main()
