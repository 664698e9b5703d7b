"""Every metric equals its definition, computed in the plainest way."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.corpus import checkpoint, corpus, tokenizer
from uptrain.architectures.attention import AttentionSpec, cache_bytes_per_token
from uptrain.checkpoint.events import Events
from uptrain.data.sources import Files
from uptrain.errors import UsageError
from uptrain.evaluation import Evaluation, EvaluationSettings, evaluate
from uptrain.evaluation.intervals import interval
from uptrain.evaluation.quality import windows
from uptrain.models.register import register


@pytest.fixture
def text(tmp_path: Path) -> list[Files]:
    return [Files(files=str(corpus(tmp_path / "text.txt", 60)))]


def token_ids(folder: Path, text: list[Files], count: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    return torch.tensor(words(Path(str(text[0].files)).read_text(), verbose=False)["input_ids"][:count])


def quick(
    model: Path, baseline: Path | None, text: list[Files], events: Events = Events(), **options: Any
) -> Evaluation:
    settings = EvaluationSettings(text=text, **{"repeats": 0, "context": 32, **options})
    return evaluate(str(model), settings, baseline=str(baseline) if baseline else None, events=events)


@pytest.mark.parametrize(("count", "stride"), [(300, 16), (300, 32), (301, 5), (20, 16)])
def test_perplexity_is_that_of_the_reference_algorithm(
    tmp_path: Path, text: list[Files], count: int, stride: int
) -> None:
    """Source: Hugging Face, "Perplexity of fixed-length models", whose labels of -100 are not scored."""
    folder = checkpoint(tmp_path / "model")
    found = quick(folder, None, text, tokens=count, stride=stride)
    ids = token_ids(folder, text, count)
    model = AutoModelForCausalLM.from_pretrained(folder)
    total, scored, previous = 0.0, 0, 0
    for begin in range(0, count, stride):
        end = min(begin + 32, count)
        labels = ids[begin:end].clone()
        labels[: -(end - previous)] = -100
        here = int((labels[1:] != -100).sum())
        with torch.no_grad():
            total += float(model(ids[None, begin:end], labels=labels[None]).loss) * here if here else 0.0
        scored, previous = scored + here, end
        if end == count:
            break
    assert found.tokens == scored
    assert found.model.perplexity == pytest.approx(math.exp(total / scored), rel=1e-5)


@given(length=st.integers(2, 300), context=st.integers(2, 64), share=st.floats(0.01, 1))
def test_windows_score_each_token_once_with_the_promised_context(length: int, context: int, share: float) -> None:
    context = min(context, length)
    stride = max(1, int(context * share))
    scored: list[int] = []
    for begin, end, first in windows(length, context, stride):
        assert end - begin <= context
        scored += range(first, end)
        assert begin == 0 or first - begin >= max(1, context - stride)
    # Block perplexity never scores a block's first token, for which nothing is shown.
    unscored = {0} | (set(range(0, length, stride)) if stride == context else set())
    assert scored == [token for token in range(length) if token not in unscored]


@torch.no_grad()
def test_divergence_and_agreement_are_torchs(tmp_path: Path, text: list[Files]) -> None:
    baseline = checkpoint(tmp_path / "baseline")
    changed = shutil.copytree(baseline, tmp_path / "changed")
    noisy = {n: t + 0.05 * torch.randn_like(t) for n, t in load_file(baseline / "model.safetensors").items()}
    save_file(noisy, changed / "model.safetensors", {"format": "pt"})
    found = quick(changed, baseline, text, tokens=32, stride=32)
    ids = token_ids(baseline, text, 32)
    p, q = (AutoModelForCausalLM.from_pretrained(f)(ids[None]).logits[0, :-1] for f in (baseline, changed))
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(float(kl), rel=1e-4)
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert found.baseline is not None
    assert found.baseline.perplexity == quick(baseline, None, text, tokens=32, stride=32).model.perplexity


@torch.no_grad()
def test_the_first_five_and_flips_are_counted_as_defined(tmp_path: Path, text: list[Files]) -> None:
    """Source: Dutta et al. 2024, section 3: a flip is an answer that turns from right to wrong, or back."""
    baseline = checkpoint(tmp_path / "baseline")
    changed = shutil.copytree(baseline, tmp_path / "changed")
    for folder, scale in ((baseline, 1.5), (changed, 1.0)):
        noisy = {n: t + scale * torch.randn_like(t) for n, t in load_file(folder / "model.safetensors").items()}
        save_file(noisy, folder / "model.safetensors", {"format": "pt"})
    found = quick(changed, baseline, text, tokens=400, stride=32)
    ids = token_ids(baseline, text, 400)
    p, q = (AutoModelForCausalLM.from_pretrained(f) for f in (baseline, changed))
    shared, flips, count = 0, 0, 0
    for start in range(0, 400, 32):
        block = ids[start : start + 32]
        for first, second, target in zip(p(block[None]).logits[0], q(block[None]).logits[0], block[1:], strict=False):
            order = [sorted(range(len(row)), key=row.tolist().__getitem__)[::-1] for row in (first, second)]
            shared += len({*order[0][:5]} & {*order[1][:5]})
            flips += (order[0][0] == int(target)) is not (order[1][0] == int(target))
            count += 1
    assert found.tokens == count
    assert found.top5_agreement == pytest.approx(shared / 5 / count)
    assert flips > 0
    assert found.flip_rate == pytest.approx(flips / count)


def test_each_text_and_context_is_a_row_as_if_measured_alone(tmp_path: Path, text: list[Files]) -> None:
    folder = checkpoint(tmp_path / "model")
    other = shutil.copytree(folder, tmp_path / "other")
    zero = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(zero, other / "model.safetensors", {"format": "pt"})
    both = [*text, Files(files=str(corpus(tmp_path / "more.txt", 20, seed=3)))]
    found = quick(other, folder, both, tokens=200, context=[16, 64])
    assert [(Path(row.text).name, row.context) for row in found.rows] == [
        (name, context) for context in (16, 64) for name in ("text.txt", "more.txt", "all")
    ]
    for row in (row for row in found.rows if row.text != "all"):
        (alone,) = quick(other, folder, [Files(files=row.text)], tokens=200, context=row.context).rows
        assert alone == row
    first, second, all_ = found.rows[3:]
    for metric in ("kl", "top1_agreement", "top5_agreement", "flip_rate"):
        total = sum(getattr(row, metric) * row.tokens for row in (first, second))
        assert getattr(all_, metric) == pytest.approx(total / all_.tokens)
    assert all_.perplexity == pytest.approx(300, rel=1e-4)
    assert all_.perplexity_ratio_interval is not None and all_.perplexity_ratio is not None
    assert all_.perplexity_ratio_interval[0] < all_.perplexity_ratio < all_.perplexity_ratio_interval[1]
    assert (found.kl, found.context, found.tokens) == (all_.kl, 64, all_.tokens)


def test_contexts_score_the_same_tokens_and_give_intervals_of_log_perplexity(tmp_path: Path, text: list[Files]) -> None:
    folder = checkpoint(tmp_path / "model")
    found = quick(folder, folder, text, tokens=200, context=[16, 32, 64])
    assert [row.tokens for row in found.rows] == [199] * 3
    ids = token_ids(folder, text, 200)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for row in found.rows:
        sums, counts = [], []
        for begin, end, first in windows(200, row.context, row.stride):
            with torch.no_grad():
                logs = model(ids[None, begin:end]).logits[0].log_softmax(-1)
            sums.append(-sum(float(logs[at - 1 - begin, ids[at]]) for at in range(first, end)))
            counts.append(end - first)
        low, high = interval(sums, counts) or (0, 0)
        expected = pytest.approx((math.exp(low), math.exp(high)), rel=1e-4)
        assert row.perplexity_interval == row.baseline_perplexity_interval == expected
        assert math.exp(low) < row.perplexity < math.exp(high)


def test_an_identical_model_diverges_by_exactly_nothing(tmp_path: Path, text: list[Files]) -> None:
    folder = checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    found = quick(folder, folder, text, tokens=200)
    assert (found.kl, found.top1_agreement) == (0.0, 1.0)


def test_a_model_that_knows_nothing_has_its_vocabulary_as_perplexity(tmp_path: Path, text: list[Files]) -> None:
    folder = checkpoint(tmp_path / "model")
    zero = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(zero, folder / "model.safetensors", {"format": "pt"})
    found = quick(folder, None, text, tokens=200).model
    ids = token_ids(folder, text, 200)
    vocabulary = len(tokenizer())
    assert found.perplexity == pytest.approx(vocabulary, rel=1e-5)
    size = len(tokenizer().decode(ids).encode())
    assert found.bits_per_byte == pytest.approx(math.log2(vocabulary) * 200 / size, rel=1e-5)


@pytest.mark.parametrize(
    ("model_type", "groups", "head_dim"), [("gpt2", 4, 12), ("llama", 2, 12), ("gemma", 1, 16), ("uptrain_gpt2", 2, 12)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cache_really_holds_what_the_arithmetic_says(
    tmp_path: Path, text: list[Files], model_type: str, groups: int, head_dim: int, dtype: torch.dtype
) -> None:
    register()
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    changes: dict[str, Any] = {} if model_type == "gpt2" else {"num_key_value_heads": groups}
    if model_type == "uptrain_gpt2":
        changes.update(sizes)
    folder = checkpoint(tmp_path / "model", model_type, dtype, **changes)
    layers = [AttentionSpec(4, groups, head_dim)] * 2
    expected = cache_bytes_per_token(layers, dtype.itemsize)
    assert quick(folder, None, text, tokens=64).model.cache_bytes_per_token == expected


def test_speed_is_measured_for_both_or_left_out(tmp_path: Path, text: list[Files]) -> None:
    folder = checkpoint(tmp_path / "model")
    notes: list[str] = []
    timed: dict[str, Any] = {"tokens": 64, "repeats": 2, "decode_tokens": 4}
    found = quick(folder, folder, text, **timed, events=Events(note=notes.append))
    assert found.speed_context == 64 - 4 - 1
    assert any("--speed-context" in note and "64 positions" in note for note in notes)
    with pytest.raises(UsageError, match="--speed-context"):
        quick(folder, folder, text, **timed, speed_context=64 - 4)
    for measured in (found.model, found.baseline):
        assert measured is not None
        assert measured.decode_tokens_per_second is not None
        assert measured.decode_tokens_per_second > 0
    assert quick(folder, None, text, tokens=64).model.decode_tokens_per_second is None


@pytest.mark.parametrize(("model_type", "longest"), [("mpt", 64), ("gptj", 64), ("bloom", 300)])
def test_no_window_is_longer_than_the_positions_a_family_counts_in_its_own_word(
    tmp_path: Path, text: list[Files], model_type: str, longest: int
) -> None:
    """MPT's class fails beyond max_seq_len; BLOOM's counts no positions, so all 300 tokens are one window."""
    folder = checkpoint(tmp_path / "model", model_type)
    notes: list[str] = []
    found = quick(folder, None, text, Events(note=notes.append), tokens=300, context=None, repeats=1, decode_tokens=2)
    assert found.context == longest
    assert found.speed_context == (61 if longest == 64 else 512)
    assert bool(notes) == (longest == 64)
    if notes:
        with pytest.raises(UsageError, match="64"):
            quick(folder, None, text, tokens=300, context=65)


def test_comparisons_that_mean_nothing_are_refused(tmp_path: Path, text: list[Files]) -> None:
    one = checkpoint(tmp_path / "one")
    other = checkpoint(tmp_path / "other")
    tokenizer(270).save_pretrained(other)
    with pytest.raises(UsageError, match="different tokenizers"):
        quick(one, other, text)
    larger = checkpoint(tmp_path / "larger", vocab_size=320)
    with pytest.raises(UsageError, match="vocabularies of different sizes: 300 and 320"):
        quick(one, larger, text, tokens=64)
    with pytest.raises(UsageError, match=r"stride .*40.*32"):
        quick(one, None, text, stride=40)
