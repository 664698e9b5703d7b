"""Make one other tool's model and measure it; run by peers.py with the interpreter that has the tool.

The job comes as JSON on the standard input, the figures go as JSON to the last line of the standard output.
Needs torch, transformers and that tool, and nothing of uptrain.
"""

from __future__ import annotations

import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

CACHE_TOKENS = 64


@torch.no_grad()
def log_probabilities(model: Any, block: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return (tokens - 1, vocab_size) log-probabilities of what follows each token but the last."""
    return functional.log_softmax(model(block[None], **options).logits[0, :-1].float(), dim=-1)


def score(model: Any, original: Any, blocks: torch.Tensor, options: Any = dict) -> dict[str, float]:
    """Return perplexity, KL from the original and top-1 agreement; `options()` are the model's own for each block."""
    loss = kl = agreed = 0.0
    for block in blocks:
        theirs = log_probabilities(original, block, use_cache=False)
        ours = log_probabilities(model, block, **options())
        loss -= float(ours.gather(1, block[1:, None]).sum(dtype=torch.float64))
        kl += float((theirs.exp() * (theirs - ours)).sum(dtype=torch.float64))
        agreed += float((ours.argmax(1) == theirs.argmax(1)).sum())
    tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    return {"perplexity": math.exp(loss / tokens), "kl": kl / tokens, "top1_agreement": agreed / tokens}


@torch.no_grad()
def cached_values(model: Any, block: torch.Tensor) -> float:
    """Return how many values the cache that the model fills holds per token, counted in its tensors."""
    cache = model(block[None, :CACHE_TOKENS], use_cache=True).past_key_values
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) / CACHE_TOKENS


def load(folder: str) -> Any:
    """Load a checkpoint's own class in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def cacheshrink(job: dict[str, Any]) -> tuple[Any, Any]:
    """Convert with cacheshrink, calibrated on the job's texts."""
    from cacheshrink import config, convert_to_mla

    if job["method"].endswith("+rotary"):
        # It asks the config for rope_theta, which newer transformers keep in rope_parameters: given by hand.
        plain = config.MLAConfig._extract_config

        def extracted(hf_config: Any, model_type: str) -> dict[str, Any]:
            found = plain(hf_config, model_type)
            found["rope_theta"] = hf_config.rope_parameters["rope_theta"]
            found["extra_config"] = {**found.get("extra_config", {}), "uses_rope": True}
            return found

        config.MLAConfig._extract_config = staticmethod(extracted)
    model, _ = convert_to_mla(
        job["model"],
        compression_ratio=1 / job["share"],
        compression_method=job["method"].removesuffix("+rotary"),
        dtype=torch.float32,
        device="cpu",
        calibration_texts=job["texts"],
        num_calibration_samples=len(job["texts"]),
        max_calibration_length=job["text_tokens"],
        trust_remote_code=False,
        verbose=False,
    )
    return model.eval(), lambda: {"use_cache": False}


def spectral_kv(job: dict[str, Any]) -> tuple[Any, Any]:
    """Compress keys as they are cached: every block is read through its cache."""
    from spectral_kv import SpectralCache, SpectralProfiler

    profile = SpectralProfiler().profile_from_model(
        job["model"], job["texts"], job["text_tokens"], device="cpu", quantize=None
    )
    return load(job["model"]), lambda: {"past_key_values": SpectralCache(profile)}


PEERS = {"cacheshrink": cacheshrink, "spectral-kv": spectral_kv}


def main() -> None:
    """Do the job of the standard input."""
    job = json.loads(sys.stdin.read())
    blocks = torch.load(job["blocks"])
    began = time.monotonic()
    model, options = PEERS[job["peer"]](job)
    seconds = time.monotonic() - began
    original = load(job["model"])
    before, after = cached_values(original, blocks[0]), None
    found = score(model, original, blocks, options)
    if job["peer"] == "cacheshrink":
        after = cached_values(model, blocks[0])
    versions = {name: version(name) for name in (job["peer"], "torch", "transformers")}
    kind = AutoConfig.from_pretrained(job["model"]).model_type
    print()
    print(
        json.dumps({**found, "cache": after and after / before, "seconds": seconds, "versions": versions, "kind": kind})
    )


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    main()
