"""Cache figures that papers publish."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uptrain.architectures.attention import AttentionSpec, cache_bytes, cache_bytes_per_token


def test_llama_2_70b_keeps_320_kib_per_token() -> None:
    """Touvron et al. 2023: 80 layers, 64 heads of 128, 8 key/value heads; bfloat16."""
    layers = [AttentionSpec(64, 8, 128)] * 80
    assert cache_bytes_per_token(layers, 2) == 320 * 1024
    assert cache_bytes_per_token([AttentionSpec(64, 64, 128)] * 80, 2) == 8 * 320 * 1024


def test_deepseek_v2_keeps_57_times_less_than_mha() -> None:
    """DeepSeek-V2 2024, section 2.1: 128 heads of 128; latent 512 and 64 rotary values."""
    mha = AttentionSpec(128, 128, 128)
    mla = AttentionSpec(128, 128, 128, kv_lora_rank=512, qk_rope_head_dim=64)
    assert (mha.cache_values_per_token, mla.cache_values_per_token) == (32768, 576)
    assert round(mha.cache_values_per_token / mla.cache_values_per_token) == 57
    assert (mha.kind, mla.kind) == ("mha", "mla")


def test_a_sliding_window_bounds_the_cache() -> None:
    """Gemma-2-like: every other layer looks back 4 096 tokens."""
    full, window = AttentionSpec(8, 4, 256), AttentionSpec(8, 4, 256, sliding_window=4096)
    assert cache_bytes([full, window], 32768, 2) == (32768 + 4096) * 2 * 4 * 256 * 2
    assert cache_bytes([full, window], 100, 2) == 100 * cache_bytes_per_token([full, window], 2)


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 256), st.integers(1, 4))
def test_cache_shrinks_by_exactly_the_heads_shared(groups: int, per_group: int, head_dim: int, itemsize: int) -> None:
    mha = AttentionSpec(groups * per_group, groups * per_group, head_dim)
    gqa = mha.grouped(groups)
    assert mha.cache_bytes(7, itemsize) == per_group * gqa.cache_bytes(7, itemsize)


@pytest.mark.parametrize(("heads", "groups"), [(8, 3), (0, 1), (4, 0)])
def test_impossible_heads_are_refused(heads: int, groups: int) -> None:
    with pytest.raises(ValueError):
        AttentionSpec(heads, groups, 64)
