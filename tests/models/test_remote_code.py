"""The modelling files in a checkpoint are complete without uptrain, and say the same as uptrain's own tables."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conversion.test_families import load, request
from tests.hub_server import serve
from tests.models.test_gpt2_checkpoint import run_python
from tests.models.test_shared_heads import Save
from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.own_classes import OWN_CLASSES
from uptrain.checkpoint.manifest import read_manifest, verify
from uptrain.checkpoint.source import resolve
from uptrain.conversion.run.convert import convert
from uptrain.models.saving import save
from uptrain.models.target import REMOTE_CODE, SHARED_CODE
from uptrain.models.targets import TARGET_CLASSES

ROOT = Path(__file__).parents[2]
OURS = {f"{own.module}.py": own for own in OWN_CLASSES.values()}


def test_every_modelling_file_is_in_the_table_and_nothing_else_lies_there() -> None:
    assert {path.name for path in REMOTE_CODE.glob("*.py")} == {"__init__.py", SHARED_CODE, *OURS}


@pytest.mark.parametrize("name", [SHARED_CODE, *OURS])
def test_a_modelling_file_imports_torch_transformers_and_the_shared_file_alone(name: str) -> None:
    """transformers copies relative imports of one dot, of the same folder."""
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse((REMOTE_CODE / name).read_text())):
        if isinstance(node, ast.Import):
            assert {each.name.partition(".")[0] for each in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").partition(".")[0] in allowed
        elif isinstance(node, ast.ImportFrom):
            assert (node.level, node.module) == (1, SHARED_CODE.removesuffix(".py")) and name != SHARED_CODE


@pytest.mark.parametrize("name", OURS)
def test_a_config_names_the_classes_that_the_table_names(name: str) -> None:
    own = OURS[name]
    module = importlib.import_module(f"uptrain.models.remote_code.{own.module}")
    config = getattr(module, own.config_class)
    assert config.model_type == own.model_type
    assert config().auto_map == {auto: f"{own.module}.{each}" for auto, each in own.auto_classes.items()}
    for auto, each in own.auto_classes.items():
        assert getattr(module, each)._auto_class == auto


def test_every_class_of_ours_is_a_family_and_a_target_class() -> None:
    for model_type, own in OWN_CLASSES.items():
        family, target = FAMILIES[model_type], TARGET_CLASSES[model_type]
        assert (family.class_name, family.auto_class) == (own.head_class, own.auto_class)
        assert target.family is family and target.remote_code in OURS
    assert {target.remote_code for target in TARGET_CLASSES.values()} - {""} == OURS.keys()


def test_importing_uptrain_imports_no_numpy() -> None:
    code = "import sys, uptrain; print(*sorted({'numpy', 'torch', 'transformers'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "\n"


@pytest.mark.slow
def test_a_modelling_file_can_be_the_first_that_a_process_imports() -> None:
    """Importing uptrain arranges that importing transformers registers all of them."""
    code = "from uptrain.models.remote_code.modeling_uptrain_gpt2 import UptrainGPT2Model"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_result_holds_both_files_and_its_manifest_lists_them(save_tiny: Save, tmp_path: Path) -> None:
    convert(str(save_tiny("bloom")), tmp_path / "out", request(2))
    names = {"modeling_uptrain_bloom.py", SHARED_CODE}
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (REMOTE_CODE / name).read_bytes()
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and names <= manifest["files"].keys()
    verify(tmp_path / "out")


WITHOUT_UPTRAIN = """
import sys
sys.modules["uptrain"] = None  # any import of it now fails, installed or not
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model(torch.tensor([[5, 7, 11, 2]])).logits.double().sum().item())
"""


def make_single_file(folder: Path, name: str) -> None:
    """Put all that the modelling file imports into it, as the version before had it."""
    file, shared = folder / name, folder / SHARED_CODE
    alone = re.sub(r"from \.uptrain_shared import (\([^)]*\)|.*)", "", file.read_text())
    file.write_text(f"{shared.read_text()}\n{alone}")
    shared.unlink()


@pytest.mark.slow
def test_a_checkpoint_of_the_version_before_loads_with_and_without_uptrain(save_tiny: Save, tmp_path: Path) -> None:
    """Its modelling file was one, with all that is shared now in it."""
    convert(str(save_tiny("opt")), tmp_path / "out", request(2))
    make_single_file(tmp_path / "out", "modeling_uptrain_opt.py")
    with torch.no_grad():
        wanted = load(tmp_path / "out")(torch.tensor([[5, 7, 11, 2]])).logits.double().sum().item()
    assert float(run_python(WITHOUT_UPTRAIN, tmp_path / "out", home=tmp_path)) == pytest.approx(wanted, abs=1e-4)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "UptrainOPTForCausalLM"


def test_training_keeps_the_one_file_of_the_version_before(save_tiny: Save, tmp_path: Path) -> None:
    convert(str(save_tiny("opt")), tmp_path / "out", request(2))
    make_single_file(tmp_path / "out", "modeling_uptrain_opt.py")
    (tmp_path / "trained").mkdir()
    source = resolve(str(tmp_path / "out"))
    save(load(tmp_path / "out"), None, tmp_path / "trained", torch.float32, source)
    found = {path.name: path.read_bytes() for path in (tmp_path / "trained").glob("*.py")}
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.py")}


@pytest.mark.slow
def test_transformers_fetches_both_files_from_the_hub(save_tiny: Save, tmp_path: Path) -> None:
    convert(str(save_tiny("bloom")), tmp_path / "out", request(2))
    with torch.no_grad():
        wanted = load(tmp_path / "out")(torch.tensor([[5, 7, 11, 2]])).logits.double().sum().item()
    with serve(tmp_path / "out", "org/tiny") as (endpoint, log):
        environment = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": "",
        }  # fmt: skip
        environment.pop("HF_MODULES_CACHE", None)
        command = [sys.executable, "-c", WITHOUT_UPTRAIN, "org/tiny"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(wanted, abs=1e-4)
    fetched = {path.rpartition("/")[2] for method, path, _ in log if method == "GET" and path.endswith(".py")}
    assert fetched == {"modeling_uptrain_bloom.py", SHARED_CODE}
