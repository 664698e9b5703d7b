"""Odd values and odd machines: what is in the source is kept or named, and the same source gives the same bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.test_families import load
from tests.small import digests, save_small, small_tensors
from uptrain.checkpoint.source import resolve
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.request import Request
from uptrain.errors import CheckpointError, UsageError

KEY, VALUE = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "kv")
OUTSIDE = (
    "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.self_attn.o_proj.weight", "model.norm.weight", "lm_head.weight",
)  # fmt: skip
MQA, GQA2 = Request("mqa"), Request("gqa", 2)
TOLERANCE = 1e-3
"""Of the logits' standard deviation: how far two machines' calibrated models may be apart, anywhere."""
DTYPES = {torch.float64: 2**-52, torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def save(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> str:
    save_small(folder, **config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def tensors(dtype: torch.dtype = torch.float32, **config: Any) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array).to(dtype) for name, array in small_tensors(3, **config).items()}


def result(source: str, out: Path, request: Request) -> dict[str, torch.Tensor]:
    convert(source, out, request)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_is_within_a_rounding_of_the_mean_in_float64(dtype: torch.dtype, tmp_path: Path) -> None:
    """Subnormals of the dtype among them, which must not be flushed to zero."""
    source = tensors(dtype)
    smallest = torch.finfo(dtype).smallest_normal / 4
    source[KEY][:, 0] = smallest
    source[VALUE][:, 1] = torch.tensor([smallest, -smallest]).repeat(4).to(dtype)
    found = result(save(tmp_path / "src", source), tmp_path / "out", MQA)
    for name in (KEY, VALUE):
        wanted = source[name].double().unflatten(0, (4, 2)).mean(0)
        # A sum in float32 rounds once a head, and float64 is summed in float32 as well.
        unit = max(DTYPES[dtype], 2**-23)
        tiny = max(torch.finfo(dtype).tiny * DTYPES[dtype], torch.finfo(torch.float32).tiny * 2**-23)
        assert ((found[name].double() - wanted).abs() <= unit * wanted.abs() + 4 * unit * 0.5 + tiny).all()
    if dtype is not torch.float64:  # whose smallest values float32 has no place for
        assert (found[KEY][:, 0] == smallest).all()
    for name in source:
        if name not in (KEY, VALUE) and "self_attn" not in name:
            assert torch.equal(found[name], source[name])


def test_first_keeps_every_bit(tmp_path: Path) -> None:
    """Minus zero, subnormals and the largest numbers included."""
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 2**16, (8, 8), dtype=np.uint16).view(np.int16))
    wild = torch.where(bits.view(torch.bfloat16).isfinite(), bits.view(torch.bfloat16), torch.tensor(-0.0).bfloat16())
    source = {**tensors(torch.bfloat16), KEY: wild}
    found = result(save(tmp_path / "src", source), tmp_path / "out", Request("mqa", None, "first"))
    assert torch.equal(found[KEY].view(torch.int16), wild[:2].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_weights_outside_attention_pass_and_in_attention_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    source = {**tensors(torch.bfloat16), name: torch.ones(8, 8).to(dtype)}
    folder = save(tmp_path / "src", source)
    found = result(folder, tmp_path / "out", MQA)
    assert torch.equal(found[name].view(torch.uint8), source[name].view(torch.uint8))
    with pytest.raises(UsageError, match="parts of which are quantized"):
        plan_conversion(folder, Request("mqa", dtype="bfloat16"))
    with pytest.raises(CheckpointError, match=f"{KEY}.*F8_"):
        plan_conversion(save(tmp_path / "src", {**source, KEY: source[KEY].to(dtype)}), MQA)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [KEY, VALUE])
def test_what_is_not_finite_is_named_or_kept(name: str, bad: float, tmp_path: Path) -> None:
    source = tensors(torch.bfloat16)
    source[name][2, 3] = bad
    folder = save(tmp_path / "src", source)
    for request in (
        GQA2,
        Request("gqa", 2, "svd"),
        Request("gqa", 2, grouping="similar"),
        Request("mla", dtype="float32"),
    ):
        with pytest.raises(CheckpointError, match=f"Layer 1 .* in {name}.*--allow-nonfinite"):
            convert(folder, tmp_path / "out", request, overwrite=True)
    assert not (tmp_path / "out").exists()
    found = result(folder, tmp_path / "kept", Request("gqa", 2, allow_nonfinite=True))
    pooled = source[name].float().unflatten(0, (2, 2, 2)).mean(1).flatten(0, 1).bfloat16()
    assert torch.equal(found[name], pooled) or torch.allclose(found[name].float(), pooled.float(), equal_nan=True)
    assert (~found[name].isfinite()).sum() == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_not_finite_outside_attention_is_named_or_kept(name: str, bad: float, tmp_path: Path) -> None:
    """Projections that a mean leaves as they are included; what is copied is looked at on its way."""
    source = tensors(torch.bfloat16)
    source[name].flatten()[-1] = bad
    folder = save(tmp_path / "src", source)
    requests = [GQA2] if "self_attn" in name else [GQA2, Request("gqa", 2, "svd"), Request("mla", dtype="float32")]
    for request in requests:
        with pytest.raises(CheckpointError, match=name) as caught:
            convert(folder, tmp_path / "out", request, overwrite=True)
        assert "--allow-nonfinite" in caught.value.hint and not (tmp_path / "out").exists()
        found = result(folder, tmp_path / f"{request.target}-{request.method}", replace(request, allow_nonfinite=True))
        assert (~found[name].isfinite()).sum() == 1


def test_a_calibration_does_not_begin_where_something_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of work later it could not be written: the last norm is nothing that calibration meets."""
    source = tensors()
    source["model.norm.weight"][0] = float("nan")
    monkeypatch.setattr(
        "uptrain.conversion.calibration.run.calibrate", lambda *arguments, **options: pytest.fail("it began")
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        convert(save(tmp_path / "src", source), tmp_path / "out", Request("gqa", 2, "calibrated"))


def test_allowing_does_not_spread_what_is_not_finite_in_attention(tmp_path: Path) -> None:
    """Methods that mix whole matrices would fill them with one such value, in a bias too."""
    source = tensors(torch.bfloat16)
    source |= {
        f"model.layers.{layer}.self_attn.{part}_proj.bias": torch.zeros(8, dtype=torch.bfloat16)
        for layer in range(2) for part in "qkvo"
    }  # fmt: skip
    for name in (KEY, KEY.replace("weight", "bias")):
        folder = save(
            tmp_path / "src", {**source, name: torch.full_like(source[name], float("nan"))}, attention_bias=True
        )
        for request in (Request("gqa", 2, "svd"), Request("gqa", 2, grouping="similar")):
            with pytest.raises(CheckpointError, match=f"Layer 1 .* in {name}"):
                convert(folder, tmp_path / "out", replace(request, allow_nonfinite=True), overwrite=True)


DEGENERATE = {
    "dead heads": lambda weight: weight[:4].zero_(),
    "all dead": lambda weight: weight.zero_(),
    "rank one": lambda weight: weight.copy_(torch.outer(torch.ones(8), torch.linspace(1, 2, 8))),
    "equal heads": lambda weight: weight.copy_(weight[:2].repeat(4, 1)),
    "repeated singular values": lambda weight: weight.copy_(torch.eye(8)),
    "signs": lambda weight: weight.copy_(torch.diag(torch.tensor([1.0, -1.0] * 4))),
}
METHODS = {
    "svd": Request("gqa", 2, "svd"),
    "svd, one head": Request("mqa", None, "svd"),
    "similar": Request("gqa", 2, "svd", grouping="similar"),
    "latent": Request("mla", dtype="float32", kv_lora_rank=6, qk_rope_head_dim=2),
    "longrope": Request("mla", dtype="float32", rope="longrope", kv_lora_rank=6, qk_rope_head_dim=2),
}


@pytest.mark.parametrize("request_", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_heads_give_finite_weights_and_the_same_bytes_twice(
    kind: str, request_: Request, tmp_path: Path
) -> None:
    """Where singular values repeat, signs and order are free: they must be chosen, not left to chance."""
    source = tensors()
    for name in (KEY, VALUE):
        DEGENERATE[kind](source[name])
    folder = save(tmp_path / "src", source)
    found = result(folder, tmp_path / "one", request_)
    assert all(tensor.isfinite().all() for tensor in found.values())
    convert(folder, tmp_path / "two", request_)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_calibration_text_of_one_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 of 0 blocks of 1024") as caught:
        convert("demo", tmp_path / "out", Request("mqa", None, "calibrated", calibration_tokens=1))
    assert "--calibration-tokens" in caught.value.hint and not (tmp_path / "out").exists()


REQUESTS = {
    "mean": GQA2, "first": Request("gqa", 2, "first"), "svd": Request("gqa", 2, "svd"),
    "similar": Request("gqa", 2, "svd", grouping="similar"), "mla": Request("mla", dtype="float32"),
}  # fmt: skip
STORED = {**REQUESTS, "mla": Request("mla", dtype="bfloat16")}
SHORT: dict[str, Any] = {"method": "calibrated", "calibration_tokens": 1024, "repair_steps": 1, "dtype": "float32"}
CALIBRATED = {"gqa": Request("gqa", 2, **SHORT), "mla": Request("mla", cache=0.25, **SHORT)}
ELSEWHERE = """
import sys, torch
from collections.abc import Mapping
from pathlib import Path
from tests.numerics import test_numerics as here
torch.set_num_threads(4)
for name, request in getattr(here, sys.argv[3]).items():
    here.convert(sys.argv[1], Path(sys.argv[2]) / f"there-{name}", request)
"""


OTHER_UNITS = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
"""What makes torch, and MKL in it, use no vector units."""


def on_two_machines(folder: str, at: Path, requests: str, units: Mapping[str, str]) -> None:
    """Convert by the module's `requests` here, and in a process of four threads and these vector units."""
    plain = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    machine = {**plain, **units}
    command = [sys.executable, "-c", ELSEWHERE, folder, str(at), requests]
    with subprocess.Popen(command, env=machine, cwd=Path(__file__).parents[2]) as there:
        for name, request in globals()[requests].items():
            convert(folder, at / f"here-{name}", request)
    assert there.returncode == 0


@pytest.mark.slow
def test_threads_change_no_byte(tmp_path: Path) -> None:
    """Against a process of four threads, on layers large enough for their sums to be shared out among them."""
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 64}
    folder = save(tmp_path / "src", tensors(**sizes), **sizes)
    on_two_machines(folder, tmp_path, "REQUESTS", {})
    for name in REQUESTS:
        assert digests(tmp_path / f"here-{name}") == digests(tmp_path / f"there-{name}"), name


@pytest.mark.slow
@pytest.mark.parametrize("units", ["avx2", "default"])
def test_torchs_vector_units_change_no_byte(units: str, tmp_path: Path) -> None:
    """As models are stored; on a processor with AVX-512, "avx2" leaves that out and "default" all."""
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 64}
    folder = save(tmp_path / "src", tensors(torch.bfloat16, **sizes), **sizes)
    on_two_machines(folder, tmp_path, "STORED", {"ATEN_CPU_CAPABILITY": units})
    for name in STORED:
        assert digests(tmp_path / f"here-{name}") == digests(tmp_path / f"there-{name}"), name


@pytest.mark.slow
def test_other_linear_algebra_changes_no_byte_of_pooled_weights(tmp_path: Path) -> None:
    """Against a process where MKL too uses no vector units; factored weights may round otherwise."""
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 64}
    folder = save(tmp_path / "src", tensors(**sizes), **sizes)
    on_two_machines(folder, tmp_path, "REQUESTS", OTHER_UNITS)
    for name in REQUESTS:
        here, other = tmp_path / f"here-{name}", tmp_path / f"there-{name}"
        if name in ("mean", "first"):
            assert digests(here) == digests(other)
        found = load_file(other / "model.safetensors")
        for key, tensor in load_file(here / "model.safetensors").items():
            torch.testing.assert_close(tensor, found[key], rtol=1e-3, atol=1e-5 * float(tensor.abs().max()) + 1e-12)


@pytest.mark.slow
def test_threads_and_vector_units_change_what_calibrated_weights_compute_by_a_rounding(tmp_path: Path) -> None:
    """Their factors may differ, for many are right; what the model says of text it was not calibrated on may not."""
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 64}
    sizes |= {"vocab_size": 4096, "max_position_embeddings": 128}
    folder = save(tmp_path / "src", tensors(**sizes), **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("demo").path / name, folder)
    on_two_machines(folder, tmp_path, "CALIBRATED", OTHER_UNITS)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 4096, (2, 100)))
    for name in CALIBRATED:
        with torch.no_grad():
            here, there, source = (
                load(at)(tokens).logits for at in (tmp_path / f"here-{name}", tmp_path / f"there-{name}", Path(folder))
            )
        assert (here - source).abs().max() > 100 * TOLERANCE * source.std()  # that there is something to agree on
        torch.testing.assert_close(here, there, rtol=0, atol=TOLERANCE * float(source.std()))


@pytest.mark.parametrize("kind", ["all dead", "repeated singular values"])
def test_degenerate_heads_are_calibrated_to_finite_weights_and_the_same_bytes_twice(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 4096, "max_position_embeddings": 128}
    source = tensors(**sizes)
    for name in (KEY, VALUE):
        DEGENERATE[kind](source[name])
    folder = save(tmp_path / "src", source, **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("demo").path / name, folder)
    found = result(folder, tmp_path / "one", CALIBRATED["gqa"])
    assert all(tensor.isfinite().all() for tensor in found.values())
    convert(folder, tmp_path / "two", CALIBRATED["gqa"])
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
