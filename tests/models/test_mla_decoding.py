"""Absorbed decoding in a stock class: the same logits, from the latent as it is cached."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

import uptrain
from tests.models.test_neutral_norm import ids, neutral
from uptrain.errors import CheckpointError, UsageError
from uptrain.evaluation.reading import with_cache
from uptrain.models.mla_decoding import AbsorbedDeepseekV3Attention, absorb

IMPLEMENTATIONS = ["sdpa", "eager"]


def pair(attention: str, **changes):
    stock, ours = neutral(**changes), neutral(**changes)
    for model in (stock, ours):
        model.set_attn_implementation(attention)
    assert absorb(ours) == 2
    return stock, ours


@pytest.fixture
def absorbed(monkeypatch) -> list[bool]:
    """Record whether each layer's call was absorbed."""
    seen: list[bool] = []
    original = AbsorbedDeepseekV3Attention.absorbs
    monkeypatch.setattr(AbsorbedDeepseekV3Attention, "absorbs", lambda *args: seen.append(original(*args)) or seen[-1])
    return seen


@torch.no_grad()
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 48}, {"rope_interleave": False}], ids=str)
def test_steps_and_chunks_onto_a_cache_give_the_whole_forwards_logits(attention, changes, absorbed):
    stock, ours = pair(attention, **changes)
    whole = stock(ids(2, 24), use_cache=False).logits
    given = with_cache(ours, DynamicCache(config=ours.config))
    parts = [ours(ids(2, 24)[:, a:b], **given).logits for a, b in ((0, 12), (12, 15), (15, 16), (16, 24))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert absorbed[0] is False
    assert any(absorbed)


@torch.no_grad()
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_generation_is_the_stock_classs(attention, options, absorbed):
    stock, ours = pair(attention)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    assert torch.equal(ours.generate(ids(2, 9), **settings), stock.generate(ids(2, 9), **settings))
    assert any(absorbed)


@torch.no_grad()
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_left_padding_changes_no_token(attention, absorbed):
    _, ours = pair(attention)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    alone = ours.generate(ids(1, 9), **settings)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids(1, 9)], dim=1)
    mask = (torch.arange(14) >= 5).long()[None]
    found = ours.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(found[:, 14:], alone[:, 9:])
    assert any(absorbed)


def test_gradients_are_the_stock_classs():
    stock, ours = pair("sdpa")
    for model in (stock, ours):
        model.train()(ids(), labels=ids()).loss.backward()
    for one, two in zip(stock.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_load_absorbs_unless_told_not_to(tmp_path):
    neutral().save_pretrained(tmp_path)
    kinds = [type(uptrain.load(tmp_path, absorbed=flag).model.layers[0].self_attn).__name__ for flag in (True, False)]
    assert kinds == ["AbsorbedDeepseekV3Attention", "DeepseekV3Attention"]
    assert type(uptrain.load("demo")).__name__ == "GPT2LMHeadModel"


def test_load_refuses_what_would_give_no_numbers(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        uptrain.load(tmp_path)
    neutral().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="float16"):
        uptrain.load(tmp_path, dtype=torch.float16)
