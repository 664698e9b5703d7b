from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.models.gpt2_models import grouped, prompt, repeated
from uptrain.models.register import register
from uptrain.models.remote_code.modeling_uptrain_gpt2 import UptrainGPT2Config, UptrainGPT2LMHeadModel, UptrainGPT2Model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_save_and_load_round_trip(tied: bool, tmp_path: Path) -> None:
    model = grouped(2, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("lm_head.weight" in names) is not tied
    loaded = UptrainGPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(prompt()).logits, model(prompt()).logits)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) is tied
    assert loaded.config.num_key_value_heads == 2


def test_every_other_tensor_keeps_gpt2s_name_shape_and_bytes() -> None:
    model = grouped(2)
    mine, theirs = model.state_dict(), repeated(model).state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert ".c_attn." in name or torch.equal(tensor, theirs[name]), name
    assert mine["transformer.h.0.attn.c_attn.weight"].shape == (32, (4 + 2 * 2) * 8)


def test_a_checkpoint_without_the_transformer_prefix_loads(tmp_path: Path) -> None:
    model = grouped(2)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = UptrainGPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(prompt()).logits, model(prompt()).logits)
    hidden = UptrainGPT2Model.from_pretrained(tmp_path)(prompt()).last_hidden_state
    assert torch.equal(hidden, model.transformer(prompt()).last_hidden_state)


def test_registered_classes_serve_a_folder_without_remote_code(tmp_path: Path) -> None:
    register()
    register()
    grouped(2).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is UptrainGPT2Config
    assert type(AutoModel.from_pretrained(tmp_path)) is UptrainGPT2Model
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is UptrainGPT2LMHeadModel


def run_python(code: str, *arguments: Path, home: Path) -> str:
    """Run code in a fresh interpreter, offline and with its own module cache; return its stdout."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    # HF_MODULES_CACHE, where remote code is copied to, would win over HF_HOME.
    environment.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_UPTRAIN = """
import sys
sys.modules["uptrain"] = None  # any import of it now fails, installed or not
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, again = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules."), type(config)
assert config.num_key_value_heads == 2
body = AutoModel.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.tensor([[5, 7, 11, 2]])
assert torch.equal(body(ids).last_hidden_state, model.transformer(ids).last_hidden_state)
print(model(ids).logits.double().sum().item())
model.save_pretrained(again)
assert AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)(ids).logits.isfinite().all()
"""


@pytest.mark.slow
def test_a_saved_folder_carries_its_own_code(tmp_path: Path) -> None:
    model = grouped(2)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    total = run_python(WITHOUT_UPTRAIN, tmp_path / "saved", tmp_path / "again", home=tmp_path)
    assert float(total) == pytest.approx(model(torch.tensor([[5, 7, 11, 2]])).logits.double().sum().item(), abs=1e-3)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["auto_map"] == config["auto_map"]
    for name in ("modeling_uptrain_gpt2.py", "uptrain_shared.py"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


TRANSFORMERS_LATER = """
import importlib.util, sys
from uptrain.models.register import register_with_transformers
register_with_transformers()
register_with_transformers()
assert not {"torch", "transformers"} & set(sys.modules)
importlib.util.find_spec("transformers")
assert not {"torch", "transformers"} & set(sys.modules)
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)
"""

TRANSFORMERS_FIRST = """
import sys
from transformers import AutoModelForCausalLM
from uptrain.models.register import register_with_transformers
register_with_transformers()
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [TRANSFORMERS_LATER, TRANSFORMERS_FIRST], ids=["later", "first"])
def test_registration_works_whichever_is_imported_first(code: str, tmp_path: Path) -> None:
    grouped(2).save_pretrained(tmp_path / "saved")
    # Without its code in the folder, only a registered class can load it.
    for path in (tmp_path / "saved").glob("*.py"):
        path.unlink()
    module = run_python(code, tmp_path / "saved", home=tmp_path).strip()
    assert module == "uptrain.models.remote_code.modeling_uptrain_gpt2"
