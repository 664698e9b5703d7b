"""A real model, converted through the public API and judged by stock transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from uptrain import EvaluationSettings, evaluate
from uptrain.architectures.attention import AttentionSpec, cache_bytes
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.data.sources import Files
from uptrain.evaluation.reading import cache_of

pytestmark = pytest.mark.real

LAYERS, HEAD_DIM, SOURCE_HEADS = 30, 64, 3
TEXT = "The aardvark is a burrowing, nocturnal mammal native to Africa. It is the only living species of its order,"


@pytest.fixture(scope="module", params=[None, "float32"], ids=["as-stored", "float32"])
def converted(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Convert to MQA, keeping the source's bf16 or widening to fp32."""
    out = tmp_path_factory.mktemp("converted") / "SmolLM2-135M-Instruct-mqa"
    convert(str(smollm2), out, Request(target="mqa", method="mean", dtype=request.param))
    return out


@pytest.fixture(scope="module")
def model(converted: Path) -> LlamaForCausalLM:
    return fp32(converted)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2)


def fp32(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def pooled_oracle(source: Path, stored: torch.dtype) -> LlamaForCausalLM:
    """Return the source's own class with its three key heads replaced by their mean, three times over."""
    model = fp32(source)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                heads = projection.weight.unflatten(0, (SOURCE_HEADS, HEAD_DIM))
                mean = heads.mean(dim=0).to(stored).float()
                projection.weight.copy_(mean.repeat(SOURCE_HEADS, 1))
    return model


def test_only_keys_and_values_change(smollm2: Path, converted: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (smollm2, converted))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if ".k_proj." in name or ".v_proj." in name:
            assert tensor.shape == (HEAD_DIM, 576), name
        else:
            assert torch.equal(tensor, before[name].to(tensor.dtype)), name
    assert json.loads((converted / "config.json").read_text())["num_key_value_heads"] == 1


def test_logits_equal_the_pooled_heads_in_the_original_class(
    smollm2: Path, converted: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    stored = load_file(converted / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"].dtype
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
        oracle = pooled_oracle(smollm2, stored)(ids).logits
        original = fp32(smollm2)(ids).logits
    torch.testing.assert_close(logits, oracle, rtol=0, atol=1e-5)
    assert (logits - original).abs().max() > 1, "pooling that changes nothing proves nothing"


def test_cached_greedy_generation_equals_uncached(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    inputs = tokenizer(TEXT, return_tensors="pt")
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    cached = model.generate(**inputs, **settings)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
    assert torch.equal(cached, model.generate(**inputs, **settings, cache_implementation="static"))


def test_the_cache_holds_one_head(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    cache = cache_of(model(ids, use_cache=True))
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert held == cache_bytes([AttentionSpec(9, 1, HEAD_DIM)] * LAYERS, context=ids.shape[1], itemsize=4)


@pytest.mark.parametrize("stride", [256, 128], ids=["blocks", "sliding"])
def test_perplexity_is_what_plain_transformers_computes(
    smollm2: Path, tokenizer: PreTrainedTokenizerBase, stride: int
) -> None:
    """Three blocks of the README, or five windows over them: all tokens once, but the first or each block's first."""
    text, context, tokens = Path(__file__).parents[2] / "README.md", 256, 768
    settings = EvaluationSettings(
        text=[Files(files=str(text))], context=context, stride=stride, tokens=tokens, repeats=0
    )
    found = evaluate(str(smollm2), settings)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0, :tokens]
    model, losses = fp32(smollm2), []
    with torch.no_grad():
        for begin in range(0, tokens - context + 1, stride):
            window = ids[begin : begin + context]
            each = torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:], reduction="none")
            losses.append(each if begin == 0 or stride == context else each[-stride:])
    expected = torch.cat(losses).double()
    assert found.tokens == len(expected)
    assert found.model.perplexity == pytest.approx(math.exp(expected.mean()), rel=5e-5)
