"""An adapter is named as one by every command, and what its message says to type makes a model of it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import uptrain
from tests.corpus import NO_DROPOUT, checkpoint, corpus
from tests.hub_server import serve
from tests.oracle import pool_model
from tests.small import save_small
from uptrain.checkpoint.adapters import refuse_adapter
from uptrain.cli.app import run
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import CheckpointError

Save = Callable[..., Path]


def adapter(base: Path, folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Path:
    """Write a random adapter of `base`."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, init_lora_weights=False, **options)
    peft.get_peft_model(auto.from_pretrained(base, dtype=torch.float32), config).save_pretrained(folder)
    return folder


def message(folder: Path, command: str = "inspect") -> str:
    with pytest.raises(CheckpointError) as caught:
        uptrain.inspect(str(folder)) if command == "inspect" else uptrain.load(folder)
    return str(caught.value)


def follow(said: str, folder: Path) -> Path:
    """Run what a message says, as a shell would read it; return the folder that it writes below `folder`."""
    found = re.search(r'python -c ".*?"', said)
    assert found
    python, option, code = shlex.split(found[0])
    assert (python, option) == ("python", "-c")
    with chdir(folder):
        exec(code, {})  # in this process, which has imported all it needs
    return folder / re.findall(r"save_pretrained\('([^']+)'\)", said)[0]


def test_an_adapter_alone_is_merged_as_its_message_says(save_tiny: Save, tmp_path: Path) -> None:
    base = save_tiny("llama")
    folder = adapter(base, tmp_path / "tuned", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    said = message(folder)
    assert "is an adapter" in said and str(base) in said
    merged = follow(said, tmp_path)
    _same_as_transformers(folder, merged, tmp_path)


def test_an_adapter_beside_its_base_is_merged_as_its_message_says(save_tiny: Save, tmp_path: Path) -> None:
    folder = save_tiny("llama", name="both")
    written = adapter(folder, tmp_path / "x", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    # Another base is named there, which transformers passes over for the weights beside it.
    config = json.loads((written / "adapter_config.json").read_text())
    changed = json.dumps({**config, "base_model_name_or_path": str(save_tiny("llama", name="other", seed=5))})
    (written / "adapter_config.json").write_text(changed)
    for file in written.glob("adapter_*"):
        shutil.copy(file, folder)
    whole = shutil.copytree(folder, tmp_path / "whole")
    said = message(folder)
    assert "Move adapter_*" in said
    (tmp_path / "both-adapter").mkdir()
    for file in folder.glob("adapter_*"):
        file.rename(tmp_path / "both-adapter" / file.name)
    _same_as_transformers(whole, follow(said, tmp_path), tmp_path)


def _same_as_transformers(adapted: Path, merged: Path, folder: Path) -> None:
    """Check that `merged` converts to what transformers computes from `adapted`, with the adapter on."""
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    out = convert(str(merged), folder / "out", Request("gqa", 2)).out
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(adapted, dtype=torch.float32)
        assert any("lora" in name for name, _ in model.named_parameters())
        plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        assert (plain(ids).logits - model(ids).logits).abs().max() < 1e-5
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
        assert (found - pool_model(plain, 2)(ids).logits).abs().max() < 1e-5


def test_an_encoder_decoder_s_adapter_names_its_own_class(save_tiny: Save, tmp_path: Path) -> None:
    options = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
    folder = adapter(save_tiny("t5"), tmp_path / "tuned", AutoModelForSeq2SeqLM, **options)
    merged = AutoModelForSeq2SeqLM.from_pretrained(follow(message(folder), tmp_path), dtype=torch.float32)
    adapted = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        pair = [each(input_ids=ids, decoder_input_ids=ids).logits for each in (merged, adapted)]
    assert (pair[0] - pair[1]).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("beside", [True, False], ids=["beside", "alone"])
def test_every_command_refuses_it(beside: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = checkpoint(tmp_path / "plain", **NO_DROPOUT)
    adapted = shutil.copytree(plain, tmp_path / "adapted")
    made = adapter(plain, tmp_path / "x", target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    for file in made.glob("adapter_*"):
        shutil.copy(file, adapted)
    if not beside:
        (adapted / "model.safetensors").unlink()
    text = str(corpus(tmp_path / "text.txt"))
    recipe = ["train", "gqa-uptrain", f"data=[{text}]", "steps=1", "block_size=32", f"output={tmp_path / 'out'}"]
    for command in (
        ["inspect", str(adapted)],
        ["convert", str(adapted), str(tmp_path / "out"), "--to", "mqa"],
        ["convert", str(adapted), str(tmp_path / "out"), "--to", "mqa", "--dry-run"],
        ["eval", str(adapted), "--text", text],
        ["eval", str(plain), "--baseline", str(adapted), "--text", text],
        [*recipe, f"model={adapted}", "distill=null"],
        [*recipe, f"model={plain}", f"distill.teacher={adapted}"],
        ["sweep", str(adapted), "--to", "mqa", "--methods", "mean", "--out", str(tmp_path / "out")],
    ):
        assert run(command) == 1, command
        said = " ".join(capsys.readouterr().err.split())
        assert "peft.PeftModel" in said, said
        assert ("Move adapter_*" in said) == beside
        assert not list(tmp_path.glob("out*")), command
    assert "peft.PeftModel" in message(adapted, "load")


def test_an_adapter_put_into_a_result_is_not_pushed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = convert("demo", tmp_path / "out", Request("mqa")).out
    shutil.copy(out / "config.json", out / "adapter_config.json")
    assert run(["push", str(out), "me/it", "--license", "mit", "--dry-run"]) != 0
    assert "adapter_config.json" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("beside", [True, False], ids=["beside", "alone"])
def test_an_adapter_on_the_hub_is_named_by_its_id(
    beside: bool, save_tiny: Save, tmp_path: Path, uptrain_against: Callable[..., Any]
) -> None:
    base = save_tiny("llama")
    folder = adapter(base, tmp_path / "tuned", target_modules=["q_proj"], task_type="CAUSAL_LM")
    for file in base.iterdir() if beside else ():
        shutil.copy(file, folder)
    with serve(folder, "org/tuned") as (endpoint, _):
        for arguments in (("inspect",), ("convert", "--groups", "2", "--dry-run"), ("convert", "--groups", "2")):
            done = uptrain_against(endpoint, arguments[0], "org/tuned", *arguments[1:])
            said = " ".join(done.stderr.split())
            assert done.returncode == 1, said
            assert "Error: org/tuned holds" in said if beside else "Error: org/tuned is an adapter" in said, said


@pytest.mark.parametrize("base", ["'); import os; os.system('x", "$(touch x)", "`touch x`", 'a"; touch x; "', 7, None])
def test_what_an_adapter_says_is_no_part_of_a_command(base: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    with pytest.raises(CheckpointError) as caught:
        refuse_adapter(tmp_path)
    assert "from_pretrained('BASE'" in caught.value.hint
    assert "touch" not in caught.value.hint and "os." not in caught.value.hint


@pytest.mark.parametrize("text", ["{", "[]", '{"peft_type": ["x"]}', "{}"])
def test_an_adapter_s_config_may_be_anything(text: str, tmp_path: Path) -> None:
    folder = save_small(tmp_path / "c")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="holds an adapter with a model"):
        refuse_adapter(folder)


def test_prompts_that_cannot_be_merged_are_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(CheckpointError, match="PREFIX_TUNING can't be merged"):
        refuse_adapter(tmp_path)


def test_adapter_weights_that_transformers_ignores_are_no_adapter(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama")
    made = adapter(source, tmp_path / "x", target_modules=["q_proj"], task_type="CAUSAL_LM")
    shutil.copy(made / "adapter_model.safetensors", source)
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(source).named_parameters()]
    assert not any("lora" in name for name in names)
    out = convert(str(source), tmp_path / "out", Request("gqa", 2)).out
    assert not (out / "adapter_model.safetensors").exists()
