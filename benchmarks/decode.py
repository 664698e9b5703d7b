"""Time decoding against context: an original, and what it was converted to, alternating in one run.

    python -m benchmarks decode --synthetic smollm2
    python -m benchmarks decode ORIGINAL CONVERTED …

Every model decodes --tokens tokens, one by one, after a context of the given length, greedily and one sequence at a
time; models alternate within a repeat, and the results are medians over repeats, with their range. Contexts
are random values in caches of each model's own shape, since prefilling 16 K tokens on a CPU takes longer than all the
rest. Speed depends on shapes and not on what values say, so --synthetic builds random models: the sizes of the demo
and of SmolLM2-135M, as the original, MQA, and a latent with absorbed decoding (as `uptrain.load` gives it) and as the
stock class has it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import uptrain
from benchmarks.common import options, settings_of, timed, write_json
from uptrain.evaluation.reading import with_cache
from uptrain.models.mla_decoding import absorb
from uptrain.models.register import register


def llama(**changes: Any) -> Any:
    return AutoConfig.for_model(
        "llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=32768, tie_word_embeddings=True,
        **changes,
    )  # fmt: skip


def deepseek() -> Any:
    return AutoConfig.for_model(
        "deepseek_v3", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=9, kv_lora_rank=96, q_lora_rank=None, qk_rope_head_dim=32,
        qk_nope_head_dim=64, v_head_dim=64, first_k_dense_replace=30, n_routed_experts=2, n_group=1, topk_group=1,
        num_experts_per_tok=1, moe_intermediate_size=8, max_position_embeddings=32768, tie_word_embeddings=True,
    )  # fmt: skip


def gpt2(model_type: str = "gpt2", **changes: Any) -> Any:
    return AutoConfig.for_model(
        model_type,
        vocab_size=4096,
        n_embd=256,
        n_layer=4,
        n_head=8,
        n_positions=32768,
        bos_token_id=0,
        eos_token_id=0,
        **changes,
    )


SYNTHETIC: dict[str, dict[str, Callable[[], Any]]] = {
    "smollm2": {
        "original": lambda: llama(),
        "mqa": lambda: llama_with_heads(1),
        "mla": deepseek,
        "mla, stock": deepseek,
    },
    "demo": {
        "original": lambda: gpt2(),
        "gqa2": lambda: gpt2("uptrain_gpt2", num_key_value_heads=2),
        "mqa": lambda: gpt2("gpt_bigcode", multi_query=True),
        "mla": lambda: gpt2("uptrain_gpt2_mla", kv_lora_rank=64),
    },
}


def llama_with_heads(heads: int) -> Any:
    config = llama()
    config.num_key_value_heads = heads
    return config


def synthetic(size: str, dtype: torch.dtype) -> dict[str, Any]:
    models = {}
    for name, make in SYNTHETIC[size].items():
        torch.manual_seed(0)
        models[name] = AutoModelForCausalLM.from_config(make(), dtype=dtype).eval()
        if name == "mla":
            absorb(models[name])
    return models


def folders(paths: list[Path], dtype: torch.dtype) -> dict[str, Any]:
    models = {}
    for path in paths:
        models[path.name] = uptrain.load(path, dtype=dtype)
        stock = uptrain.load(path, dtype=dtype, absorbed=False)
        if type(stock).__module__ == type(models[path.name]).__module__ and "deepseek" in type(stock).__module__:
            models[f"{path.name}, stock"] = stock
    return models


@torch.no_grad()
def filled(model: Any, context: int) -> DynamicCache:
    """Return a cache of `context` tokens' worth of random values, in the shapes that the model caches."""
    probe, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(torch.ones(1, 1, dtype=torch.long), **with_cache(model, probe))
    for index, layer in enumerate(probe.layers):
        parts = (torch.randn(*one.shape[:2], context, one.shape[3]).to(one.dtype) for one in (layer.keys, layer.values))
        cache.update(*parts, index)
    return cache


@torch.no_grad()
def decode(model: Any, cache: DynamicCache, context: int, tokens: int) -> float:
    """Decode greedily onto the cache, put it back to `context`, and return tokens per second."""
    token = torch.ones(1, 1, dtype=torch.long)
    with timed() as timer:
        for _ in range(tokens):
            token = model(token, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
    cache.crop(context - cache.get_seq_length())
    return tokens / timer.seconds


def held(cache: DynamicCache) -> int:
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))


def measure(models: dict[str, Any], context: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    caches = {name: filled(model, context) for name, model in models.items()}
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            speed = decode(model, caches[name], context, tokens)
            if repeat:  # the first is a warm-up
                speeds[name].append(speed)
    base = statistics.median(next(iter(speeds.values())))
    return [
        {
            "context": context, "model": name, "tokens_per_s": statistics.median(found), "slowest": min(found),
            "fastest": max(found), "ratio": statistics.median(found) / base, "cache_bytes": held(caches[name]),
        }
        for name, found in speeds.items()
    ]  # fmt: skip


def main() -> None:
    parser = options("--out", out={"default": Path("decode.json")})
    parser.add_argument("models", nargs="*", type=Path, help="folders; the first is the original")
    parser.add_argument("--synthetic", choices=SYNTHETIC)
    parser.add_argument("--contexts", default="1024,4096,16384")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    register()
    dtype = getattr(torch, arguments.dtype)
    if bool(arguments.models) == bool(arguments.synthetic):
        parser.error("give folders, or --synthetic")
    models = synthetic(arguments.synthetic, dtype) if arguments.synthetic else folders(arguments.models, dtype)
    rows: list[dict[str, Any]] = []
    for context in map(int, arguments.contexts.split(",")):
        for row in measure(models, context, arguments.tokens, arguments.repeats):
            rows.append(row)
            spread = f"({row['slowest']:.1f}-{row['fastest']:.1f})"
            print(
                f"{row['context']:>7} {row['model']:14} {row['tokens_per_s']:8.1f} tokens/s {spread:>16} "
                f"{row['ratio']:6.2f}x {row['cache_bytes'] / 2**20:8.1f} MiB",
                flush=True,
            )
    settings = settings_of(arguments, threads=torch.get_num_threads())
    write_json(arguments.out, {"settings": settings, "rows": rows})
