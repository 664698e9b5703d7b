"""Rotary frequencies without torch are transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from uptrain.architectures.decoders import LLAMA
from uptrain.architectures.rope import InverseFrequencies, inverse_frequencies, longrope_table, truncated
from uptrain.architectures.rope_parameters import EVERY, rotary_parameters
from uptrain.errors import UsageError

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.5},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-magnitude": {
        "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16,
    },
}  # fmt: skip


def config(variant: str, theta: float = 10000.0, dims: int = 32) -> LlamaConfig:
    kind = variant.partition("-")[0]
    parameters = {"rope_type": kind, "rope_theta": theta, **VARIANTS[variant]}
    return LlamaConfig(hidden_size=4 * dims, num_attention_heads=4, head_dim=dims, max_position_embeddings=256,
                       rope_parameters=parameters)  # fmt: skip


def read(config: dict[str, Any], dims: int) -> InverseFrequencies:
    return inverse_frequencies(rotary_parameters(LLAMA, config, "tiny")[EVERY], config, dims, "tiny")


@pytest.mark.parametrize("variant", VARIANTS)
@given(st.floats(100, 1e6), st.sampled_from([8, 32, 64, 128]))
@settings(max_examples=20, deadline=None)
def test_they_are_transformers_own(variant, theta, dims):
    made = config(variant, theta, dims)
    embedding = LlamaRotaryEmbedding(made)
    found = read(made.to_dict(), dims)
    torch.testing.assert_close(torch.tensor(found.values), embedding.inv_freq, rtol=1e-5, atol=1e-9)
    assert abs(found.attention_factor - embedding.attention_scaling) < 1e-6


@pytest.mark.parametrize("variant", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("dims", [8, 16, 32])
def test_the_highest_of_them_are_those_of_a_smaller_theta(variant, dims):
    made = config(variant)
    smaller = truncated(rotary_parameters(LLAMA, made.to_dict(), "tiny")[EVERY], dims, 32)
    speeds = read({**made.to_dict(), "rope_parameters": smaller}, dims).values
    assert speeds == pytest.approx(read(made.to_dict(), 32).values[: dims // 2], rel=1e-6)


@given(st.lists(st.floats(1e-5, 1.0), min_size=1, max_size=16), st.floats(0.5, 2.0))
@settings(max_examples=30, deadline=None)
def test_any_table_can_be_written(speeds, factor):
    parameters = longrope_table({"rope_theta": 10000.0}, tuple(speeds), factor, 256)
    made = LlamaConfig(head_dim=2 * len(speeds), max_position_embeddings=256, rope_parameters=parameters)
    for tokens in (1, 255, 10_000):
        found, scaling = ROPE_INIT_FUNCTIONS["longrope"](made, "cpu", seq_len=tokens)
        torch.testing.assert_close(found, torch.tensor(speeds), rtol=1e-4, atol=1e-9)
        assert scaling == factor


def test_the_older_two_keys_say_the_same():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
    assert read(old, 16) == read(new, 16)


def test_frequencies_that_change_with_length_are_refused():
    with pytest.raises(UsageError, match="rope_type dynamic"):
        read({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 16)
