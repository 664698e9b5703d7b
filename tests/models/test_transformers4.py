"""What results are in transformers 4: the same model where its class is there, a refusal where it isn't.

Installs transformers 4 in front of this environment's own packages, from the registry: `pytest -m wheel`. With the
variable PYTHON4, the path of a Python that has it, nothing is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.architectures.test_rope_parameters import rewrite
from tests.conftest import tiny_config, tiny_model
from tests.conversion.test_families import TOKENS, load
from tests.oracle import pool_model
from tests.rotary_configs import LLAMA3, YARN
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert

pytestmark = pytest.mark.wheel
PYTHON4 = os.environ.get("PYTHON4")
"""A Python that has torch and transformers 4, to use in place of an installation."""
OLD = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.0")

# Reads folders on stdin, and says of each the logits or why there are none.
PROGRAM = f"""
import json, sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
def answer(folder):
    auto = json.load(open(folder + "/config.json")).get("auto_map", {{}})
    name = next((name for name in auto if name.startswith("AutoModelFor")), "AutoModelForCausalLM")
    try:
        model, found = getattr(transformers, name).from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=True, output_loading_info=True)
        assert not any(found.values()), found
        with torch.no_grad():
            return model.eval()(input_ids=torch.tensor({TOKENS.tolist()}), use_cache=False).logits.tolist()
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
print(json.dumps([answer(folder) for folder in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Return a function from folders to their logits in transformers 4, text in place of those that don't load."""
    packages = tmp_path_factory.mktemp("transformers4")
    if PYTHON4 is None:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), *OLD]
        # The constraints of this environment name another transformers.
        free = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
        subprocess.run(install, check=True, env=free)
    modules = str(tmp_path_factory.mktemp("modules"))
    env = {**os.environ, "PYTHONPATH": str(packages), "HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}

    def answers(*folders: Path) -> list[Any]:
        program, given = [PYTHON4 or sys.executable, "-c", PROGRAM], json.dumps([str(folder) for folder in folders])
        done = subprocess.run(
            program,
            input=given,
            env=env,
            cwd=modules,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [each if isinstance(each, str) else torch.tensor(each) for each in json.loads(done.stdout)]

    return answers


EXACT = {"rope": "longrope", "qk_rope_head_dim": 64, "kv_lora_rank": 64}
HELD: dict[str, tuple[str, str, dict[str, Any], Request]] = {
    "phi": ("gpt_neox", "phi", {"rotary_pct": 0.25, "rotary_emb_base": 500}, Request("gqa", 2)),
    "phi, linear": (
        "gpt_neox", "phi",
        {"rotary_pct": 0.5, "rotary_emb_base": 500, "rope_scaling": {"type": "linear", "factor": 3.0}}, Request("mqa"),
    ),
    "phi, yarn": (
        "gpt_neox", "phi", {"rotary_pct": 0.5, "rotary_emb_base": 500, "rope_scaling": YARN}, Request("gqa", 2),
    ),
    "phi, dynamic": (
        "gpt_neox", "phi",
        {"rotary_pct": 0.5, "rotary_emb_base": 500, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
        Request("gqa", 2),
    ),
    "phi of GPT-J": ("gptj", "phi", {}, Request("gqa", 2)),
    "phi of CodeGen": ("codegen", "phi", {}, Request("mqa")),
    "nemotron": (
        "gpt_neox+no_use_parallel_residual", "nemotron", {"rotary_pct": 1.0, "rotary_emb_base": 500}, Request("gqa", 2),
    ),
    "gpt_bigcode": ("gpt2", "gpt_bigcode", {}, Request("mqa")),
    "llama": ("llama", "llama", {"rope_theta": 500.0, "rope_scaling": LLAMA3}, Request("gqa", 2)),
    "deepseek_v3": ("llama", "deepseek_v3", {"rope_theta": 500.0}, Request("mla", **EXACT)),
    "deepseek_v3, yarn": (
        "llama", "deepseek_v3", {"rope_theta": 500.0, "rope_scaling": YARN}, Request("mla", **EXACT),
    ),
}  # fmt: skip
GRIDS = {
    "default": {"rope_theta": 500.0},
    "llama3": {"rope_theta": 500.0, "rope_scaling": LLAMA3},
    "yarn": {"rope_theta": 500.0, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
}
OURS = {
    "gpt2": Request("gqa", 2), "qwen2": Request("mla"), "bloom": Request("gqa", 2), "mpt": Request("gqa", 2),
    "opt": Request("gqa", 2), "gpt_neo": Request("gqa", 2), "persimmon": Request("gqa", 2), "t5": Request("gqa", 2),
    "umt5": Request("gqa", 2), "bart": Request("gqa", 2), "whisper": Request("gqa", 2),
}  # fmt: skip


def converted(root: Path, model_type: str, said: dict[str, Any], request: Request) -> tuple[Path, Path]:
    """Return a source whose heads are alike already, so that sharing them loses nothing, and its result."""
    wide = {} if model_type in ("gpt2", "gptj", "codegen") else {"hidden_size": 64}
    biases = {"attention_bias": False} if model_type == "llama" else {}
    model = tiny_model(tiny_config(model_type, **wide, **biases))
    if request.target != "mla":
        pool_model(model, request.groups or 1)
    source = root / "source"
    model.save_pretrained(source)
    if said:
        rewrite(source, **said)
    convert(str(source), root / "out", request)
    return source, root / "out"


def test_results_in_stock_classes_are_the_same_model_in_both(ask: Callable[..., list[Any]], tmp_path: Path) -> None:
    pairs = {}
    for name, (model_type, held_by, said, request) in HELD.items():
        (tmp_path / name).mkdir()
        pairs[name] = converted(tmp_path / name, model_type, said, request)
        assert json.loads((pairs[name][1] / "config.json").read_text())["model_type"] == held_by
    found = ask(*(folder for pair in pairs.values() for folder in pair))
    for (name, (_, out)), source4, out4 in zip(pairs.items(), found[::2], found[1::2], strict=True):
        assert not isinstance(source4, str) and not isinstance(out4, str), (name, source4, out4)
        torch.testing.assert_close(out4, source4, atol=2e-4, rtol=2e-4, msg=name)
        with torch.no_grad():
            torch.testing.assert_close(out4, load(out)(TOKENS).logits, atol=1e-5, rtol=1e-5, msg=name)


def test_a_latent_with_a_smaller_base_is_the_same_model_in_both(ask: Callable[..., list[Any]], tmp_path: Path) -> None:
    outs = []
    for name, said in GRIDS.items():
        (tmp_path / name).mkdir()
        outs.append(converted(tmp_path / name, "llama", said, Request("mla", cache=0.5, qk_rope_head_dim=8))[1])
    for out, found in zip(outs, ask(*outs), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(found, load(out)(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_what_transformers_4_would_take_for_another_model_does_not_load(
    ask: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """Its Nemotron knows no scaled rotation, and our modelling files want transformers 5."""
    scaled = {"rotary_pct": 0.5, "rotary_emb_base": 500, "rope_scaling": YARN}
    wanted = {"nemotron": ("gpt_neox+no_use_parallel_residual", scaled, Request("mqa"))}
    outs = []
    for model_type, said, request in [*wanted.values(), *((name, {}, request) for name, request in OURS.items())]:
        folder = tmp_path / f"of_{model_type.partition('+')[0]}"
        tiny_model(tiny_config(model_type)).save_pretrained(folder)
        if said:
            rewrite(folder, **said)
        outs.append(folder.with_name(f"{folder.name}_out"))
        convert(str(folder), outs[-1], request)
    nemotron, *ours = ask(*outs)
    assert isinstance(nemotron, str) and nemotron.startswith("TypeError"), nemotron
    for out, found in zip(outs[1:], ours, strict=True):
        assert isinstance(found, str) and "transformers 5" in found, (out.name, found)
