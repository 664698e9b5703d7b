"""A Llama checkpoint of a few kB, made without transformers: cheap enough to convert hundreds of times in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from uptrain.checkpoint.checksum import checksum_file

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 16,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def small_tensors(seed: int = 0, dtype: Any = np.float32, **config: Any) -> dict[str, np.ndarray]:
    """Return the tensors that CONFIG, with these changes, promises."""
    sizes = {**CONFIG, **config}
    random, width, inner = np.random.default_rng(seed), sizes["hidden_size"], sizes["intermediate_size"]
    rows = sizes["num_key_value_heads"] * (width // sizes["num_attention_heads"])
    shapes = {"model.embed_tokens": (sizes["vocab_size"], width)}
    for layer in range(sizes["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        shapes |= {f"{base}input_layernorm": (width,), f"{base}post_attention_layernorm": (width,)}
        shapes |= {f"{base}self_attn.{part}_proj": (width, width) for part in "qo"}
        shapes |= {f"{base}self_attn.{part}_proj": (rows, width) for part in "kv"}
        shapes |= {f"{base}mlp.{part}_proj": (inner, width) for part in ("gate", "up")}
        shapes[f"{base}mlp.down_proj"] = (width, inner)
    shapes |= {"model.norm": (width,), "lm_head": (sizes["vocab_size"], width)}
    return {f"{name}.weight": (random.standard_normal(shape) / 4).astype(dtype) for name, shape in shapes.items()}


def save_small(folder: Path, shards: int = 1, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """Write a checkpoint of `tensors` (CONFIG's, if none are given) in `shards` files."""
    folder.mkdir(exist_ok=True)
    tensors = small_tensors(**config) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    names = names if shards > 1 else ["model.safetensors"]
    per, weight_map = -(-len(tensors) // shards), {}
    for number, shard in enumerate(names):
        part = dict(list(tensors.items())[number * per : (number + 1) * per])
        save_file(part, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Return the checksum of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): checksum_file(path) for path in files}
