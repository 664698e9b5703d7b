"""Results load in a process where uptrain can't be imported, as on any server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from uptrain.cli.app import run

LOAD = """
import sys
sys.modules["uptrain"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, trust = sys.argv[1], sys.argv[2] == "trust"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
ids = tokenizer("def main():", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)
print(type(model).__module__, out[0].tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "trust", "module"),
    [
        (("--to", "mqa"), "no", "transformers.models.gpt_bigcode.modeling_gpt_bigcode"),
        (("--to", "gqa", "--groups", "4"), "trust", "transformers_modules"),
        (("--to", "gqa", "--groups", "8"), "no", "transformers.models.gpt2.modeling_gpt2"),
    ],
    ids=["mqa", "gqa4", "gqa8"],
)
def test_a_converted_demo_loads_and_generates_without_uptrain(
    arguments: tuple[str, ...], trust: str, module: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(["convert", "demo", str(out), *arguments]) == 0
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(out), trust], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(module)
