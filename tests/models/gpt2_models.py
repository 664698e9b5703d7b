"""Tiny GPT-2s with weights at a trained model's scale, and the oracle for shared heads: GPT-2 itself."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from uptrain.models.remote_code.modeling_uptrain_gpt2 import UptrainGPT2Config, UptrainGPT2LMHeadModel

HEADS, HEAD_DIM, LAYERS, VOCAB = 4, 8, 2, 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 48,
    "n_embd": HEADS * HEAD_DIM,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def grouped(groups: int, attention: str = "sdpa", **options: Any) -> UptrainGPT2LMHeadModel:
    """Make a seeded fp32 model in eval mode, with biases and norms that are not at their initial values."""
    config = UptrainGPT2Config(num_key_value_heads=groups, attn_implementation=attention, **SIZES | options)
    model = UptrainGPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if ".ln_" in name:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                # Conv1D keeps (in, out). Large enough for sharp attention: logits of several units.
                parameter.copy_(2.0 * noise / parameter.shape[0] ** 0.5 if "attn" in name else 0.3 * noise)
    return model


def repeated(model: UptrainGPT2LMHeadModel) -> GPT2LMHeadModel:
    """Return transformers' own GPT-2 that holds each shared key/value head once per query head."""
    groups = model.config.num_key_value_heads
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "auto_map")}
    oracle = GPT2LMHeadModel(GPT2Config(**settings, attn_implementation=model.config._attn_implementation))
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if ".c_attn." in name:
            q, k, v = tensor.split([HEADS * HEAD_DIM, groups * HEAD_DIM, groups * HEAD_DIM], dim=-1)
            tensors[name] = torch.cat([q, repeat_heads(k, groups), repeat_heads(v, groups)], dim=-1)
    oracle.load_state_dict(tensors)
    return oracle.train(model.training)


def repeat_heads(columns: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeat heads stored side by side: (..., groups·head_dim) to (..., HEADS·head_dim)."""
    heads = columns.unflatten(-1, (groups, HEAD_DIM))
    return heads.repeat_interleave(HEADS // groups, dim=-2).flatten(-2)


def prompt(batch: int = 2, tokens: int = 11, seed: int = 3) -> torch.Tensor:
    """Return token ids (batch, tokens) that never hold the padding id 0."""
    return torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask (batch, longest), each row padded with 0 on its left."""
    longest = max(row.numel() for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - row.numel(), 0)) for row in rows])
    return ids, (ids != 0).long()


def greedy(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Generate 12 tokens after ids (batch, tokens), greedily unless `options` say otherwise."""
    options = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, **options)
