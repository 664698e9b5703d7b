"""A card says what was done, what it saves, what was measured and how to load it, and never more than is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCardData

from tests.architectures.test_rope_parameters import rewrite
from tests.corpus import checkpoint
from tests.hub_push_server import front_matter, validated
from uptrain.checkpoint.reader import read_config
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import CheckpointError
from uptrain.evaluation import Evaluation
from uptrain.evaluation.needle import NeedleCell
from uptrain.evaluation.quality_row import QualityRow
from uptrain.evaluation.result import ModelMetrics
from uptrain.evaluation.speed import SpeedCell
from uptrain.evaluation.tasks import TaskMetric
from uptrain.models.saving import save
from uptrain.publishing.hub.card import build_card
from uptrain.publishing.hub.card_metrics import read_metrics
from uptrain.publishing.hub.licence import Licence, read_card
from uptrain.publishing.hub.subject import CardSubject

MIT = Licence("mit", "a test")
NOTHING: tuple[dict[str, Any], str] = ({}, "")


def subject(folder: Path, base: str | None = None, **changes: Any) -> CardSubject:
    stages = json.loads((folder / "uptrain.json").read_text())["stages"]
    return CardSubject("me/small", stages, read_config(folder), base, **changes)


def text_of(folder: Path, base: str | None = None, **changes: Any) -> str:
    return str(build_card(subject(folder, base, **changes), MIT, read_metrics(folder), NOTHING))


def evaluation(**changes: Any) -> Evaluation:
    ours = ModelMetrics(
        name="/home/me/small", perplexity=12.3456789, bits_per_byte=1.5, cache_bytes_per_token=2048,
        prefill_tokens_per_second=1000.0, decode_tokens_per_second=100.0,
    )  # fmt: skip
    theirs = ModelMetrics(
        name="/home/me/large", perplexity=11.25, bits_per_byte=1.4, cache_bytes_per_token=4096,
        prefill_tokens_per_second=990.0, decode_tokens_per_second=80.0,
    )  # fmt: skip
    values = {"kl": 0.0123, "top1_agreement": 0.9, "tokens": 4000, "context": 512, "stride": 256, "speed_context": 64,
              "speed_dtype": "float32"}  # fmt: skip
    return Evaluation(model=ours, baseline=theirs, **{**values, "dtype": "float32", "device": "cpu", **changes})


def test_the_hub_takes_every_card(tmp_path: Path) -> None:
    folder = convert("demo", tmp_path / "out", Request("gqa", 2)).out
    for figures in (None, evaluation()):
        if figures:
            (folder / "eval.json").write_text(json.dumps(figures.to_dict()))
        for licence in (MIT, Licence("other", "a test", "terms", "LICENSE")):
            card = build_card(subject(folder, "org/base"), licence, read_metrics(folder), NOTHING)
            assert validated(str(card)) == {"errors": [], "warnings": []}


def test_measurements_stand_in_the_table_and_in_the_metadata(tmp_path: Path) -> None:
    folder = convert("demo", tmp_path / "out", Request("gqa", 2)).out
    (folder / "eval.json").write_text(json.dumps(evaluation().to_dict()))
    text = text_of(folder)
    assert "| perplexity | 11.250 | 12.346 |" in text and "| top-1 agreement with the original | – | 90.0% |" in text
    (model,) = front_matter(text)["model-index"]
    (result,) = model["results"]
    found = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert found == {"perplexity": 12.3457, "bits_per_byte": 1.5, "kl_divergence": 0.0123, "top1_agreement": 0.9}
    assert "/home/me" not in text


def test_contexts_tasks_retrieval_and_speeds_are_told_where_they_were_measured(tmp_path: Path) -> None:
    folder = convert("demo", tmp_path / "out", Request("gqa", 2)).out
    rows = [
        QualityRow(
            text="a|b.txt", context=context, stride=context // 2, tokens=100, windows=3, perplexity=12.5,
            baseline_perplexity=10.0, bits_per_byte=1.5, kl=0.25, top1_agreement=0.5,
        )
        for context in (256, 512)
    ]  # fmt: skip
    speeds = [
        SpeedCell(
            batch=1, context=context, prefill_tokens_per_second=2000.0, prefill_range=(1900.0, 2100.0),
            decode_tokens_per_second=90.0, decode_range=(80.0, 99.0), baseline_prefill_tokens_per_second=1000.0,
            baseline_decode_tokens_per_second=60.0, baseline_decode_range=(50.0, 61.0), decode_ratio=1.5,
        )
        for context in (64, 512)
    ]  # fmt: skip
    tasks = [
        TaskMetric(
            task="piqa", metric="acc", filter="none", higher_is_better=True, samples=1838, value=0.6125, stderr=0.0114,
            baseline_value=0.6834, baseline_stderr=0.0109, difference_interval=(-0.09, -0.05),
        ),
        TaskMetric(
            task="gsm8k", metric="exact_match", filter="strict-match", higher_is_better=True, samples=10, value=0.25,
            stderr=None, baseline_value=0.5,
        ),
    ]  # fmt: skip
    cell = NeedleCell(
        length=512, depth=0.5, samples=10, exact_match=0.75, exact_match_interval=(0.5, 0.9), log_probability=-1.5,
        log_probability_interval=None, baseline_exact_match=1.0, baseline_exact_match_interval=(0.8, 1.0),
        baseline_log_probability=-0.25,
    )  # fmt: skip
    found = evaluation(rows=tuple(rows), speeds=tuple(speeds), tasks=tuple(tasks), needle=(cell,))
    (folder / "eval.json").write_text(json.dumps(found.to_dict()))
    text = text_of(folder)
    for line in (
        "| a\\|b.txt | 512 | 12.50 | 10.00 | 0.250 | 50.0% | – | – |",
        "| piqa | acc | 1,838 | 0.6834 ± 0.011 | 0.6125 ± 0.011 | -0.09 to -0.05 |",
        "| gsm8k | exact_match, strict-match | 10 | 0.5 | 0.25 | – |",
        "| 512 | 50% | 10 | 100% (80% to 100%) | -0.25 | 75% (50% to 90%) | -1.50 |",
        "| 1 | 64 | 1,000 | 2,000 (1,900 to 2,100) | 60 (50 to 61) | 90 (80 to 99) | 1.50 |",
    ):
        assert line in text
    assert validated(text) == {"errors": [], "warnings": []}
    loaded = ModelCardData(**front_matter(text))
    scores = {
        (each.dataset_type, each.dataset_name, each.metric_type, each.metric_name): each.metric_value
        for each in loaded.eval_results or [] if each.dataset_type != "text"
    }  # fmt: skip
    assert scores == {
        ("piqa", "piqa", "acc", "acc"): 0.6125,
        ("gsm8k", "gsm8k", "exact_match", "exact_match, strict-match"): 0.25,
    }
    assert {each.task_type for each in loaded.eval_results or []} == {"text-generation"}
    (folder / "eval.json").write_text(json.dumps(evaluation().to_dict()))
    assert "###" not in text_of(folder), "a heading over nothing"


@pytest.mark.parametrize(
    "found",
    [
        {}, {"model": None}, {"model": {"perplexity": "12"}}, {"model": [1]}, {"kl": True},
        {"model": {"perplexity": float("nan")}, "kl": float("inf")},
    ],
)  # fmt: skip
def test_an_evaluation_without_usable_figures_is_none(tmp_path: Path, found: dict[str, Any]) -> None:
    (tmp_path / "eval.json").write_text(json.dumps(found))
    assert read_metrics(tmp_path) is None


def test_later_schemas_are_read_as_far_as_they_agree(tmp_path: Path) -> None:
    found = {"schema": 7, "texts": ["/data/wiki.txt", "code.txt"], "model": {"perplexity": 3, "tasks": {"arc": 0.5}}}
    (tmp_path / "eval.json").write_text(json.dumps({**found, "kl": {"mean": 1}}))
    figures = read_metrics(tmp_path)
    assert figures is not None
    assert [(row.name, row.value) for row in figures.rows] == [("perplexity", 3.0)]
    assert figures.text == "wiki.txt, code.txt"
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"eval\.json"):
        read_metrics(tmp_path)


def test_the_cache_is_that_of_the_whole_way_from_the_public_model(tmp_path: Path) -> None:
    half = convert("demo", tmp_path / "half", Request("gqa", 4)).out
    text = text_of(convert(str(half), tmp_path / "one", Request("mqa")).out)
    assert "| cache, bytes per token | 4,096 | 512 (12.5%) |" in text
    assert "| key/value heads | 8 | 1 for 8 query heads |" in text
    # Conversions into another dtype compare like with like, and training may store in another one again.
    wide = convert(str(half), tmp_path / "wide", Request("mqa", dtype="float32")).out
    assert "| cache, bytes per token | 8,192 | 1,024 (12.5%) |" in text_of(wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    assert "| cache, bytes per token | 4,096 | 512 (12.5%) |" in text_of(wide)


@pytest.mark.parametrize(
    ("family", "request_", "remote", "served"),
    [
        ("llama", Request("mqa"), False, True),
        ("gpt2", Request("mqa"), False, True),
        ("gpt2", Request("gqa", 2), True, True),
        ("llama", Request("mla", kv_lora_rank=16, qk_rope_head_dim=4), False, True),
        ("llama", Request("mla", kv_lora_rank=16, qk_rope_head_dim=4, rope="longrope"), False, False),
        ("gpt2", Request("mla", kv_lora_rank=16), True, False),
        ("bloom", Request("gqa", 2), True, False),
        ("mpt", Request("mqa"), True, False),
        ("gpt_neo", Request("gqa", 2), True, False),
        ("gpt_neo", Request("gqa", 4), False, False),
        ("t5", Request("gqa", 2), True, False),
        ("opt", Request("gqa", 2), True, True),
    ],
)
def test_how_to_load_it_follows_from_its_class(
    tmp_path: Path, family: str, request_: Request, remote: bool, served: bool
) -> None:
    source = checkpoint(tmp_path / "source", family, **({"attention_bias": False} if family == "llama" else {}))
    folder = convert(str(source), tmp_path / "out", request_).out
    text = text_of(folder, "org/base", revision="v1")
    assert ("trust_remote_code=True" in text) is remote is any(folder.glob("*.py"))
    assert ("No remote code" in text) is not remote
    assert ("vllm serve me/small --revision v1" in text) is served is ("transformers only" not in text)
    assert text.count("trust_remote_code=False") == (2 if remote else 0)
    assert ("a latent of 16 values" in text) is (request_.target == "mla")
    assert str(tmp_path) not in text, "a path of this machine went public"


SCALED = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rotary_emb_base": 100, "rotary_pct": 0.5}


@pytest.mark.parametrize(
    ("family", "said", "wants", "both"),
    [
        ("llama", None, True, False),  # as transformers 5 saves it
        ("llama", {"rope_theta": 100.0}, False, False),  # as transformers 4 does
        ("gpt2", None, False, False),
        ("gpt_neox", None, False, True),
        ("gpt_neox+no_use_parallel_residual", None, False, True),
        ("gpt_neox+no_use_parallel_residual", SCALED, True, False),
        ("opt", None, True, False),
    ],
)
def test_a_card_says_which_transformers_rotates_as_it_should(
    save_tiny: Callable[..., Path], tmp_path: Path, family: str, said: dict[str, Any] | None, wants: bool, both: bool
) -> None:
    source = save_tiny(family)
    if said:
        rewrite(source, **said)
    text = text_of(convert(str(source), tmp_path / "out", Request("mqa")).out, "org/base")
    assert ("needs transformers 5" in text) is wants
    assert ("the words of transformers 4 too" in text) is both


def test_training_is_told_with_its_recipe(tmp_path: Path) -> None:
    folder = convert("demo", tmp_path / "out", Request("mqa")).out
    manifest = json.loads((folder / "uptrain.json").read_text())
    recipe = {"model": "/home/me/out", "output": "/home/me/up", "data": [{"files": "a.txt"}], "learning_rate": 3e-4}
    stage = {"stage": "train", "recipe": recipe, "source": "/home/me/out", "revision": None, "steps": 10,
             "tokens": 5120, "held_out_loss": 2.5, "num_processes": 1, "versions": {"torch": "9.9"}}  # fmt: skip
    (folder / "uptrain.json").write_text(json.dumps({**manifest, "stages": [*manifest["stages"], stage]}))
    text = text_of(folder)
    assert "**Trained** for 10 steps on 5,120 tokens, learning rate 0.0003; loss 2.5000 nats" in text
    block = text.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(block) == {**recipe, "model": "./small-step1", "output": "small"}
    assert "torch 9.9" in text and "/home/me" not in text


def test_an_author_s_metadata_wins_but_for_the_licence_that_was_asked_for(tmp_path: Path) -> None:
    folder = convert("demo", tmp_path / "out", Request("mqa")).out
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags: [x]\nextra: 1\n---\nHello.\n")
    card = front_matter(str(build_card(subject(folder), MIT, None, read_card(folder))))
    assert card == {
        "license": "mit", "tags": ["x"], "extra": 1, "library_name": "transformers", "pipeline_tag": "text-generation",
    }  # fmt: skip


def test_measurements_of_the_weights_before_do_not_travel(tmp_path: Path) -> None:
    """Neither by conversion nor by training: the new weights have not been measured."""
    import torch

    from uptrain.checkpoint.source import resolve
    from uptrain.models import loading
    from uptrain.models.opened import open_model

    folder = checkpoint(tmp_path / "source", "llama")
    (folder / "eval.json").write_text(json.dumps(evaluation().to_dict()))
    source = resolve(str(folder))
    (tmp_path / "trained").mkdir()
    model = loading.load_model(open_model(source))
    save(model, loading.load_tokenizer(folder), tmp_path / "trained", torch.float32, source)
    convert(str(folder), tmp_path / "converted", Request("mqa"))
    for name in ("trained", "converted"):
        assert (tmp_path / name / "tokenizer.json").is_file() and not (tmp_path / name / "eval.json").exists()


def test_a_card_says_where_norms_and_mlps_differ_from_the_sources(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    convert("demo", folder, Request("gqa"))
    plain = subject(folder)
    stage = plain.stages[-1]
    layers = [{"changed": ["model.layers.0.mlp.up_proj.weight"]}, {}, {"changed": []}]
    repaired = CardSubject("me/small", [{**stage, "calibration": {"layers": layers}}], read_config(folder), None)
    said, without = (str(build_card(each, MIT, read_metrics(folder), NOTHING)) for each in (repaired, plain))
    assert "In 1 of 3 layers, norms and MLP differ" in said and "MLP differ" not in without
