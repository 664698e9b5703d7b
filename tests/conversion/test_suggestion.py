"""What is suggested can be made, fits the budget, and keeps what the conversion then says it kept."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from uptrain.cli.app import run
from uptrain.conversion.suggestion import sample, suggest
from uptrain.errors import UsageError

Save = Callable[..., Path]


@pytest.mark.parametrize(("family", "changes"), [("gpt2", {}), ("llama", {"attention_bias": False, "head_dim": 16})])
def test_each_keeps_what_its_conversion_records(
    family: str, changes: dict[str, object], save_tiny: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny(family, **changes)
    before = 2 * 2 * 4 * (16 if changes else 12) * 4
    found = suggest(str(source), 0.5)
    assert {each.target for each in found} == {"gqa", "mqa", "mla"}
    caches = [each.cache_bytes_per_token for each in found]
    assert caches == sorted(caches) and caches[-1] <= before / 2
    for number, each in enumerate(found):
        assert each.cache == pytest.approx(each.cache_bytes_per_token / before)
        out = tmp_path / str(number)
        assert run(["convert", str(source), str(out), *shlex.split(each.options)]) == 0
        stage = json.loads((out / "uptrain.json").read_text())["stages"][-1]
        assert stage["cache_bytes_per_token"]["after"] == each.cache_bytes_per_token
        kept = [layer["svd"] for layer in stage["energy_kept"].values()]
        assert each.keys == pytest.approx(sum(share["keys"] for share in kept) / len(kept))
        assert each.values == pytest.approx(sum(share["values"] for share in kept) / len(kept))


def test_a_model_that_can_only_be_pooled_is_pooled(save_tiny: Save) -> None:
    source = save_tiny("olmo")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "clip_qkv": 8.0}))
    found = suggest(str(source), 0.5)
    assert [(each.options, each.method) for each in found] == [
        ("--to mqa --method mean", "mean"), ("--to gqa --groups 2 --method mean", "mean"),
    ]  # fmt: skip
    # Four heads of random weights: a mean of n keeps about 1/n.
    assert found[0].values == pytest.approx(1 / 4, abs=0.1)
    assert found[1].values == pytest.approx(1 / 2, abs=0.1)


def test_normed_keys_are_averaged_where_values_are_factored(save_tiny: Save) -> None:
    found = suggest(str(save_tiny("qwen3")), 0.5)
    assert [each.method for each in found] == ["svd", "svd"]
    for each, mean in zip(found, (1 / 4, 1 / 2), strict=True):
        assert each.keys == pytest.approx(mean, abs=0.1)
        assert each.values > each.keys


def test_a_budget_that_nothing_meets_is_one_sentence(save_tiny: Save, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny("qwen3")
    assert run(["inspect", str(source), "--suggest", "10%"]) == 2
    assert "10%" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(UsageError, match="not a share of the cache"):
        suggest(str(source), 1.5)


def test_inspect_prints_them_beside_the_inspection(save_tiny: Save, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny("gpt2")
    assert run(["inspect", str(source), "--suggest", "50%", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_key_value_heads"] == 4
    assert [each["target"] for each in found["suggestions"]] == [each.target for each in suggest(str(source), 0.5)]


def test_the_first_and_the_last_layer_are_among_few() -> None:
    assert sample(3) == (0, 1, 2)
    assert sample(32) == (0, 10, 21, 31)
