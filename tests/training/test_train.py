"""Training is AdamW on next tokens and nothing else, on one process or two, cut off or not."""

from __future__ import annotations

import importlib.util
import json
import os
import random
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.corpus import NO_DROPOUT, checkpoint, corpus
from uptrain.architectures.mla_projections import NEUTRAL_WEIGHT
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.manifest import read_manifest, verify
from uptrain.checkpoint.source import DEMO
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.token_file import TokenFile
from uptrain.data.token_text import read_tokens
from uptrain.errors import CheckpointError, Interrupted, UptrainError, UsageError
from uptrain.models.loading import load_tokenizer, new_model
from uptrain.models.register import register
from uptrain.training import recipes
from uptrain.training.losses import lm_loss
from uptrain.training.metrics import TrainingResult, TrainingStep
from uptrain.training.run import train
from uptrain.training.stop_signal import StopRequest


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., recipes.Recipe]:
    """Return a function that makes a recipe on a tiny checkpoint and text, fp32 unless told otherwise."""
    corpus(tmp_path / "text.txt")
    corpus(tmp_path / "held.txt", 80, seed=9)

    def make(**changes: Any) -> recipes.Recipe:
        values: dict[str, Any] = {
            "model": str(tmp_path / "model"), "output": str(tmp_path / "out"), "data": [str(tmp_path / "text.txt")],
            "block_size": 32, "batch_size": 4, "steps": 8, "learning_rate": 1e-2, "warmup": 2, "precision": "fp32",
            "log_every": 1,
        }  # fmt: skip
        values.update(changes)
        if values["model"] is not None and not (tmp_path / "model").exists():
            checkpoint(tmp_path / "model", **NO_DROPOUT)
        return recipes.parse_recipe({key: value for key, value in values.items() if value is not None})

    return make


def run(
    recipe: recipes.Recipe, on_step: Callable[[TrainingStep], None] | None = None, restart: bool = False
) -> TrainingResult:
    done = train(recipe, restart=restart, events=Events(step=on_step) if on_step else Events())
    assert done is not None
    return done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("accumulation", "precision"), [(1, "fp32"), (2, "fp32"), (1, "bf16")])
def test_it_is_the_textbook_loop(
    recipe: Callable[..., recipes.Recipe], tmp_path: Path, accumulation: int, precision: str
) -> None:
    made = recipe(gradient_accumulation=accumulation, weight_decay=0.1, min_lr_ratio=0.1, precision=precision)
    run(made)

    tokens = tmp_path / "tokens"
    TokenFile.build(tokens, made.data, TextEncoder(load_tokenizer(tmp_path / "model")))
    blocks = TokenFile(tokens, made.block_size, made.seed)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=made.betas
    )
    for step in range(made.total_steps):
        left = torch.tensor((step - 2) / (made.total_steps - 2) * torch.pi)
        scale = step / 2 if step < 2 else 0.1 + 0.9 * 0.5 * (1 + float(left.cos()))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * scale
        ids = torch.from_numpy(blocks.take(4))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), made.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    trained = AutoModelForCausalLM.from_pretrained(made.output)
    start = weights(tmp_path / "model")
    assert any((start[name] != tensor).any() for name, tensor in weights(made.output).items())
    if precision == "bf16":
        # The direction that every matrix moved in is the same, but for a few steps of small gradients' rounding.
        for (name, expected), actual in zip(model.named_parameters(), trained.parameters(), strict=True):
            if expected.ndim > 1:
                moved = [each.detach() - start[name] for each in (expected, actual)]
                assert torch.cosine_similarity(*(each.flatten() for each in moved), dim=0) > 0.9, name
        return
    for expected, actual in zip(model.parameters(), trained.parameters(), strict=True):
        # Key biases have no gradient but rounding, which Adam scales up; everything moved by about 5e-2.
        torch.testing.assert_close(actual, expected, atol=5e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "uptrain_gpt2"])
def test_the_result_is_the_source_with_other_weights(
    recipe: Callable[..., recipes.Recipe], tmp_path: Path, model_type: str
) -> None:
    changes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "num_key_value_heads": 2}
    own = changes if model_type == "uptrain_gpt2" else {}
    register()
    source = checkpoint(tmp_path / "model", model_type, torch.bfloat16, **own)
    made = recipe(precision="bf16", held_out=[str(tmp_path / "held.txt")], steps=20)
    losses: list[float] = []
    done = run(made, lambda step: losses.append(step.loss))

    assert losses[-1] < losses[0] - 0.3
    assert done.held_out_loss is not None
    assert done.held_out_loss < losses[0] - 0.3
    assert (made.output / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert {n: (t.shape, t.dtype) for n, t in weights(made.output).items()} == {
        n: (t.shape, t.dtype) for n, t in weights(source).items()
    }
    ids = AutoTokenizer.from_pretrained(made.output)("the quick fox")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(source)("the quick fox")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(made.output, trust_remote_code=False)
    assert type(model).__name__ == type(AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)).__name__
    assert (made.output / "modeling_uptrain_gpt2.py").exists() == (model_type == "uptrain_gpt2")

    verify(made.output)
    manifest = read_manifest(made.output)
    assert manifest is not None
    stage = manifest["stages"][-1]
    assert stage["stage"] == "train"
    assert recipes.parse_recipe(stage["recipe"]) == made
    assert stage["tokens"] == 20 * 4 * 32
    logged = [json.loads(line) for line in (made.output / "train_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "loss" in entry] == list(range(1, 21))
    assert not (tmp_path / "out.run").exists()


@pytest.mark.slow
def test_a_new_model_learns_from_nothing(recipe: Callable[..., recipes.Recipe], tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}
    made = recipe(model=None, config=config, tokenizer={"vocab_size": 300}, steps=40, dtype="bfloat16",
                  held_out=[str(tmp_path / "held.txt")])  # fmt: skip
    done = run(made)
    model = AutoModelForCausalLM.from_pretrained(made.output)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(made.output)) == 300
    assert done.held_out_loss is not None
    assert done.held_out_loss < 4.5
    assert done.bits_per_byte is not None
    assert done.bits_per_byte < 4


def test_a_recipe_s_config_is_recorded_as_it_was_written() -> None:
    said = {"model_type": "llama", "hidden_size": 32, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    config = {**said, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    new_model(config, load_tokenizer(DEMO), seed=0)
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0}


def interrupt_at(number: int) -> Callable[[TrainingStep], None]:
    def on_step(step: TrainingStep) -> None:
        if step.step == number:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ctrl_c_saves_and_the_same_call_ends_at_the_same_bits(
    recipe: Callable[..., recipes.Recipe], tmp_path: Path, precision: str
) -> None:
    # Its dropout draws random numbers, which must be the same ones after the interruption.
    checkpoint(tmp_path / "model", resid_pdrop=0.1)
    undisturbed = recipe(output=str(tmp_path / "whole"), log_every=3, precision=precision)
    whole = run(undisturbed)
    made = recipe(log_every=3, precision=precision)
    for at in (3, 5):
        with pytest.raises(Interrupted, match=r"at step . of 8; the run is saved") as error:
            train(made, events=Events(step=interrupt_at(at)))
        assert error.value.exit_code == 130
        assert not made.output.exists()
    done = run(made)
    assert done.resumed_from == 6
    assert same(made.output, undisturbed.output)
    assert done.loss == whole.loss

    def losses(folder: Path) -> list[Any]:
        lines = (folder / "train_log.jsonl").read_text().splitlines()
        return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]

    assert losses(made.output) == losses(undisturbed.output)


@pytest.mark.slow
def test_a_streamed_run_resumes_to_the_same_bits(recipe: Callable[..., recipes.Recipe], tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = (tmp_path / "text.txt").read_text().splitlines()
    (rows / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = [{"dataset": str(rows), "stream": True}]
    undisturbed = recipe(output=str(tmp_path / "whole"), data=data)
    run(undisturbed)
    made = recipe(data=data)
    with pytest.raises(Interrupted):
        train(made, events=Events(step=interrupt_at(4)))
    run(made)
    assert same(made.output, undisturbed.output)


def command(recipe: recipes.Recipe, folder: Path) -> list[str]:
    path = folder / f"{recipe.output.name}.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    return ["-m", "uptrain", "train", str(path)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_kill_9_at_random_moments_and_the_same_command_end_at_the_same_bits(
    recipe: Callable[..., recipes.Recipe], tmp_path: Path
) -> None:
    changes = {"steps": 240, "save_every": 10, "isolate_documents": False}
    undisturbed = recipe(output=str(tmp_path / "whole"), **changes)
    made = recipe(**changes)
    run(undisturbed)
    folder = tmp_path / "out.run"
    for lines in sorted(random.Random(7).sample(range(5, 200), 5)):
        process = subprocess.Popen([sys.executable, *command(made, tmp_path)], env=environment())
        log = folder / "train_log.jsonl"
        # The next kill comes after a number of steps and a fraction of one, whatever is being written then.
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > lines):
            time.sleep(0.003)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not made.output.exists()
    done = run(made)
    assert done.resumed_from >= 10
    assert same(made.output, undisturbed.output)


@pytest.mark.slow
def test_two_processes_do_the_same_mathematics_as_one(recipe: Callable[..., recipes.Recipe], tmp_path: Path) -> None:
    held = {"held_out": [str(tmp_path / "held.txt")], "gradient_accumulation": 2}
    one = recipe(output=str(tmp_path / "one"), **held)
    alone = run(one)
    two = recipe(output=str(tmp_path / "two"), **held)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, *command(two, tmp_path), "--json"], env=environment(), check=True, capture_output=True, text=True
    )
    # Only one of the two prints, so this is one JSON value.
    together = json.loads(done.stdout)
    assert together["num_processes"] == 2
    assert together["tokens"] == alone.tokens
    assert together["held_out_loss"] == pytest.approx(alone.held_out_loss, abs=1e-4)
    for name, tensor in weights(one.output).items():
        torch.testing.assert_close(weights(two.output)[name], tensor, atol=1e-4, rtol=1e-3)


def test_a_loss_that_is_no_number_stops_and_names_the_step(recipe: Callable[..., recipes.Recipe]) -> None:
    with pytest.raises(UptrainError, match=r"(nan|inf).* step \d"):
        train(recipe(learning_rate=1e38, warmup=0))


@pytest.mark.slow
def test_requests_that_cannot_be_carried_out(recipe: Callable[..., recipes.Recipe], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="64 positions"):
        train(recipe(block_size=65))
    run(recipe(steps=1))
    with pytest.raises(UsageError, match="exists"):
        train(recipe(steps=1))
    with pytest.raises(UsageError, match="tracker wandb is not installed"):
        train(recipe(trackers=["wandb"]))
    with pytest.raises(UsageError, match=r"uptrain\.json"):
        train(recipe(distill={}))
    with pytest.raises(UsageError, match="makes no causal language model"):
        train(recipe(model=None, config={"model_type": "gpt3"}, tokenizer={"vocab_size": 300},
                     output=str(tmp_path / "new")))  # fmt: skip


def test_a_launcher_that_can_not_be_served_is_refused(
    recipe: Callable[..., recipes.Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="DeepSpeed"):
        train(recipe())


def test_held_out_text_is_scored_in_blocks_of_its_own_length(
    recipe: Callable[..., recipes.Recipe], tmp_path: Path
) -> None:
    made = recipe(held_out=[str(tmp_path / "held.txt")], held_out_block_size=48, steps=2)
    done = run(made)
    ids = read_tokens(made.held_out, load_tokenizer(made.output), made.held_out_tokens).ids
    blocks = torch.from_numpy(ids[: len(ids) // 48 * 48]).view(-1, 48)
    with torch.no_grad():
        loss = lm_loss(AutoModelForCausalLM.from_pretrained(made.output), blocks).item()
    assert made.block_size != 48
    assert done.held_out_loss == pytest.approx(loss, abs=1e-4)


@pytest.mark.slow
def test_a_latent_trains_without_its_norm_and_is_written_with_it(
    recipe: Callable[..., recipes.Recipe], tmp_path: Path
) -> None:
    checkpoint(tmp_path / "llama", "llama", attention_bias=False, rms_norm_eps=1e-5)
    convert(str(tmp_path / "llama"), tmp_path / "model", Request("mla", kv_lora_rank=16, qk_rope_head_dim=6))
    whole = recipe(output=str(tmp_path / "whole"), learning_rate=1e-3, held_out=[str(tmp_path / "held.txt")])
    done = run(whole)
    made = recipe(learning_rate=1e-3, held_out=[str(tmp_path / "held.txt")])
    with pytest.raises(Interrupted):
        train(made, events=Events(step=interrupt_at(3)))
    run(made)
    assert same(made.output, whole.output)

    model = AutoModelForCausalLM.from_pretrained(made.output)
    assert type(model).__module__.startswith("transformers.models.deepseek_v3")
    assert {n: t.shape for n, t in weights(made.output).items()} == {
        n: t.shape for n, t in weights(tmp_path / "model").items()
    }
    for layer in model.model.layers:
        assert (layer.self_attn.kv_a_layernorm.weight == NEUTRAL_WEIGHT).all()
    # What is stored is what was trained: its loss on the held-out text is the run's own.
    assert done.held_out_loss is not None
    ids = read_tokens(whole.held_out, load_tokenizer(made.output), whole.held_out_tokens).ids
    blocks = torch.from_numpy(ids[: len(ids) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        assert abs(lm_loss(model, blocks).item() - done.held_out_loss) < 1e-4
    assert not torch.equal(
        weights(made.output)["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"],
        weights(tmp_path / "model")["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"],
    )


def test_float16_for_a_latent_is_refused_before_training(recipe: Callable[..., recipes.Recipe], tmp_path: Path) -> None:
    checkpoint(tmp_path / "llama", "llama", attention_bias=False)
    convert(str(tmp_path / "llama"), tmp_path / "model", Request("mla", kv_lora_rank=16, qk_rope_head_dim=6))
    with pytest.raises(UsageError, match="float16 can't hold"):
        train(recipe(dtype="float16"))


@pytest.mark.slow
def test_a_checkpoint_of_a_run_has_the_format_of_version_0_1_and_another_is_refused(
    recipe: Callable[..., recipes.Recipe], tmp_path: Path
) -> None:
    made = recipe()
    with pytest.raises(Interrupted):
        train(made, events=Events(step=interrupt_at(3)))
    file = next((tmp_path / "out.run").glob("checkpoint-*")) / "state.json"
    state = json.loads(file.read_text())
    assert {*state} == {"step", "reader", "journal", "last", "best", "schedule"}
    assert {*state["journal"]} == {"window", "recent", "skipped"}
    assert {*state["last"]} == {"loss", "cross_entropy", "divergence", "hidden"}
    for broken in ({**state, "schedule": None}, {key: state[key] for key in state if key != "journal"}):
        file.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match=r"state\.json"):
            train(made)
    file.write_text(json.dumps(state))
    assert run(made).resumed_from == int(state["step"])


def test_a_signal_asks_for_a_stop_and_a_second_ctrl_c_ends_at_once() -> None:
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_missing_optimizer_is_refused_before_any_text_is_read(
    recipe: Callable[..., recipes.Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    made = recipe(optimizer="adamw-8bit", data=[str(tmp_path / "absent.txt")])
    with pytest.raises(UsageError, match="needs bitsandbytes"):
        train(made)
