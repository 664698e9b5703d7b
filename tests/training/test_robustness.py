"""A run survives a bad batch, a full disk and a bad end: what it keeps is whole and what it says is true."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.corpus import NO_DROPOUT, checkpoint, corpus
from uptrain.checkpoint.events import Events
from uptrain.data.token_text import read_tokens
from uptrain.errors import UptrainError
from uptrain.models.loading import load_tokenizer
from uptrain.training import recipes, state
from uptrain.training.distillation import Objective
from uptrain.training.losses import lm_loss
from uptrain.training.metrics import TrainingStep
from uptrain.training.run import train

Make = Callable[..., recipes.Recipe]


@pytest.fixture
def recipe(tmp_path: Path) -> Make:
    """Return a function that makes a recipe on a tiny checkpoint."""
    corpus(tmp_path / "text.txt")
    corpus(tmp_path / "held.txt", 40, seed=9)
    checkpoint(tmp_path / "model", **NO_DROPOUT)

    def make(**changes: Any) -> recipes.Recipe:
        return recipes.parse_recipe({
            "model": str(tmp_path / "model"), "output": str(tmp_path / "out"), "data": [str(tmp_path / "text.txt")],
            "block_size": 32, "batch_size": 4, "steps": 20, "learning_rate": 1e-2, "warmup": 2, "precision": "fp32",
            "log_every": 1, "isolate_documents": False, **changes,
        })  # fmt: skip

    return make


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def spoil(monkeypatch: pytest.MonkeyPatch, factor: float, calls: range) -> None:
    """Multiply the loss of some calls of the objective, as a bad batch would."""
    plain, seen = Objective.forward, iter(range(10**6))

    def forward(self: Objective, *args: Any) -> torch.Tensor:
        out = plain(self, *args)
        return out * factor if next(seen) in calls else out

    monkeypatch.setattr(Objective, "forward", forward)


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "spike", "words"), [(float("nan"), None, "became nan"), (50.0, 3.0, "rose to")])
def test_a_bad_step_is_left_out_and_named(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, factor: float, spike: float | None, words: str, tmp_path: Path
) -> None:
    made = recipe(on_bad_loss="skip", spike=spike)
    spoil(monkeypatch, factor, range(14, 15))
    done = train(made)
    assert done is not None
    assert done.skipped == 1
    named = [entry["skipped"] for entry in log(made.output) if "skipped" in entry]
    assert len(named) == 1
    assert words in named[0]
    assert "at step 15, on sequences 56 to 59" in named[0]
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(made.output / "model.safetensors").values())
    losses = [entry["loss"] for entry in log(made.output) if "loss" in entry]
    assert max(losses[15:]) < losses[0]


def test_a_bad_step_stops_a_run_unless_told_otherwise(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 50.0, range(14, 15))
    with pytest.raises(UptrainError, match=r"3 times .*step 15.*56 to 59"):
        train(recipe(spike=3.0))


def test_steps_that_all_go_wrong_stop_even_a_patient_run(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, float("nan"), range(3, 100))
    with pytest.raises(UptrainError, match="10"):
        train(recipe(on_bad_loss="skip"))


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_whole(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = recipe(output=str(recipe().output) + "-whole")
    train(undisturbed)
    made = recipe(save_every=5)
    plain = state.save

    def full(folder: Path, *args: Any) -> None:
        if folder.name.startswith("checkpoint-10"):
            (folder / "half").write_bytes(b"x" * 1000)
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(folder, *args)

    monkeypatch.setattr(state, "save", full)
    with pytest.raises(UptrainError, match=r"step 10.*No space left on device.*checkpoint-5"):
        train(made)
    folder = made.output.with_name("out.run")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-5"]
    monkeypatch.setattr(state, "save", plain)
    done = train(made)
    assert done is not None
    assert done.resumed_from == 5
    one, other = (run.output / "model.safetensors" for run in (undisturbed, made))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_model_is_kept_beside_the_last(recipe: Make, tmp_path: Path, keep: str) -> None:
    # Twenty sentences over and over: what is learnt by heart soon gets worse on others.
    corpus(tmp_path / "text.txt", 20)
    made = recipe(
        held_out=[str(tmp_path / "held.txt")], eval_every_tokens=5 * 128, keep=keep, steps=120, warmup=0,
        schedule="constant",
    )  # fmt: skip
    bests: list[float] = []
    done = train(
        made,
        events=Events(step=lambda step: bests.append(step.held_out_loss) if step.held_out_loss else None),
    )
    assert done is not None
    assert len(bests) == 23
    held = [entry["held_out_loss"] for entry in log(made.output) if "held_out_loss" in entry]
    assert held[-1] > min(held) + 0.05
    ids = read_tokens(made.held_out, load_tokenizer(made.output), made.held_out_tokens).ids
    model = AutoModelForCausalLM.from_pretrained(made.output)
    with torch.no_grad():
        written = lm_loss(model, torch.from_numpy(ids[: len(ids) // 32 * 32]).view(-1, 32)).item()
    assert written == pytest.approx(min(held) if keep == "best" else held[-1], abs=1e-3)
    assert done.held_out_loss == pytest.approx(written, abs=1e-3)
    assert (done.best_step is not None) == (keep == "best")


@pytest.mark.slow
def test_the_best_so_far_can_be_used_while_the_run_goes_on(recipe: Make, tmp_path: Path) -> None:
    seen: list[float] = []

    def look(step: TrainingStep) -> None:
        if step.held_out_loss is not None:
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "out.run/best")
            ids = read_tokens(made.held_out, load_tokenizer(tmp_path / "out.run/best"), 640).ids
            with torch.no_grad():
                seen.append(lm_loss(model, torch.from_numpy(ids).view(-1, 32)).item() - step.held_out_loss)

    made = recipe(held_out=[str(tmp_path / "held.txt")], held_out_tokens=640, eval_every=5, steps=11)
    train(made, events=Events(step=look))
    assert len(seen) == 2
    assert max(map(abs, seen)) < 1e-4


@pytest.mark.slow
def test_memory_does_not_grow_with_the_sequence(tmp_path: Path) -> None:
    """At a large vocabulary, logits of a whole batch would dwarf the model: peak memory must not depend on them."""
    code = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from uptrain.training.distillation import Objective
from uptrain.training.recipe import Distill
torch.manual_seed(0); torch.set_num_threads(1)
sizes = dict(vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=True)
student, teacher = (LlamaForCausalLM(LlamaConfig(**sizes)) for _ in range(2))
length = int(sys.argv[1])
ids = torch.randint(0, 49152, (2048 // length, length))
targets = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -100)], 1)
objective = Objective(student, Distill.model_validate({}), teacher)
objective(ids, targets)[0].backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = [
        int(subprocess.run([sys.executable, "-c", code, length], check=True, capture_output=True, text=True).stdout)
        for length in ("1024", "2048")
    ]
    assert peaks[1] < 1.1 * peaks[0]
    # Both models' fp32 logits of 2 048 tokens, their logarithms and the gradient would be 2 GiB.
    assert max(peaks) < 1.5 * 2**20
