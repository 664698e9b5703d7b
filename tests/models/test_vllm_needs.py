"""What vLLM's backend for transformers' classes asks of our own ones; benchmarks/engines.py asks vLLM itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from uptrain.models.engines import VLLM_LOADS_NOT

Pair = Callable[..., tuple[PreTrainedModel, PreTrainedModel]]
TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5]])


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "persimmon", "bloom", "mpt", "gpt_neo"])
def test_nothing_of_a_checkpoint_is_what_its_class_says_to_ignore(model_type: str, pair: Pair) -> None:
    """transformers asks it of names it doesn't know only; vLLM drops all that are found."""
    model, _ = pair(model_type)
    for each in (model, model.base_model):
        for pattern in each._keys_to_ignore_on_load_unexpected or ():
            assert not [name for name in model.state_dict() if re.search(pattern, name)], pattern


def joined(*arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """Give (tokens, heads · head_dim), without batch and heads, as vLLM's attention does."""
    output, _ = sdpa_attention_forward(*arguments, **options)
    return output.flatten(0, 1).flatten(1), None


AttentionInterface.register("joined", joined)


def takes_joined_heads(model_type: str, pair: Pair) -> bool:
    model, _ = pair(model_type)
    with torch.no_grad():
        wanted = model(TOKENS).logits
        try:
            model.set_attn_implementation("joined")
            return bool(torch.allclose(model(TOKENS).logits, wanted, atol=1e-5))
        except (ValueError, RuntimeError, AttributeError):  # it never asks for one, or can not do without its own
            return False


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "persimmon", "bloom", "mpt", "gpt_neo"])
def test_the_table_says_which_of_our_decoders_vllm_loads(model_type: str, pair: Pair) -> None:
    """vLLM puts its own attention into the class, which works where the class asks transformers' interface for one."""
    calls = []

    def counted(*arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
        calls.append(1)
        return joined(*arguments, **options)

    AttentionInterface.register("joined", counted)
    try:
        served = takes_joined_heads(model_type, pair) and bool(calls)
    finally:
        AttentionInterface.register("joined", joined)
    assert served is (f"uptrain_{model_type}" not in VLLM_LOADS_NOT)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "persimmon"])
def test_attention_may_give_its_heads_joined(model_type: str, pair: Pair) -> None:
    model, _ = pair(model_type)
    with torch.no_grad():
        wanted = model(TOKENS).logits
        model.set_attn_implementation("joined")
        torch.testing.assert_close(model(TOKENS).logits, wanted)
