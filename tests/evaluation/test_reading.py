"""The metrics of an encoder-decoder equal their definition, computed in the plainest way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from tests.corpus import checkpoint, corpus
from tests.oracle import pool_model
from uptrain.cli.app import run
from uptrain.data.sources import Files
from uptrain.errors import UsageError
from uptrain.evaluation import Evaluation, EvaluationSettings, evaluate
from uptrain.evaluation.quality import windows

SEQ2SEQ = {"initializer_factor": 1.0, "decoder_start_token_id": 0}


@pytest.fixture
def text(tmp_path: Path) -> list[Files]:
    return [Files(files=str(corpus(tmp_path / "text.txt", 60)))]


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    source = checkpoint(tmp_path / "source", "t5", **SEQ2SEQ)
    assert run(["convert", str(source), str(tmp_path / "mqa"), "--to", "mqa"]) == 0
    return tmp_path / "mqa"


def quick(model: Path, baseline: Path | None, text: list[Files], **options: Any) -> Evaluation:
    settings = EvaluationSettings(text=text, **{"repeats": 0, "context": 32, "tokens": 46, **options})
    return evaluate(str(model), settings, baseline=str(baseline) if baseline else None)


@torch.no_grad()
def continued(model: PreTrainedModel, ids: torch.Tensor, begin: int, first: int, end: int) -> torch.Tensor:
    """Return log-probabilities (end − first, vocabulary), one decoder pass for each token so that none sees a later."""
    rows = []
    for position in range(first, end):
        decoded = torch.cat([torch.tensor([0]), ids[first:position]])
        rows.append(model(input_ids=ids[None, begin:first], decoder_input_ids=decoded[None]).logits[0, -1])
    return torch.stack(rows).log_softmax(-1)


@pytest.mark.parametrize(("model_type", "stride"), [("t5", None), ("t5", 10), ("bart", None)])
def test_loss_and_divergence_are_those_of_continuing_what_the_encoder_read(
    model_type: str, stride: int | None, text: list[Files], tmp_path: Path
) -> None:
    source, converted = checkpoint(tmp_path / "source", model_type, **SEQ2SEQ), tmp_path / "mqa"
    assert run(["convert", str(source), str(converted), "--to", "mqa"]) == 0
    found = quick(converted, source, text, stride=stride)
    ids = AutoTokenizer.from_pretrained(source)(Path(str(text[0].files)).read_text(), return_tensors="pt").input_ids[0]
    ids = ids[:46]
    original = AutoModelForSeq2SeqLM.from_pretrained(source).eval()
    pooled = pool_model(AutoModelForSeq2SeqLM.from_pretrained(source).eval(), 1)
    step = stride or 16
    nats, apart, alike, count = [0.0, 0.0], 0.0, 0, 0
    for first in range(32 - step, 46, step):
        end = min(first + step, 46)
        logs = [continued(model, ids, first - (32 - step), first, end) for model in (pooled, original)]
        for number, each in enumerate(logs):
            nats[number] += float(functional.nll_loss(each, ids[first:end], reduction="sum"))
        apart += float(functional.kl_div(logs[0], logs[1], log_target=True, reduction="sum"))
        alike += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
        count += end - first
    assert found.tokens == count == 46 - (32 - step)
    assert found.baseline is not None
    assert found.model.perplexity == pytest.approx(math.exp(nats[0] / count), rel=1e-5)
    assert found.baseline.perplexity == pytest.approx(math.exp(nats[1] / count), rel=1e-5)
    assert found.kl == pytest.approx(apart / count, rel=1e-4)
    assert found.top1_agreement == pytest.approx(alike / count)


@given(length=st.integers(2, 300), context=st.integers(2, 64), share=st.floats(0.01, 0.99))
def test_each_token_is_written_once_after_as_many_as_the_encoder_always_reads(
    length: int, context: int, share: float
) -> None:
    context = min(context, length)
    stride = min(max(1, int(context * share)), context - 1)
    before = min(context - stride, length // 2)
    scored: list[int] = []
    for begin, end, first in windows(length, context, stride, before):
        assert first - begin >= before >= 1
        assert end - begin <= context
        scored += range(first, end)
    assert scored == list(range(before, length))


def test_cache_bytes_are_given_per_side_and_halve_with_the_heads(converted: Path, text: list[Files]) -> None:
    found = quick(converted, converted.parent / "source", text)
    assert found.baseline is not None
    per_token = 2 * 2 * (2 * 16) * 4  # layers × (self + cross) × (key + value) × bytes, a head
    assert (found.model.cache_bytes_per_token, found.model.cross_bytes_per_token) == (per_token, per_token // 2)
    assert found.baseline.cache_bytes_per_token == 4 * per_token
    assert found.baseline.cross_bytes_per_token == 2 * per_token


def test_the_command_says_how_a_text_is_read(
    converted: Path, text: list[Files], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(converted), "--baseline", str(converted.parent / "source"), f"--text={text[0].files}"]
    assert run([*arguments, "--context=32", "--tokens=60", "--no-speed"]) == 0
    printed = capsys.readouterr()
    shown = " ".join((printed.out + printed.err).split())
    assert "Of each window the encoder reads 16 tokens, and the decoder writes what follows, teacher-forced." in shown
    assert "seq2seq loss, nats" in shown and "of it cross-attention" in shown
    assert json.loads((converted / "eval.json").read_text())["model"]["cross_bytes_per_token"] > 0


def test_speed_is_of_reading_a_source_and_writing_after_it(converted: Path, text: list[Files]) -> None:
    found = quick(converted, None, text, repeats=1, speed_context=8, decode_tokens=3).model
    assert found.prefill_tokens_per_second and found.decode_tokens_per_second


def test_a_text_shorter_than_the_context_is_halved(converted: Path, tmp_path: Path) -> None:
    short = Files(files=str(corpus(tmp_path / "short.txt", 1)))
    long = Files(files=str(corpus(tmp_path / "long.txt", 30)))
    row = quick(converted, None, [short, long], context=64, stride=4).rows[0]
    length = len(AutoTokenizer.from_pretrained(converted)((tmp_path / "short.txt").read_text()).input_ids)
    assert (row.windows, row.tokens) == (1, length - length // 2)


def test_comparisons_that_mean_nothing_are_refused(converted: Path, text: list[Files], tmp_path: Path) -> None:
    decoder = checkpoint(tmp_path / "decoder", "gpt2")
    with pytest.raises(UsageError, match="Only one of"):
        quick(converted, decoder, text)
    with pytest.raises(UsageError, match=r"stride .*32"):
        quick(converted, None, text, stride=32)


def test_a_model_of_sound_is_refused_in_a_sentence(text: list[Files], tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "whisper", "whisper", suppress_tokens=None)
    with pytest.raises(UsageError, match="input_features"):
        quick(source, None, text)
