"""Training an encoder-decoder: the loss of writing a block's second half after its encoder has read the first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from tests.conftest import tiny_config, tiny_model
from tests.corpus import checkpoint, corpus
from tests.oracle import pool_model
from uptrain.checkpoint.manifest import verify
from uptrain.cli.app import run
from uptrain.data.sources import Files
from uptrain.errors import UsageError
from uptrain.evaluation import EvaluationSettings, evaluate
from uptrain.training.batches import batch_of
from uptrain.training.distillation import Objective
from uptrain.training.recipe import Distill, Recipe
from uptrain.training.run import train

SEQ2SEQ = {"decoder_start_token_id": 0}
BLOCKS = torch.randint(2, 64, (3, 11), generator=torch.Generator().manual_seed(0))


def recipe(source: Path, out: Path, text: Path, **changes: object) -> Recipe:
    return Recipe.model_validate({
        "model": str(source), "output": str(out), "data": [{"files": str(text)}], "block_size": 16, "batch_size": 8,
        "steps": 20, "learning_rate": 3e-3, "precision": "fp32", **changes,
    })  # fmt: skip


@pytest.mark.parametrize("model_type", ["t5", "umt5", "bart"])
def test_loss_and_gradients_are_the_class_s_own_of_the_second_half(model_type: str) -> None:
    model = tiny_model(tiny_config(model_type)).eval()
    batch = batch_of(BLOCKS.numpy(), None, has_encoder=True)
    sums = Objective(model)(batch.ids, batch.targets)
    assert batch.target_tokens == 3 * 6
    (sums[0] / batch.target_tokens).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    loss = model(input_ids=BLOCKS[:, :5], labels=BLOCKS[:, 5:].contiguous()).loss
    loss.backward()
    torch.testing.assert_close(sums[1] / batch.target_tokens, loss)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_divergence_and_hidden_distance_are_those_of_the_decoder() -> None:
    teacher, student = (tiny_model(tiny_config("t5")).eval() for _ in range(2))
    pool_model(student, 1)
    distill = Distill.model_validate({"weight": 1.0, "hidden_weight": 1.0})
    batch = batch_of(BLOCKS.numpy(), None, has_encoder=True)
    sums = Objective(student, distill, teacher)(batch.ids, batch.targets)

    def written(model: PreTrainedModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.no_grad():
            out = model(input_ids=BLOCKS[:, :5], labels=BLOCKS[:, 5:].contiguous(), output_hidden_states=True)
        return out.logits.log_softmax(-1), list(out.decoder_hidden_states[1:])

    (mine, states), (theirs, taught) = written(student), written(teacher)
    wanted = functional.kl_div(mine, theirs, log_target=True, reduction="sum")
    far = [((a - b).square().sum(-1) / b.square().sum(-1)).sum() for a, b in zip(states, taught, strict=True)]
    torch.testing.assert_close(sums[2], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums[3], sum(far) / len(far), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_converted_model_learns_back_what_its_source_says(tmp_path: Path) -> None:
    text = corpus(tmp_path / "text.txt", 200)
    source = checkpoint(tmp_path / "source", "t5", **SEQ2SEQ, dropout_rate=0.0)
    assert run(["convert", str(source), str(tmp_path / "mqa"), "--to", "mqa"]) == 0
    done = train(recipe(tmp_path / "mqa", tmp_path / "out", text, distill={"weight": 1.0}))
    assert done is not None and not done.isolated
    verify(tmp_path / "out")
    settings = EvaluationSettings(text=[Files(files=str(text))], context=16, tokens=80, repeats=0)
    before, after = (evaluate(str(tmp_path / name), settings, baseline=str(source)) for name in ("mqa", "out"))
    assert before.kl is not None and after.kl is not None
    assert after.kl < 0.9 * before.kl
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert model.config.num_key_value_heads == 1 and model.shared.weight is model.lm_head.weight


@pytest.mark.slow
def test_what_can_not_be_trained_is_refused_in_a_sentence(tmp_path: Path) -> None:
    text = corpus(tmp_path / "text.txt", 30)
    source = checkpoint(tmp_path / "source", "t5", **SEQ2SEQ)
    with pytest.raises(UsageError, match="can't keep documents"):
        train(recipe(source, tmp_path / "out", text, isolate_documents=True))
    teacher = {"source": "teacher", "tokens": 500}
    with pytest.raises(UsageError, match="can't write text from nothing"):
        train(recipe(source, tmp_path / "taught", text, data=[teacher], distill={"teacher": str(source)}))
    whisper = checkpoint(tmp_path / "whisper", "whisper", suppress_tokens=None)
    with pytest.raises(UsageError, match="input_features"):
        train(recipe(whisper, tmp_path / "heard", text))
