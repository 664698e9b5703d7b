"""An oracle for pooled checkpoints that shares no code with uptrain: transformers' own source class, whose key and
value heads are pooled with torch and then repeated so that the class still sees one per query head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Views = dict[str, list[Tensor]]
"""The weight, and the bias if there is one, of q, k, v and o as views by head that can be written through:
(heads, head_dim, …), and (out, heads, head_dim) for the weight of o. Queries that share grouped rows are a copy."""


def linears_of(module: nn.Module) -> list[nn.Module]:
    """Return what makes queries, keys and values in an attention module of transformers; none in any other module."""
    fused = (("c_attn",), ("Wqkv",), ("qkv_proj",), ("query_key_value",))
    for names in (*fused, ("q_proj", "k_proj", "v_proj"), ("q", "k", "v")):
        if all(hasattr(module, name) for name in names):
            return [getattr(module, name) for name in names]
    return []


def head_views(module: nn.Module) -> Views:
    """Return the views of an attention module of transformers."""
    turned = hasattr(module, "c_attn")  # Conv1D stores (in, out)
    linears = linears_of(module)
    weights = _by_head(module, [linear.weight.T if turned else linear.weight for linear in linears])
    views = {part: [view] for part, view in weights.items()}
    if linears[0].bias is not None:
        for part, view in _by_head(module, [linear.bias for linear in linears]).items():
            views[part].append(view)
    names = ("c_proj", "dense", "o_proj", "out_proj", "o")
    output = next(getattr(module, name) for name in names if hasattr(module, name)).weight
    return {**views, "o": [(output.T if turned else output).unflatten(1, (-1, head_dim_of(module)))]}


def head_dim_of(module: nn.Module) -> int:
    names = ("head_size", "key_value_proj_dim", "head_dim")
    return next(getattr(module, name) for name in names if hasattr(module, name))


def computed_heads(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the queries, keys and values that a module computes of x (T, d), each (T, heads, head_dim)."""
    rows = [linear(x[None])[0].T for linear in linears_of(module)]
    return {part: heads.permute(2, 0, 1) for part, heads in _by_head(module, rows).items()}


def _by_head(module: nn.Module, rows: list[Tensor]) -> dict[str, Tensor]:
    """Split the linears' rows (out, …) by head, as the module's own forward does."""
    if hasattr(module, "c_attn") or hasattr(module, "Wqkv"):
        rows = list(rows[0].chunk(3))
    elif type(module).__name__ == "CodeGenAttention":  # four blocks of q, v, k
        blocks = rows[0].unflatten(0, (4, 3, -1, module.head_dim))
        return {part: blocks[:, index].flatten(0, 1) for index, part in enumerate("qvk")}
    elif hasattr(module, "qkv_proj"):
        heads = (module.config.num_attention_heads, module.num_key_value_heads, module.num_key_value_heads)
        rows = list(rows[0].split([count * module.head_dim for count in heads]))
    elif hasattr(module, "query_key_value"):  # for each group its queries, its key, its value
        per_group = module.num_heads // module.num_kv_heads + 2 if hasattr(module, "num_kv_heads") else 3
        slots = rows[0].unflatten(0, (-1, per_group, head_dim_of(module)))
        queries = slots[:, 0] if per_group == 3 else slots[:, :-2].flatten(0, 1)
        return {"q": queries, "k": slots[:, -2], "v": slots[:, -1]}
    split = zip("qkv", rows, strict=True)
    return {part: one.unflatten(0, (-1, head_dim_of(module))) for part, one in split if one is not None}


def pool_and_repeat(heads: Tensor, groups: int, method: str) -> Tensor:
    """Pool (heads, …) to `groups` and repeat each back, keeping the shape."""
    runs = heads.float().unflatten(0, (groups, -1))
    pooled = runs.mean(1) if method == "mean" else runs[:, 0]
    return pooled.repeat_interleave(runs.shape[1], dim=0).to(heads.dtype)


@torch.no_grad()
def pool_model(model: PreTrainedModel, groups: int, method: str = "mean") -> PreTrainedModel:
    """Pool a model's key and value heads in place, in its own class, and return it; an encoder is left alone."""
    for name, module in model.named_modules():
        if linears_of(module) and "encoder" not in name.split("."):
            views = head_views(module)
            for view in (*views["k"], *views["v"]):
                view.copy_(pool_and_repeat(view, groups, method))
            _pool_norm(module, groups, method)
    return model


def _pool_norm(module: nn.Module, groups: int, method: str) -> None:
    """Pool the key norm's weights too, where every head has its own."""
    if hasattr(module, "k_layernorm") and hasattr(module.k_layernorm, "norms"):
        norms = module.k_layernorm.norms
        pooled = pool_and_repeat(torch.stack([norm.weight for norm in norms]), groups, method)
        for norm, weight in zip(norms, pooled, strict=True):
            norm.weight.copy_(weight)
    norm = getattr(getattr(module, "k_norm", None), "weight", None)  # some norms have none
    if norm is not None and norm.numel() > module.head_dim:
        weight = norm.view(-1, module.head_dim)
        weight.copy_(pool_and_repeat(weight, groups, method))
