from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StaticCache

from tests.models.gpt2_models import HEAD_DIM, HEADS, LAYERS, greedy, grouped, left_padded, prompt, repeated
from uptrain.architectures.attention import AttentionSpec, cache_bytes
from uptrain.evaluation.reading import cache_of, with_cache
from uptrain.models.remote_code.modeling_uptrain_gpt2 import UptrainGPT2Config

both_kernels = pytest.mark.parametrize("attention", ["sdpa", "eager"])
each_grouping = pytest.mark.parametrize("groups", [1, 2, HEADS])


@both_kernels
def test_one_key_head_per_query_head_is_gpt2_bitwise(attention: str) -> None:
    model = grouped(HEADS, attention)
    with torch.no_grad():
        torch.testing.assert_close(model(prompt()).logits, repeated(model)(prompt()).logits, rtol=0, atol=0)


@both_kernels
@each_grouping
def test_shared_heads_equal_gpt2_with_the_heads_repeated(groups: int, attention: str) -> None:
    model = grouped(groups, attention)
    oracle = repeated(model)
    ids, mask = left_padded([prompt(1, 11)[0], prompt(1, 6)[0]])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(
            logits[mask.bool()], oracle(ids, attention_mask=mask).logits[mask.bool()], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(model(ids).logits, oracle(ids).logits, rtol=0, atol=1e-5)
    assert logits.std() > 1, "weights too small for the comparison to mean anything"


@pytest.mark.parametrize(
    "options",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"n_inner": 40, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
    ],
    ids=lambda options: next(iter(options)),
)
@both_kernels
def test_gpt2s_options_keep_their_meaning(options: dict[str, Any], attention: str) -> None:
    model = grouped(2, attention, **options)
    with torch.no_grad():
        torch.testing.assert_close(model(prompt()).logits, repeated(model)(prompt()).logits, rtol=0, atol=1e-5)


def test_upcast_attention_computes_its_softmax_in_fp32() -> None:
    plain, upcast = grouped(2, "eager"), grouped(2, "eager", reorder_and_upcast_attn=True)
    weights = [model.bfloat16()(prompt(), output_attentions=True).attentions[-1].float() for model in (plain, upcast)]
    exact = grouped(2, "eager")(prompt(), output_attentions=True).attentions[-1]
    assert (weights[1] - exact).abs().mean() < (weights[0] - exact).abs().mean()


@both_kernels
def test_dropout_draws_as_gpt2_does(attention: str) -> None:
    model = grouped(HEADS, attention, attn_pdrop=0.3, resid_pdrop=0.2, embd_pdrop=0.1).train()
    runs = []
    for each in (model, repeated(model)):
        torch.manual_seed(0)
        runs.append(each(prompt()).logits)
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    assert not torch.equal(runs[0], model.eval()(prompt()).logits)


@both_kernels
@each_grouping
def test_generation_is_the_same_with_dynamic_static_and_no_cache(groups: int, attention: str) -> None:
    model = grouped(groups, attention)
    uncached = greedy(model, prompt(), use_cache=False)
    assert torch.equal(greedy(model, prompt()), uncached)
    assert torch.equal(greedy(model, prompt(), cache_implementation="static"), uncached)
    static = StaticCache(config=model.config, max_cache_len=40)
    assert torch.equal(greedy(model, prompt(), **with_cache(model, static)), uncached)
    assert {tuple(layer.keys.shape) for layer in static.layers} == {(2, groups, 40, HEAD_DIM)}
    assert torch.equal(greedy(repeated(model), prompt()), uncached)


@both_kernels
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(cache: str, attention: str) -> None:
    model = grouped(2, attention)
    rows = [prompt(1, 11)[0], prompt(1, 4, seed=5)[0], prompt(1, 7, seed=6)[0]]
    ids, mask = left_padded(rows)
    batch = greedy(model, ids, attention_mask=mask, cache_implementation=cache)[:, ids.shape[1] :]
    alone = torch.cat([greedy(model, row[None])[:, row.numel() :] for row in rows])
    assert torch.equal(batch, alone)


@each_grouping
def test_beam_search_finds_what_gpt2_finds(groups: int) -> None:
    model = grouped(groups)
    beams: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 3}
    found = greedy(model, prompt(), **beams)
    assert torch.equal(found, greedy(repeated(model), prompt(), **beams))
    assert not torch.equal(found[::3], greedy(model, prompt())), "the search never left the greedy path"


def checkpointing(model: PreTrainedModel) -> None:
    # transformers renamed it between the versions we support, and warns about the old name.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@both_kernels
def test_gradient_checkpointing_changes_no_gradient(attention: str) -> None:
    model = grouped(2, attention, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    ids = prompt()
    model(ids, labels=ids, use_cache=False).loss.backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    checkpointing(model)
    assert all(block.gradient_checkpointing for block in model.transformer.h)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=0, atol=0, msg=name)


def test_a_shared_heads_gradient_is_the_sum_over_its_repeats() -> None:
    model = grouped(2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    oracle = repeated(model)
    for each in (model, oracle):
        each(prompt(), labels=prompt()).loss.backward()
    width = HEADS * HEAD_DIM
    for mine, theirs in zip(model.transformer.h, oracle.transformer.h, strict=True):
        got = mine.attn.c_attn.weight.grad[:, width:]
        whole = theirs.attn.c_attn.weight.grad[:, width:]
        want = whole.unflatten(-1, (2, 2, HEADS // 2, HEAD_DIM)).sum(-2).flatten(1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@each_grouping
def test_the_cache_holds_exactly_the_shared_heads(groups: int) -> None:
    cache = cache_of(grouped(groups)(prompt(2, 11), use_cache=True))
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert {tuple(tensor.shape) for tensor in held} == {(2, groups, 11, HEAD_DIM)}
    layers = [AttentionSpec(HEADS, groups, HEAD_DIM)] * LAYERS
    held_bytes = sum(tensor.untyped_storage().nbytes() for tensor in held)
    assert held_bytes == 2 * cache_bytes(layers, context=11, itemsize=4)


def test_output_attentions_has_one_map_per_query_head() -> None:
    maps = grouped(2, "eager")(prompt(2, 11), output_attentions=True).attentions
    assert [tuple(each.shape) for each in maps] == [(2, HEADS, 11, 11)] * LAYERS


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="n_head"):
        UptrainGPT2Config(n_embd=32, n_head=4, num_key_value_heads=3)
    with pytest.raises(ValueError, match="num_key_value_heads 0 "):
        UptrainGPT2Config(n_embd=32, n_head=4, num_key_value_heads=0)
    with pytest.raises(ValueError, match="cross-attention"):
        UptrainGPT2Config(n_embd=32, n_head=4, add_cross_attention=True)
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        grouped(2)(prompt(), encoder_hidden_states=torch.zeros(2, 3, HEADS * HEAD_DIM))
    assert UptrainGPT2Config(n_embd=32, num_attention_heads=8).num_key_value_heads == 8
