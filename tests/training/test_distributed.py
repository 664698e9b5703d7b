"""Two processes do what one does, however weights are shared out, and a run changes its number of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.corpus import checkpoint, corpus
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.training import recipes, train

Make = Callable[..., recipes.Recipe]


@pytest.fixture
def recipe(tmp_path: Path) -> Make:
    """Return a function that makes a distilling recipe on a tiny converted Llama, documents packed."""
    words = corpus(tmp_path / "text.txt").read_text().splitlines()
    rows = [json.dumps({"text": " ".join(words[start : start + 2])}) for start in range(0, len(words), 2)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    checkpoint(tmp_path / "original", "llama", attention_bias=False, tie_word_embeddings=True)
    convert(str(tmp_path / "original"), tmp_path / "model", Request("gqa", 2))

    def make(name: str, **changes: Any) -> recipes.Recipe:
        return recipes.parse_recipe({
            "model": str(tmp_path / "model"), "output": str(tmp_path / name), "data": [str(tmp_path / "text.jsonl")],
            "held_out": [str(tmp_path / "text.txt")], "held_out_tokens": 400, "block_size": 32, "batch_size": 4,
            "steps": 8, "learning_rate": 1e-2, "warmup": 2, "precision": "fp32", "log_every": 1,
            "gradient_accumulation": 2, "distill": {"weight": 0.7, "hidden_weight": 0.1}, "save_every": 3, **changes,
        })  # fmt: skip

    return make


def start(recipe: recipes.Recipe, processes: int, config: str = "") -> subprocess.Popen[str]:
    """Train in another process, or in several under torchrun, or under accelerate with a shipped config."""
    path = recipe.output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    command = ["-m", "uptrain", "train", str(path), "--json"]
    if config:
        file = recipes.shipped_folder() / "accelerate" / f"{config}.yaml"
        launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
        command = [*launch, "--num_processes", str(processes), *command]
    elif processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*launch, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True)


def run(recipe: recipes.Recipe, processes: int, config: str = "") -> dict[str, Any]:
    process = start(recipe, processes, config)
    out, _ = process.communicate()
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(out)
    assert found["num_processes"] == processes
    return found


def losses(folder: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [[entry["loss"], entry["cross_entropy"], entry["kl"]] for entry in lines if "loss" in entry]


def assert_alike(one: Path, other: Path) -> None:
    torch.testing.assert_close(torch.tensor(losses(one)), torch.tensor(losses(other)), atol=2e-4, rtol=1e-3)
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "precision"), [("ddp", "fp32"), ("fsdp2", "fp32"), ("fsdp2", "bf16")])
def test_two_processes_learn_what_one_learns(recipe: Make, config: str, precision: str) -> None:
    alone = train(recipe("one", precision=precision))
    assert alone is not None
    two = recipe("two", precision=precision)
    together = run(two, 2, config)
    assert together["sharded"] == (config == "fsdp2")
    if precision == "fp32":
        assert together["held_out_loss"] == pytest.approx(alone.held_out_loss, abs=1e-4)
        assert_alike(alone.out, two.output)
        return
    # Rounding to 8 bits takes another way where sums are split in another way.
    assert together["held_out_loss"] == pytest.approx(alone.held_out_loss, abs=2e-2)
    torch.testing.assert_close(torch.tensor(losses(alone.out)), torch.tensor(losses(two.output)), atol=3e-2, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["", "ddp"])
def test_the_launch_lines_of_the_readme_train_on_two_processes_with_every_default(
    config: str, recipe: Make, tmp_path: Path
) -> None:
    """Nothing pinned: precision, isolation, schedule and the rest are the shipped recipe's and the machine's."""
    values = (
        f"model={tmp_path / 'model'}", f"output={tmp_path / 'out'}", f"data=[{tmp_path / 'text.txt'}]",
        f"held_out=[{tmp_path / 'text.txt'}]", "held_out_tokens=400", "block_size=32", "tokens=null", "steps=3",
    )  # fmt: skip
    shipped = recipes.load_recipe("demo-uptrain", values)
    assert shipped.precision == "auto"
    alone = train(shipped)
    assert alone is not None
    two = run(recipes.load_recipe("demo-uptrain", (*values, f"output={tmp_path / 'two'}")), 2, config)
    assert two["precision"] == alone.precision
    tolerance = 1e-4 if alone.precision == "fp32" else 2e-2
    assert two["loss"] == pytest.approx(alone.loss, abs=tolerance)
    assert two["held_out_loss"] == pytest.approx(alone.held_out_loss, abs=tolerance)


@pytest.mark.slow
def test_a_latent_is_sharded_and_written_whole(recipe: Make, tmp_path: Path) -> None:
    convert(str(tmp_path / "original"), tmp_path / "latent", Request("mla", kv_lora_rank=16, qk_rope_head_dim=6))
    values = {"model": str(tmp_path / "latent"), "learning_rate": 1e-3}
    alone = train(recipe("one", **values))
    assert alone is not None
    two = recipe("two", fsdp=True, **values)
    run(two, 2)
    assert_alike(alone.out, two.output)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "fsdp"), [(2, 1, True), (1, 2, False)])
def test_a_killed_run_goes_on_with_another_number_of_processes(
    recipe: Make, before: int, after: int, fsdp: bool
) -> None:
    whole = train(recipe("whole", steps=16))
    assert whole is not None
    cut = recipe("cut", steps=16, fsdp=fsdp)
    process = start(cut, before)
    folder = cut.output.with_name("cut.run")
    while process.poll() is None and not list(folder.glob("checkpoint-*[0-9]")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL) if before == 1 else process.terminate()
    process.communicate()
    assert not cut.output.exists()
    done = run(cut, after)
    assert done["resumed_from"] > 0
    assert_alike(whole.out, cut.output)
