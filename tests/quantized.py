"""Checkpoints quantized by each scheme, as their tools store them: names, dtypes, shapes and config. Values are random.

Formats: transformers' quantizers and the integrations they load (auto-gptq, autoawq, bitsandbytes, compressed-tensors,
torchao, hqq, optimum-quanto, EETQ), and the models that were published in them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.small import CONFIG, small_tensors

Tensors = dict[str, Tensor]
WIDE = {**CONFIG, "hidden_size": 64, "intermediate_size": 64, "torch_dtype": "bfloat16"}
PLAIN: Tensors = {name: torch.from_numpy(value).bfloat16() for name, value in small_tensors(**WIDE).items()}


def bytes_like(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    high = 128 if dtype is torch.int8 else 256
    return torch.randint(high - 256 if dtype is torch.int8 else 0, high, shape).to(dtype)


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def gptq(module: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    groups = max(1, columns // 32)
    return {
        f"{module}.qweight": words(columns // 8, rows),
        f"{module}.qzeros": words(groups, max(1, rows // 8)),
        f"{module}.scales": torch.rand(groups, rows).half(),
        f"{module}.g_idx": (torch.arange(columns) // 32).int(),
    }


def awq(module: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    groups = max(1, columns // 32)
    return {
        f"{module}.qweight": words(columns, rows // 8),
        f"{module}.qzeros": words(groups, max(1, rows // 8)),
        f"{module}.scales": torch.rand(groups, rows).half(),
    }


def bnb4(module: str, weight: Tensor) -> Tensors:
    return {
        f"{module}.weight": bytes_like(weight.numel() // 2, 1),
        f"{module}.weight.absmax": bytes_like(max(1, weight.numel() // 64)),
        f"{module}.weight.quant_map": torch.rand(16),
        f"{module}.weight.nested_absmax": torch.rand(1),
        f"{module}.weight.nested_quant_map": torch.rand(256),
        f"{module}.weight.quant_state.bitsandbytes__nf4": bytes_like(80),
    }


def bnb8(module: str, weight: Tensor) -> Tensors:
    return {
        f"{module}.weight": bytes_like(*weight.shape, dtype=torch.int8),
        f"{module}.SCB": torch.rand(weight.shape[0]),
        f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def fp8(module: str, weight: Tensor) -> Tensors:
    scale = weight.float().abs().max() / 448
    return {
        f"{module}.weight": (weight.float() / scale).to(torch.float8_e4m3fn),
        f"{module}.weight_scale_inv": scale.reshape(1, 1),
    }


def mxfp4(module: str, weight: Tensor) -> Tensors:
    blocks = (weight.shape[0], weight.shape[1] // 32)
    return {f"{module}_blocks": bytes_like(*blocks, 16), f"{module}_scales": bytes_like(*blocks)}


def packed(module: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    return {
        f"{module}.weight_packed": words(rows, columns // 8),
        f"{module}.weight_scale": torch.rand(rows, max(1, columns // 32)).bfloat16(),
        f"{module}.weight_shape": torch.tensor([rows, columns]),
    }


def int8(module: str, weight: Tensor) -> Tensors:
    return {
        f"{module}.weight": bytes_like(*weight.shape, dtype=torch.int8),
        f"{module}.weight_scale": torch.rand(weight.shape[0], 1).bfloat16(),
    }


def torchao(module: str, weight: Tensor) -> Tensors:
    return {
        f"{module}._weight_qdata": bytes_like(*weight.shape, dtype=torch.int8),
        f"{module}._weight_scale": torch.rand(weight.shape[0]).bfloat16(),
        f"{module}._weight_zero_point": torch.zeros(weight.shape[0], dtype=torch.int8),
    }


def hqq(module: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    return {
        f"{module}.W_q": bytes_like(rows // 2, columns),
        f"{module}.scale": torch.rand(rows, 1).half(),
        f"{module}.zero": torch.rand(rows, 1).half(),
        f"{module}.nbits": torch.tensor(4),
    }


def quanto(module: str, weight: Tensor) -> Tensors:
    return {
        f"{module}.weight._data": bytes_like(*weight.shape, dtype=torch.int8),
        f"{module}.weight._scale": torch.rand(weight.shape[0], 1).bfloat16(),
        f"{module}.input_scale": torch.tensor(1.0),
        f"{module}.output_scale": torch.tensor(1.0),
    }


def eetq(module: str, weight: Tensor) -> Tensors:
    return {
        f"{module}.weight": bytes_like(*weight.shape[::-1], dtype=torch.int8),
        f"{module}.weight_scales": torch.rand(weight.shape[0]).half(),
    }


def mlx(module: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    groups = max(1, columns // 64)
    return {
        f"{module}.weight": words(rows, columns // 8).view(torch.uint32),
        f"{module}.scales": torch.rand(rows, groups).bfloat16(),
        f"{module}.biases": torch.rand(rows, groups).bfloat16(),
    }


@dataclass(frozen=True)
class Scheme:
    """How a scheme stores a linear, what config.json says of it, and what uptrain should call it."""

    store: Callable[[str, Tensor], Tensors]
    called: str
    says: dict[str, Any] = field(default_factory=dict)
    key: str = "quantization_config"
    attention: bool = True
    """Whether attention is stored so too, and not only experts."""


_GROUP = {"weights": {"num_bits": 4, "type": "int", "group_size": 32}, "input_activations": None, "targets": ["Linear"]}
SCHEMES = {
    "gptq": Scheme(gptq, "GPTQ, 4 bits", {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "awq": Scheme(awq, "AWQ, 4 bits", {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}),
    "bnb4": Scheme(
        bnb4, "bitsandbytes, 4 bits",
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "bnb8": Scheme(bnb8, "bitsandbytes, 8 bits", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "fp8": Scheme(fp8, "fp8 with block scales, 8 bits", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "mxfp4": Scheme(mxfp4, "MXFP4, 4 bits", {"quant_method": "mxfp4"}, attention=False),
    "packed": Scheme(
        packed, "compressed-tensors, 4 bits",
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": _GROUP}},
    ),
    "int8": Scheme(
        int8, "compressed-tensors, 8 bits",
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"input_activations": {"num_bits": 4}, "weights": {"num_bits": 8}}},
        },
    ),
    "torchao": Scheme(
        torchao, "torchao, 8 bits",
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
    ),
    "hqq": Scheme(
        hqq, "HQQ, 4 bits",
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
    ),
    "quanto": Scheme(quanto, "quanto, 8 bits", {"quant_method": "quanto", "weights": "int8", "activations": None}),
    "eetq": Scheme(eetq, "EETQ, 8 bits", {"quant_method": "eetq", "weights": "int8"}),
    "mlx": Scheme(mlx, "MLX, 4 bits", {"group_size": 64, "bits": 4}, key="quantization"),
}  # fmt: skip


THROUGHOUT = [name for name, scheme in SCHEMES.items() if scheme.attention]


def save_quantized(folder: Path, scheme: str, attention: bool, declare: bool = True, **config: Any) -> Path:
    """Write a small Llama whose MLP, and `attention`, `scheme` has quantized; `declare` says so in config.json."""
    torch.manual_seed(0)
    found, of = dict(PLAIN), SCHEMES[scheme]
    for name in PLAIN:
        if "mlp" in name or (attention and "self_attn" in name):
            found.update(of.store(name.removesuffix(".weight"), found.pop(name)))
    folder.mkdir()
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    says = {**of.says, "modules_to_not_convert": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    values = {**WIDE, **({of.key: of.says if attention else says} if declare else {}), **config}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def save_plain(folder: Path, **config: Any) -> Path:
    """Write the small Llama as it was before."""
    folder.mkdir()
    save_file(PLAIN, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**WIDE, **config}))
    return folder
