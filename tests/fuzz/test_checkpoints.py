"""A checkpoint with a hostile config, strange tensors, history or unfinished run: inspected, planned, converted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.fuzz.attempt import attempt, inputs
from tests.fuzz.hostile import NUMBERS, as_json, damaged, scalars, values
from tests.small import CONFIG, digests, save_small, small_tensors
from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.projections import module_of
from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.locks import LOCK
from uptrain.checkpoint.manifest import MANIFEST, converted_from, verify
from uptrain.checkpoint.output_folder import STATE
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.inspection import inspect
from uptrain.conversion.plan.planner import make_plan
from uptrain.conversion.request import Request
from uptrain.models.targets import TARGET_CLASSES

REQUESTS = (
    Request("gqa", 2), Request("mqa"), Request("gqa", 4), Request("gqa", 2, "svd"), Request("gqa", 2, "first"),
    Request("mqa", dtype="float16"), Request("gqa", 2, "random"), Request("mqa", max_shard_size=500),
    Request("mla", cache=0.5), Request("mla", rope="longrope"), Request("mla", rope="re-rotate"),
    Request("mla", dtype="bfloat16", kv_lora_rank=3, qk_rope_head_dim=2),
)  # fmt: skip

KEYS = (
    "auto_map", "quantization_config", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_pct",
    "rotary_dim", "sliding_window", "layer_types", "use_sliding_window", "max_window_layers", "head_dim",
    "sliding_window_pattern", "no_rope_layers", "no_rope_layer_interval", "attention_bias", "mlp_bias", "clip_qkv",
    "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "multi_query", "new_decoder_architecture",
    "alibi", "attn_config", "qk_layernorm", "use_qk_norm", "initializer_range", "torch_dtype", "dtype",
)  # fmt: skip
ROPE = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16, "beta_fast": 32}
EVIL = {"AutoConfig": "evil--modeling.Config", "AutoModelForCausalLM": "evil--modeling.Model"}
RICH = {**CONFIG, "rope_scaling": ROPE, "head_dim": 2, "auto_map": EVIL, "max_window_layers": 1, "sliding_window": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with a checkpoint in it, and check in the end that nothing else came to be there."""
    root = tmp_path_factory.mktemp("place")
    save_small(root / "model")
    yield root
    assert {path.name for path in root.iterdir()} <= {"model", "out", "out.partial"}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uptrain.conversion.run.pipeline._workers", lambda: 1)
    monkeypatch.setattr("uptrain.checkpoint.manifest.versions", dict)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def converted(place: Path, request: Request) -> Path | None:
    """Try to convert the checkpoint; return the result, in which every file is what uptrain writes."""
    out = place / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(place / "out.partial", ignore_errors=True)
    done, _ = attempt(convert, str(place / "model"), out, request)
    if done is None:
        assert not out.exists()
        return None
    code = {name for target in TARGET_CLASSES.values() for name in target.code_files}
    assert all(path.suffix in (".json", ".safetensors") or path.name in code for path in out.iterdir())
    verify(out)
    return out


@pytest.mark.slow
@given(config=as_json(damaged(RICH, KEYS) | damaged(CONFIG, KEYS, 1)), request_=st.sampled_from(REQUESTS))
@inputs(350)
@example(config=b'{"model_type": ["llama"]}', request_=Request())  # was a TypeError
@example(config=b'{"model_type": "llama", "num_hidden_layers": 2147483647}', request_=Request())  # listed them all
@example(
    config=b'{"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 2147483647, "head_dim": 2, '
    b'"num_attention_heads": 2147483647}',
    request_=Request(),
)  # tried each number of groups
@example(config=json.dumps({**CONFIG, "note": float("inf")}).encode(), request_=Request())  # could not be written
@example(config=json.dumps({**CONFIG, "note": "\ud800"}).encode(), request_=Request())
@example(config=json.dumps({**CONFIG, "rope_scaling": "yarn"}).encode(), request_=Request("mla"))
@example(config=json.dumps({**CONFIG, "rope_theta": 10**400}).encode(), request_=Request("mla"))
@example(config=json.dumps({**CONFIG, "rope_theta": -1.0}).encode(), request_=Request("mla"))
@example(config=json.dumps({**CONFIG, "rms_norm_eps": None}).encode(), request_=Request("mla"))
@example(config=json.dumps({**CONFIG, "initializer_range": "wide"}).encode(), request_=Request("gqa", 2, "random"))
def test_a_config_says_anything(config: bytes, request_: Request, place: Path) -> None:
    (place / "model" / "config.json").write_bytes(config)
    attempt(inspect, str(place / "model"))
    plain = request_.target != "mla" and request_.method != "svd"  # those want torch, and time
    if not plain:
        attempt(plan_conversion, str(place / "model"), request_)
        return
    out = converted(place, request_)
    if out is not None:
        assert "evil" not in json.dumps(json.loads((out / "config.json").read_text()).get("auto_map", {}))


@given(
    model_type=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(KEYS), scalars | values | st.just(ROPE), max_size=3),
    sizes=st.lists(st.sampled_from([1, 2, 4, 8, 3, *(n for n in NUMBERS if type(n) is int)]), min_size=5, max_size=5),
    rows=st.integers(0, 9),
    request_=st.sampled_from(REQUESTS),
)
@inputs(450)
def test_every_family_is_planned_or_refused(
    model_type: str, changes: dict[str, Any], sizes: list[int], rows: int, request_: Request, place: Path
) -> None:
    """Without weights: the header promises tensors that no plan reads."""
    family = FAMILIES[model_type]
    keys = family.keys
    named = (
        keys.hidden_size, keys.num_hidden_layers, keys.num_attention_heads, keys.num_key_value_heads, keys.head_dim,
    )  # fmt: skip
    config = {"model_type": model_type, **{key: size for key, size in zip(named, sizes, strict=True) if key}, **changes}
    base = family.attention(family.prefixes[0], 0)
    tensors = {}
    for part in "qkvo":
        for kind, shape in (("weight", (rows, 8)), ("bias", (rows,))):
            name = f"{base}{module_of(family.projections, part)}.{kind}"
            tensors[name] = TensorInfo(name, "F32", shape, "model.safetensors", 0, 32 * rows)
    checkpoint = Checkpoint(place / "model", config, tensors)
    attempt(make_plan, checkpoint, request_, "m")


@st.composite
def strange(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Return a checkpoint's tensors with a few of other shapes, dtypes, names or values, or without them."""
    tensors = dict(TENSORS)
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(sorted(tensors) or ["a"]))
        array = tensors.pop(name, np.zeros((2, 2), np.float32))
        action = draw(st.integers(0, 6))
        if action == 0:
            array = np.zeros(draw(st.lists(st.integers(0, 9), max_size=4)), array.dtype)
        elif action == 1:
            with np.errstate(all="ignore"):
                array = array.astype(draw(st.sampled_from(["i4", "u1", "?", "f2", "f8", "i8"])))
        elif action == 2:
            array = array.astype(np.float32)
            array.flat[:1] = draw(st.sampled_from([float("nan"), float("inf"), 1e38, 1e-42, 0.0]))
        elif action == 3:
            name = draw(st.sampled_from([f"{name}.weight", name.replace("model.", ""), "lm_head.weight", "../x", "\n"]))
        elif action == 4:
            tensors[name.replace(".weight", ".bias")] = np.zeros(draw(st.lists(st.integers(0, 8), max_size=2)), "f4")
        if action != 5:
            tensors[name] = array
    return tensors


TENSORS = small_tensors()
KEYS_OF_ONE = "model.layers.1.self_attn.k_proj.weight"
POOLED = [request for request in REQUESTS if request.target != "mla" and request.method != "svd"]


@pytest.mark.slow
@given(tensors=strange(), request_=st.sampled_from(POOLED))
@inputs(120)
@example(tensors={**TENSORS, KEYS_OF_ONE: np.full((8, 8), 1e38, np.float32)}, request_=Request("mqa"))
def test_tensors_of_any_kind(tensors: dict[str, np.ndarray], request_: Request, place: Path) -> None:
    (place / "model" / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, place / "model" / "model.safetensors")
    out = converted(place, request_)
    if out is not None:
        found = open_checkpoint(out)
        others = {name for name in tensors if "self_attn" not in name}
        assert others <= set(found.tensors)
    save_small(place / "model")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("result")
    save_small(root / "model", 2)
    convert(str(root / "model"), root / "out", Request("gqa", 2))
    return root


@pytest.mark.slow
@given(data=st.data())
@inputs(150)
def test_a_manifest_says_anything(data: st.DataObject, result: Path) -> None:
    """It is verified, its history told and carried on; nothing that it names outside the folder is read."""
    path = result / "out" / MANIFEST
    plain = path.read_bytes()
    try:
        path.write_bytes(data.draw(as_json(damaged(json.loads(plain), ("stages", "files", "format")))))
        attempt(verify, result / "out")
        attempt(converted_from, result / "out")
        if data.draw(st.integers(0, 4)) == 0:
            attempt(convert, str(result / "out"), result / "next", Request("mqa"), overwrite=True)
    finally:
        path.write_bytes(plain)
    verify(result / "out")


@pytest.mark.parametrize(
    "manifest",
    [
        '{"format": 1, "stages": [{"energy": Infinity}], "files": {}}',
        '{"format": 1, "stages": [3], "files": {}}',
        '{"format": 1, "stages": [], "files": {"a\\u0000b": {"size": 1, "checksum": "blake3:0"}}}',
        '{"format": 1, "stages": [], "files": {"%s": {"size": 1, "checksum": "blake3:0"}}}' % ("x" * 5000),
    ],
)
def test_manifests_that_once_were_not_refused(manifest: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(manifest)
    assert attempt(verify, tmp_path)[1]


@pytest.mark.slow
@given(data=st.data())
@inputs(150)
def test_an_unfinished_run_says_anything(data: st.DataObject, result: Path) -> None:
    """Its notes are hints: whatever they say, the result is the same or the run is refused."""
    partial = result / "again.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(result / "again", ignore_errors=True)
    shutil.copytree(result / "out", partial)
    (partial / LOCK).touch()
    _, _, plan = plan_conversion(str(result / "model"), Request("gqa", 2))
    shards = {name: text for name, text in digests(result / "out").items() if name.endswith(".safetensors")}
    layers = {"1": {"mean": {"keys": 1.0}}}
    state = {"plan": plan.digest, "command": "", "shards": shards, "sources": dict(shards), "layers": layers}
    (partial / STATE).write_bytes(data.draw(as_json(damaged(state, ("9", "../../model/config.json"), 2))))
    done, sentence = attempt(convert, str(result / "model"), result / "again", Request("gqa", 2))
    if done is None:
        assert "another plan" in sentence
        return
    found, wanted = digests(result / "again"), digests(result / "out")
    assert {name: found[name] for name in wanted if name != MANIFEST} == {
        name: wanted[name] for name in wanted if name != MANIFEST
    }
    assert found.keys() == wanted.keys()
