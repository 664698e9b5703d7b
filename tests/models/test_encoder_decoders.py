"""Decoders that read an encoder, with shared heads in both attentions, against transformers' class with pooled heads
repeated."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from tests.conversion.test_families import load, logits, read, request
from tests.models.test_gpt2_checkpoint import run_python
from tests.oracle import pool_model
from uptrain.cli.app import run
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.inspection import inspect
from uptrain.conversion.request import Request
from uptrain.errors import CheckpointError, UsageError

Save = Callable[..., Path]
Pair = Callable[..., tuple[PreTrainedModel, PreTrainedModel]]
OWN = ["t5", "mt5", "umt5", "bart", "whisper"]
WRITERS = ["t5", "mt5", "umt5", "bart"]
"""Those that read text."""
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
"""What makes a T5 a T5 v1.1: gated layers, and a decoder's output that is not scaled."""
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("t5", GATED),
    ("t5", {"d_kv": 10, "num_heads": 6, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6}),
    ("t5", {"num_layers": 1, "num_decoder_layers": 3, "layer_norm_epsilon": 1e-3}),
    ("mt5", {"feed_forward_proj": "relu"}),
    ("umt5", {"d_kv": 10, "num_heads": 6, "relative_attention_num_buckets": 8}),
    ("bart", {"scale_embedding": True, "activation_function": "relu", "tie_word_embeddings": False}),
    ("bart", {"decoder_attention_heads": 6, "encoder_attention_heads": 3, "decoder_layers": 3}),
    ("whisper", {"decoder_attention_heads": 6, "scale_embedding": True}),
]
REMOTE_CODE: list[tuple[str, dict[str, Any]]] = [("t5", GATED), ("umt5", {}), ("bart", {}), ("whisper", {})]
"""One for each modelling file."""
PAIRS = torch.tensor([[3, 14, 15, 9, 26, 5], [35, 8, 9, 7, 9, 32]])
GREEDY = {"max_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1}
"""No token twice: a random model with tied embeddings would say one over and over, which proves nothing."""
MASKS = {
    "none": torch.ones_like(PAIRS),
    "left": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
    "right": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
}


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS, ids=lambda value: next(iter(value), "")[:20])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_family_s_options_keep_their_meaning(
    model_type: str, changes: dict[str, Any], groups: int, pair: Pair
) -> None:
    model, oracle = pair(model_type, groups, **changes)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", WRITERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_sources_and_both_kernels_agree_with_the_oracle(model_type: str, attention: str, pair: Pair) -> None:
    model, oracle = pair(model_type)
    for each in (model, oracle):
        each.set_attn_implementation(attention)
    for mask in MASKS.values():
        arguments = {"input_ids": PAIRS, "attention_mask": mask, "decoder_input_ids": PAIRS.flip(0)}
        with torch.no_grad():
            found, wanted = (each(**arguments).logits for each in (model, oracle))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changes"), [("t5", GATED), ("umt5", {}), ("bart", {"tie_word_embeddings": False})]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_beam_search_and_a_static_cache_find_what_the_oracle_finds(
    model_type: str, changes: dict[str, Any], groups: int, pair: Pair
) -> None:
    model, oracle = pair(model_type, groups, **changes)
    for mask in MASKS.values():
        arguments: dict[str, Any] = {**GREEDY, "attention_mask": mask}
        beams = oracle.generate(PAIRS, num_beams=4, **arguments)
        assert torch.equal(model.generate(PAIRS, num_beams=4, **arguments), beams)
        greedy = oracle.generate(PAIRS, **arguments)
        assert torch.equal(model.generate(PAIRS, **arguments), greedy)
        assert torch.equal(model.generate(PAIRS, cache_implementation="static", **arguments), greedy)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_whisper_writes_what_the_oracle_writes(attention: str, pair: Pair) -> None:
    model, oracle = pair("whisper", tie_word_embeddings=False)
    for each in (model, oracle):
        each.set_attn_implementation(attention)
    sounds = read(model, PAIRS)
    for more in ({}, {"num_beams": 4}, {"cache_implementation": "static"}):
        arguments: dict[str, Any] = {**sounds, **GREEDY, **more}
        assert torch.equal(model.generate(**arguments), oracle.generate(**arguments))


@pytest.mark.parametrize("model_type", WRITERS)
def test_gradients_are_the_oracle_s_summed_over_the_heads_that_share(model_type: str, pair: Pair) -> None:
    model, oracle = pair(model_type, **({"dropout": 0.0} if model_type == "bart" else {"dropout_rate": 0.0}))
    checkpointed = copy.deepcopy(model).train()
    getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)()
    for each in (model.train(), oracle.train(), checkpointed):
        each(input_ids=PAIRS, labels=PAIRS.flip(0)).loss.backward()
    wanted, again = dict(oracle.named_parameters()), dict(checkpointed.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again[name].grad, parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
        found, whole = parameter.grad, wanted[name].grad
        if found is not None and whole is not None:
            if found.shape != whole.shape:  # of keys and values, of which each of the oracle's has its own
                whole = whole.unflatten(0, (2, 2, -1)).sum(1).flatten(0, 1)
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("model_type", "changes"), [("t5", {}), ("t5", GATED), ("mt5", {}), ("umt5", {})])
def test_all_but_the_decoder_s_keys_and_values_pass_through_bitwise(
    model_type: str, changes: dict[str, Any], save_tiny: Save, tmp_path: Path
) -> None:
    """A head that is no copy of the embedding included, as T5 v1.1's and mT5's checkpoints have."""
    source = save_tiny(model_type, dtype=torch.bfloat16, **changes)
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = torch.randn_like(next(iter(state.values())).new_empty(64, 48))
    save_file(state, source / "model.safetensors", {"format": "pt"})
    convert(str(source), tmp_path / "out", request(2))
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == state.keys()
    changed = {name for name in state if not torch.equal(found[name], state[name])}
    bases = [
        f"decoder.block.{layer}.layer.{name}" for layer in (0, 1) for name in ("0.SelfAttention", "1.EncDecAttention")
    ]
    assert changed == {f"{base}.{part}.weight" for base in bases for part in "kv"}
    oracle = pool_model(load(source).bfloat16(), 2).float()  # which rounds what it pools, as the result is rounded
    with torch.no_grad():
        torch.testing.assert_close(logits(load(tmp_path / "out")), logits(oracle))


@pytest.mark.parametrize("model_type", OWN)
def test_svd_of_heads_that_are_alike_loses_nothing(model_type: str, save_tiny: Save, tmp_path: Path) -> None:
    """Heads of a run that see the same subspace share one exactly; queries and output take up their differences."""
    source = save_tiny(model_type)
    state = load_file(source / "model.safetensors")
    mix = torch.Generator().manual_seed(1)
    turns: dict[str, torch.Tensor] = {}
    for name, stored in state.items():
        module = name.rpartition(".")[0]
        if "decoder" not in module.split(".") or module.split(".")[-1] not in ("k", "v", "k_proj", "v_proj"):
            continue
        heads = stored.unflatten(0, (2, 2, -1))[:, 0]
        size = heads.shape[1]
        turn = turns.setdefault(module, torch.linalg.qr(torch.randn(size, size, generator=mix)).Q)
        state[name] = torch.stack([heads, torch.einsum("ij,gj...->gi...", turn, heads)], 1).flatten(0, 2).contiguous()
    save_file(state, source / "model.safetensors", {"format": "pt"})
    convert(str(source), tmp_path / "out", request(2, "svd"))
    with torch.no_grad():
        torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(source)), atol=1e-4, rtol=1e-4)


def test_random_heads_are_as_wide_as_the_class_draws_them(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("t5", d_model=256, d_kv=64, initializer_factor=0.5)
    convert(str(source), tmp_path / "out", request(2, "random"))
    found = load_file(tmp_path / "out/model.safetensors")["decoder.block.1.layer.1.EncDecAttention.k.weight"]
    assert float(found.std()) == pytest.approx(0.5 / 256**0.5, rel=0.02)


REMOTE = """
import sys
sys.modules["uptrain"] = None  # any import of it now fails, installed or not
from pathlib import Path
import torch
import transformers
ids = torch.tensor([[5, 7, 11, 2]])
for folder in sorted(Path(sys.argv[1]).iterdir()):
    *_, auto = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map
    auto = getattr(transformers, auto)
    model = auto.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    body = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    given = {model.main_input_name: ids if model.main_input_name == "input_ids" else torch.ones(1, 8, 32)}
    out = model(**given, decoder_input_ids=ids, output_hidden_states=True)
    assert torch.equal(body(**given, decoder_input_ids=ids).last_hidden_state, out.decoder_hidden_states[-1])
    print(out.logits.double().sum().item())
    again = Path(sys.argv[2]) / folder.name
    model.save_pretrained(again)
    saved = auto.from_pretrained(again, trust_remote_code=True)
    assert torch.equal(saved(**given, decoder_input_ids=ids).logits, out.logits)
"""


@pytest.mark.slow
def test_converted_folders_load_without_uptrain(save_tiny: Save, tmp_path: Path) -> None:
    ids, wanted = torch.tensor([[5, 7, 11, 2]]), []
    for number, (model_type, changes) in enumerate(REMOTE_CODE):
        folder = tmp_path / "out" / str(number)
        folder.parent.mkdir(exist_ok=True)
        convert(str(save_tiny(model_type, name=f"src{number}", **changes)), folder, request(2))
        with torch.no_grad():
            model = load(folder)
            given = {model.main_input_name: ids if model.main_input_name == "input_ids" else torch.ones(1, 8, 32)}
            wanted.append(model(**given, decoder_input_ids=ids).logits.double().sum().item())
    totals = run_python(REMOTE, tmp_path / "out", tmp_path / "again", home=tmp_path)
    assert [float(total) for total in totals.split()] == pytest.approx(wanted, abs=1e-2)
    for number in range(len(REMOTE_CODE)):
        made, again = (
            json.loads((tmp_path / name / str(number) / "config.json").read_text()) for name in ("out", "again")
        )
        assert made["auto_map"] == again["auto_map"]


@pytest.mark.parametrize("model_type", OWN)
def test_a_result_can_be_converted_again(model_type: str, save_tiny: Save, tmp_path: Path) -> None:
    convert(str(save_tiny(model_type)), tmp_path / "two", request(2))
    convert(str(tmp_path / "two"), tmp_path / "one", request(1))
    convert(str(tmp_path / "src"), tmp_path / "direct", request(1))
    with torch.no_grad():
        found, wanted = (logits(load(tmp_path / name)) for name in ("one", "direct"))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["t5", "umt5", "bart", "whisper"])
def test_numbers_of_heads_that_do_not_divide_are_refused(model_type: str, save_tiny: Save, tmp_path: Path) -> None:
    convert(str(save_tiny(model_type)), tmp_path / "out", request(2))
    config = AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"num_key_value_heads.*{wrong}"):
            AutoConfig.for_model(**{**config, "num_key_value_heads": wrong})


def test_what_can_not_be_done_is_refused_in_a_sentence(save_tiny: Save) -> None:
    source = save_tiny("t5")
    with pytest.raises(UsageError, match="reads an encoder's output") as caught:
        plan_conversion(str(source), request(2, "calibrated"))
    assert caught.value.hint == "Use --method svd."
    with pytest.raises(UsageError, match="t5"):
        plan_conversion(str(source), Request("mla", cache=0.5))
    state = load_file(source / "model.safetensors")
    alone = {name: value for name, value in state.items() if not name.startswith("decoder.")}
    save_file(alone, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"decoder\.block\.0\.layer\.0\.SelfAttention\.o\.weight"):
        plan_conversion(str(source), request(2))


def test_a_decoder_as_deep_as_its_encoder_need_not_say_so(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("t5", num_layers=2, num_decoder_layers=2)
    config = json.loads((source / "config.json").read_text())
    del config["num_decoder_layers"]
    (source / "config.json").write_text(json.dumps(config))
    convert(str(source), tmp_path / "out", request(2))
    with torch.no_grad():
        found, wanted = logits(load(tmp_path / "out")), logits(pool_model(load(source), 2))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_inspect_and_convert_tell_the_source_s_tokens_from_the_target_s(
    save_tiny: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny("t5")
    found = inspect(str(source))
    assert found.num_hidden_layers == 2
    assert found.cache_bytes_per_token == 2 * found.cross_bytes_per_token == 2 * 2 * (2 * 4 * 16) * 4
    for arguments in (["inspect", str(source)], ["convert", str(source), str(tmp_path / "out"), "--groups", "2"]):
        assert run(arguments) == 0
        assert "encoder" in " ".join(capsys.readouterr().out.split())
    state = load_file(source / "model.safetensors")
    name = "decoder.block.1.layer.1.EncDecAttention.v.weight"
    state[name][0, 0] = np.nan
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="Layer 1, cross"):
        convert(str(source), tmp_path / "nan", request(2))
