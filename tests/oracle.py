"""An oracle for pooled checkpoints that shares no code with uptrain: transformers' own source class, whose key and
value heads are pooled with torch and then repeated so that the class still sees one per query head."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def pool_and_repeat(heads: torch.Tensor, groups: int, method: str) -> torch.Tensor:
    """Pool (heads, …) to `groups` and repeat each back, keeping the shape."""
    runs = heads.float().unflatten(0, (groups, -1))
    pooled = runs.mean(1) if method == "mean" else runs[:, 0]
    return pooled.repeat_interleave(runs.shape[1], dim=0).to(heads.dtype)


@torch.no_grad()
def pool_model(model: PreTrainedModel, groups: int, method: str = "mean") -> PreTrainedModel:
    """Pool a model's key and value heads in place, in its own class, and return it."""
    for module in model.modules():
        if hasattr(module, "c_attn"):
            _pool_gpt2(module, groups, method)
        elif hasattr(module, "k_proj") and hasattr(module, "v_proj"):
            for linear in (module.k_proj, module.v_proj):
                for parameter in linear.parameters():
                    heads = parameter.unflatten(0, (-1, module.head_dim))
                    parameter.copy_(pool_and_repeat(heads, groups, method).flatten(0, 1))
    return model


def _pool_gpt2(module: torch.nn.Module, groups: int, method: str) -> None:
    # Conv1D stores (in, out): the columns are all queries, all keys, all values.
    for parameter in module.c_attn.parameters():
        query, *key_value = parameter.T.chunk(3, dim=0) if parameter.dim() == 2 else parameter.chunk(3)
        pooled = [
            pool_and_repeat(part.unflatten(0, (module.num_heads, -1)), groups, method).flatten(0, 1)
            for part in key_value
        ]
        whole = torch.cat([query, *pooled])
        parameter.copy_(whole.T if parameter.dim() == 2 else whole)
