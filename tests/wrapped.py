"""Tiny random wrappers of every type that uptrain converts, in transformers' own classes, and pictures for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.oracle import pool_and_repeat
from uptrain.architectures.wrappers import WRAPPERS

TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 8,
    "num_key_value_heads": 8, "vocab_size": 320, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SEES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
PICTURE = 9
"""The token that stands for a part of a picture."""
_SLIDES = ("cohere2", "exaone4", "gemma3_text", "mistral")
_SIZES = {"image_sizes": [[28, 28]]}
_TILES = {"image_grid_pinpoints": [[28, 28]]}
_QWEN = {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [0], "window_size": 28}

_QUERY = {
    "hidden_size": 64, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2,
    "resampler_head_dim": 8, "num_key_value_heads": 1,
}  # fmt: skip
_MARKS = {"vocab_size": 16, "num_visual_indicator_tokens": 2, "hidden_stride": 1}
# Where a type wants it: changes of the whole config, of the part that sees, the picture's shape, other inputs.
SPECIAL: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...], dict[str, Any]]] = {
    "cohere2_vision": ({"alignment_intermediate_size": 16}, {}, (1, 3, 28, 28), {}),
    "exaone4_5": ({}, {**_QWEN, "num_key_value_heads": 2}, (4, 3 * 2 * 14 * 14), {"image_grid_thw": [[1, 2, 2]]}),
    "gemma3": ({"mm_tokens_per_image": 4}, {}, (1, 3, 28, 28), {}),
    "hyperclovax_vision_v2": ({}, _QWEN, (4, 3 * 2 * 14 * 14), {"image_grid_thw": [[1, 2, 2]]}),
    "idefics2": ({"perceiver_config": _QUERY}, {}, (1, 1, 3, 28, 28), {}),
    "idefics3": ({}, {}, (1, 1, 3, 28, 28), {}),
    "internvl": ({}, {"image_size": [28, 28], "patch_size": [14, 14]}, (1, 3, 28, 28), {}),
    "lighton_ocr": ({}, {"head_dim": 16}, (1, 3, 28, 28), _SIZES),
    "llava": ({}, {"projection_dim": 32}, (1, 3, 28, 28), {}),
    "llava_next": (_TILES, {"projection_dim": 32}, (1, 2, 3, 28, 28), _SIZES),
    "llava_next_video": (_TILES, {"projection_dim": 32}, (1, 2, 3, 28, 28), _SIZES),
    "llava_onevision": (_TILES, {}, (1, 2, 3, 28, 28), _SIZES),
    "mistral3": ({}, {"head_dim": 16, "image_size": 56}, (1, 3, 56, 56), {"image_sizes": [[56, 56]]}),
    "ovis2": ({"hidden_size": 64, "vocab_size": 320}, _MARKS, (1, 3, 28, 28), {}),
    "paligemma": ({"projection_dim": 64}, {}, (1, 3, 28, 28), {}),
    "smolvlm": ({}, {}, (1, 1, 3, 28, 28), {}),
    "video_llama_3": (
        {}, {}, (4, 3 * 14 * 14), {"image_grid_thw": [[1, 2, 2]], "image_merge_sizes": [1]},
    ),
    "vipllava": ({"vision_feature_layers": [-1]}, {"projection_dim": 32}, (1, 3, 28, 28), {}),
}  # fmt: skip


def tiny_wrapper(model_type: str, text: dict[str, Any] | None = None, **changes: Any) -> PreTrainedModel:
    """Return a random wrapper around a language model of 8 heads, no weight of it a neutral one."""
    whole, sees, _, _ = SPECIAL.get(model_type, ({}, {}, (), {}))
    known, family = AutoConfig.for_model(model_type), WRAPPERS[model_type].text
    spoken = {**TEXT, "model_type": family, **({"sliding_window": 6} if family in _SLIDES else {}), **(text or {})}
    config = AutoConfig.for_model(
        model_type,
        text_config=spoken,
        vision_config={**SEES, "model_type": known.vision_config.model_type, **sees},
        **{key: PICTURE for key in ("image_token_index", "image_token_id") if hasattr(known, key)},
        **{**whole, **changes},
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for value in model.parameters():
            random = torch.randn_like(value)
            value.copy_(random / value.shape[-1] ** 0.5 if value.dim() > 1 else value + random * 0.1)
    return model


def save_wrapper(folder: Path, model_type: str, **changes: Any) -> Path:
    tiny_wrapper(model_type, **changes).save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def words() -> Tensor:
    return torch.randint(10, 300, (1, 20), generator=torch.Generator().manual_seed(1))


def picture_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a picture and as many tokens for it among words as the model has features of it."""
    _, _, shape, others = SPECIAL.get(model.config.model_type, ({}, {}, (1, 3, 28, 28), {}))
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    seen = {"pixel_values": pixels, **{key: torch.tensor(value) for key, value in others.items()}}
    look = getattr(model, "get_image_features", model.model.get_image_features)
    with torch.no_grad():
        found = look(**seen, return_dict=True).pooler_output
    rows = sum(each.numel() // each.shape[-1] for each in (found if isinstance(found, (list, tuple)) else [found]))
    ids = words()
    return {"input_ids": torch.cat([ids[:, :3], torch.full((1, rows), PICTURE), ids[:, 3:]], 1), **seen}


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    return model(**inputs, use_cache=False).logits


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def pool_language_model(model: PreTrainedModel, groups: int) -> PreTrainedModel:
    """Average the key and value heads of the language model alone, in its own class, and repeat them."""
    spoken = [layer.self_attn for name, layer in model.named_modules() if _is_layer(name)]
    assert len(spoken) == model.config.text_config.num_hidden_layers
    for attention in spoken:
        for linear in (attention.k_proj, attention.v_proj):
            for value in (linear.weight, linear.bias):
                if value is not None:
                    heads = value.unflatten(0, (8, -1))
                    heads.copy_(pool_and_repeat(heads, groups, "mean"))
    return model


def _is_layer(name: str) -> bool:
    *before, layers, number = ["", "", *name.split(".")]
    return number.isdigit() and layers == "layers" and before[-1] in ("language_model", "text_model")
