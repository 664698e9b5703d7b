"""An option that can't have an effect is refused, and what a manifest records of a request had one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.small import save_small
from uptrain.checkpoint.manifest import read_manifest
from uptrain.cli.app import run
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.conversion.run.options import RunOptions
from uptrain.errors import UsageError
from uptrain.publishing.hub.card import build_card
from uptrain.publishing.hub.history import reproduction_commands
from uptrain.publishing.hub.licence import Licence
from uptrain.publishing.hub.subject import CardSubject

OLD = {
    "target": "gqa", "groups": None, "method": "mean", "seed": 0, "dtype": None, "max_shard_size": None,
    "grouping": "contiguous", "calibrate": "builtin", "calibration_tokens": 65_536, "repair_steps": None,
    "kv_lora_rank": None, "qk_rope_head_dim": None, "q_lora_rank": None, "cache": None, "rope": None, "engine": "any",
    "key_weight": None, "allow_nonfinite": False,
}  # fmt: skip
"""A request as the first version recorded it: with every default, whether it had an effect or not."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_small(tmp_path / "source")


@pytest.mark.parametrize(
    "words",
    [
        "--repair-steps 3", "--calibration-tokens 4096", "--calibration-tokens 65536", "--memory 4GiB", "--seed 0",
        "--method svd --seed 1", "--method svd --repair-steps 0", "--method first --memory 1GB",
        "--to mla --seed 4", "--to mla --calibration-tokens 100", "--to mla --repair-steps 0", "--kv-lora-rank 8",
        "--to mqa --cache 25%", "--to mqa --grouping similar", "--to gqa --groups 1 --grouping similar",
        "--to gqa --groups 4 --calibrate builtin", "--to gqa --groups 4 --method random --seed 1",
        "--to gqa --groups 4 --grouping similar", "--engine llama.cpp", "--method svd --repair blocks",
    ],
)  # fmt: skip
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["", "dry"])
def test_what_a_conversion_makes_no_use_of_is_refused(
    words: str, dry: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = words.split()
    assert run(["convert", str(source), str(tmp_path / "out"), *options, *dry]) == 2
    assert options[-2] in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "words",
    [
        "--task-limit 3", "--include-path .", "--needle-trials 10", "--needle-depths 50", "--needle-lengths 64",
        "--sample-tokens 48", "--no-speed --speed-context 512", "--no-speed --speed-batch 1",
    ],
)  # fmt: skip
def test_what_an_evaluation_makes_no_use_of_is_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "demo", *words.split()]) == 2
    assert words.split()[-2] in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--calibrate builtin", "--calibration-tokens 9", "--repair-steps 1"])
def test_a_sweep_without_calibration_takes_no_word_about_it(
    option: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["sweep", str(source), "--to", "mqa", "--methods", "mean,svd", "-o", str(out), *option.split()]) == 2
    assert option.split()[0] in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("command", [["inspect"], ["convert", "--dry-run"], ["convert"]])
def test_a_revision_is_for_the_hub(
    command: list[str], source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(source.parent)
    for model in ("demo", str(source)):
        assert run([*command, model, "--revision", "main"]) == 2
        assert "--revision" in capsys.readouterr().err
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_python_knows_what_was_given_too(source: Path, tmp_path: Path) -> None:
    for given in ({"seed": 0}, {"calibrate": "builtin"}, {"calibration_tokens": 65_536}, {"repair_steps": 0}):
        with pytest.raises(UsageError, match=next(iter(given)).replace("_", "-")):
            Request("mqa", **given)  # type: ignore[arg-type]
        Request("mqa", method="calibrated", **given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--memory"):
        convert(str(source), tmp_path / "out", Request("mqa"), options=RunOptions(memory=2**30))


@pytest.mark.parametrize("size", ["5", "5000000000", " 12 "])
def test_a_size_without_a_unit_is_asked_for_one(
    size: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(source), str(tmp_path / "out"), "--max-shard-size", size]) == 2
    assert "has no unit" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("request_", "recorded"),
    [
        (Request("gqa", 2), {"target": "gqa", "groups": 2, "method": "mean"}),
        (Request("gqa", 2, "random"), {"target": "gqa", "groups": 2, "method": "random", "seed": 0}),
        (Request("gqa", 4, dtype="float16"), {"target": "gqa", "groups": 4, "dtype": "float16"}),
        (Request("mqa", method="first", max_shard_size=700),
         {"target": "mqa", "method": "first", "max_shard_size": 700}),
    ],
)  # fmt: skip
def test_the_manifest_records_what_had_an_effect(
    request_: Request, recorded: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    convert(str(source), tmp_path / "out", request_)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and manifest["stages"][0]["request"] == recorded


def test_of_a_calibration_the_manifest_records_the_values_that_were_left_to_their_defaults() -> None:
    recorded = Request("mqa", method="calibrated").recorded()
    assert recorded == {
        "target": "mqa", "method": "calibrated", "calibrate": "builtin", "calibration_tokens": 65_536,
        "repair_steps": 40, "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "stored", [OLD, {**OLD, "method": "svd", "target": "mla"}, {**OLD, "target": "mqa", "max_shard_size": 4096}]
)
def test_the_commands_of_an_old_manifest_still_run(
    stored: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    where = {"source": {"name": "demo", "origin": "demo"}, "num_key_value_heads": {"before": 8, "after": 4}}
    (step,) = reproduction_commands([{"stage": "convert", "request": stored, **where}], "out")
    monkeypatch.chdir(tmp_path)
    assert run([*step.command.split()[1:], "--dry-run"]) == 0


def test_the_card_of_an_old_manifest_names_no_option_without_effect() -> None:
    config = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
    stage = {
        "stage": "convert", "source": {"name": "demo", "origin": "demo"}, "request": OLD, "num_attention_heads": 8,
        "num_key_value_heads": {"before": 8, "after": 4}, "cache_bytes_per_token": {"before": 8, "after": 4},
    }  # fmt: skip
    for request_, wanted in ((OLD, "averaged"), ({"target": "gqa", "groups": 8}, "as they were")):
        subject = CardSubject("me/out", [{**stage, "request": request_}], config, None)
        card = str(build_card(subject, Licence("mit", "the card"), None, ({}, "")))
        assert wanted in card
        assert not any(word in card for word in ("seed", "calibrat", "65536", "contiguous", "engine"))


def test_an_equal_request_has_an_equal_digest_however_it_was_asked(source: Path, tmp_path: Path) -> None:
    digests = set()
    for number, request_ in enumerate((Request("gqa", 2, "random"), Request("gqa", 2, "random", seed=0))):
        convert(str(source), tmp_path / str(number), request_)
        digests.add(json.loads((tmp_path / str(number) / "uptrain.json").read_text())["stages"][0]["plan"])
        assert asdict(request_)["seed"] == (None, 0)[number]
    assert len(digests) == 1
