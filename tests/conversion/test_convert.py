"""A conversion is whole or not there, resumes to the same bytes, and refuses what it can't do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from threadpoolctl import ThreadpoolController
from transformers import AutoModelForCausalLM

from uptrain.checkpoint.checksum import checksum_file
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.manifest import read_manifest, verify
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.request import Request
from uptrain.errors import CheckpointError, UptrainError

Save = Callable[..., Path]
GQA2 = Request("gqa", 2)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: checksum_file(path) for path in folder.iterdir()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_the_same_command_gives_the_same_bytes_on_any_number_of_threads(
    save_tiny: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny("llama", dtype=torch.bfloat16, max_shard_size="20KB")
    convert(str(source), tmp_path / "one", GQA2)
    monkeypatch.setattr("uptrain.conversion.run.pipeline._workers", lambda: 1)
    convert(str(source), tmp_path / "two", GQA2)
    assert len(list(source.glob("*.safetensors"))) > 3
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_shards_are_made_on_their_own_threads_only(save_tiny: Save, tmp_path: Path) -> None:
    """numpy's BLAS starts no others beside them, and has what it had again afterwards."""
    blas, seen = ThreadpoolController().select(internal_api="openblas"), set[int]()

    def threads(count: int = 0) -> None:
        seen.update(found["num_threads"] for found in blas.info())

    with blas.limit(limits=2):
        convert(str(save_tiny("llama")), tmp_path / "out", Request("gqa", 2), events=Events(bytes=threads))
        assert seen == {1}
        threads()
        assert seen == {1, 2}


def test_shards_change_only_where_the_bytes_lie(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama", dtype=torch.bfloat16)
    convert(str(source), tmp_path / "one", GQA2)
    convert(str(source), tmp_path / "many", Request("gqa", 2, max_shard_size=15_000))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict(),
        AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict(),
        rtol=0,
        atol=0,
    )
    for file in (tmp_path / "many").glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 15_000 or len(load_file(file)) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_rounds_as_torch_does_and_is_what_the_config_says(dtype: str, save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama")
    convert(str(source), tmp_path / "as-is", Request("gqa", 2))
    convert(str(source), tmp_path / "out", Request("gqa", 2, dtype=dtype))
    as_is, out = weights(tmp_path / "as-is"), weights(tmp_path / "out")
    assert all(torch.equal(out[name], as_is[name].to(getattr(torch, dtype))) for name in as_is)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


def test_provenance_names_source_files_by_digest_and_verifies(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama", max_shard_size="20KB")
    (source / "LICENSE").write_text("free")
    convert(str(source), tmp_path / "out", Request("gqa", 2, "random", seed=5))
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    stage = manifest["stages"][0]
    files = {path.name: checksum_file(path) for path in source.iterdir()}
    assert stage["source"]["files"] == files
    assert (stage["request"]["method"], stage["request"]["seed"]) == ("random", 5)
    assert stage["num_key_value_heads"] == {"before": 4, "after": 2}
    verify(tmp_path / "out")
    convert(str(tmp_path / "out"), tmp_path / "mqa", Request("mqa"))
    again = read_manifest(tmp_path / "mqa")
    assert again is not None and [s["num_key_value_heads"]["after"] for s in again["stages"]] == [2, 1]


def test_random_heads_repeat_by_seed(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(str(source), tmp_path / name, Request("gqa", 2, "random", seed))
    key = "model.layers.0.self_attn.k_proj.weight"
    a, b, c = (weights(tmp_path / name)[key] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.std() == pytest.approx(open_checkpoint(source).config["initializer_range"], rel=0.15)


def test_a_full_disk_is_said_before_anything_is_written(
    save_tiny: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny("llama", max_shard_size="20KB")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UptrainError, match="1,000"):
        convert(str(source), tmp_path / "out", GQA2)
    assert not (tmp_path / "out").exists()


def test_nan_in_attention_names_the_layer(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama")
    state = load_file(source / "model.safetensors")
    state["model.layers.1.self_attn.v_proj.weight"][3, 3] = float("nan")
    save_file(state, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Layer 1 .*v_proj"):
        convert(str(source), tmp_path / "out", GQA2)
    assert not (tmp_path / "out").exists()


def test_tensors_that_do_not_fit_the_config(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama")
    state = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({**state, name: state[name][:-1].clone()}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}.*\[47, 48\].*\[48, 48\]"):
        plan_conversion(str(source), GQA2)
    del state[name]
    save_file(state, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        plan_conversion(str(source), GQA2)


def test_the_plan_counts_the_bytes_that_are_written(save_tiny: Save, tmp_path: Path) -> None:
    _, _, plan = plan_conversion(str(save_tiny("gpt2", max_shard_size="20KB")), Request("mqa"))
    convert(str(tmp_path / "src"), tmp_path / "out", Request("mqa"))
    assert plan.total_bytes == sum(tensor.nbytes for tensor in weights(tmp_path / "out").values())
    assert set(plan.shards) == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert plan.cache_after == plan.cache_before // 4


def test_a_bin_checkpoint_converts_like_its_safetensors(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("gpt2")
    convert(str(source), tmp_path / "safe", GQA2)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    convert(str(source), tmp_path / "pickled", GQA2, allow_pickle=True)
    safe, pickled = weights(tmp_path / "safe"), weights(tmp_path / "pickled")
    assert safe.keys() == pickled.keys() and all(torch.equal(safe[name], pickled[name]) for name in safe)


@pytest.mark.slow
def test_peak_memory_does_not_hold_the_model(tmp_path: Path) -> None:
    """200 MB of weights in 8 shards pass through a process that grows by far less."""
    source = tmp_path / "src"
    source.mkdir()
    size, layers = 512, 8
    config = {
        "model_type": "llama", "hidden_size": size, "num_attention_heads": 8, "num_hidden_layers": layers,
        "intermediate_size": 4_000, "vocab_size": 64,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for layer in range(layers):
        base, shard = f"model.layers.{layer}.", f"model-{layer}.safetensors"
        tensors = {f"{base}self_attn.{part}_proj.weight": torch.randn(size, size) for part in "qkvo"}
        tensors |= {f"{base}mlp.{part}_proj.weight": torch.randn(4_000, size) for part in ("gate", "up")}
        tensors[f"{base}mlp.down_proj.weight"] = torch.randn(size, 4_000)
        tensors |= {f"{base}{norm}_layernorm.weight": torch.ones(size) for norm in ("input", "post_attention")}
        if layer == 0:
            tensors |= {name: torch.randn(64, size) for name in ("model.embed_tokens.weight", "lm_head.weight")}
            tensors["model.norm.weight"] = torch.ones(size)
        save_file(tensors, source / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    script = (
        "import resource, sys\nfrom uptrain import Request, convert\nRequest\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); convert(sys.argv[1], sys.argv[2], Request('mqa')); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 90_000  # KiB
    assert np.isclose(sum(t.nbytes for t in weights(tmp_path / "out").values()) / 1e6, 222, atol=15)
