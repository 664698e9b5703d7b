"""Heads in disguise look unlike as stored and the same once aligned; the figures are the definition's."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.conftest import tiny_config, tiny_model
from tests.gauge import interleave_heads, scatter_heads
from uptrain.checkpoint.events import Events
from uptrain.cli.app import run
from uptrain.conversion.request import Request
from uptrain.conversion.run import layers
from uptrain.conversion.run.convert import convert
from uptrain.conversion.run.options import RunOptions
from uptrain.errors import UsageError
from uptrain.methods import energy_numpy


def recorded(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "uptrain.json").read_text())["stages"][-1]["head_similarity"]
    return found


def energies(stack: Any) -> Any:
    return np.square(np.linalg.svd(stack, compute_uv=False))


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi", "gptj", "bloom"])
def test_one_head_in_disguise_is_the_same_once_aligned(family: str, tmp_path: Path) -> None:
    """Free keys, rotated, partly rotated and interleaved ones: what each may be changed by is undone, and no more."""
    for name, model in (("plain", tiny_model(tiny_config(family))), ("one", tiny_model(tiny_config(family)))):
        (scatter_heads(model, 2) if name == "one" else model).save_pretrained(tmp_path / name)
        convert(
            str(tmp_path / name), tmp_path / f"{name}-gqa2", Request("gqa", 2, "svd"), options=RunOptions(diagnose=True)
        )
    for layer in recorded(tmp_path / "one-gqa2").values():
        for side in ("keys", "values"):
            assert layer["stored"][side] < 0.99
            assert layer["aligned"][side] == 1
    for layer in recorded(tmp_path / "plain-gqa2").values():
        for side in ("keys", "values"):
            assert layer["stored"][side] <= layer["aligned"][side] < 0.9


def test_figures_are_the_definition_s(tmp_path: Path) -> None:
    """Singular values of two heads stacked; for rotated keys, of each frequency's two complex rows."""
    tiny_model(tiny_config("llama", 4, attention_bias=False)).save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "mqa", Request("mqa"), options=RunOptions(diagnose=True))
    weights = {name: each.double().numpy() for name, each in load_file(tmp_path / "source/model.safetensors").items()}
    for layer, found in recorded(tmp_path / "mqa").items():
        keys, values = (
            weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"].reshape(4, 12, 48) for part in "kv"
        )
        complex_keys = keys[:, :6] + 1j * keys[:, 6:]
        pairs = list(combinations(range(4), 2))
        for side, heads in (("keys", keys), ("values", values)):
            expected = [
                np.square(heads[a] + heads[b]).sum() / 2 / (np.square(heads[a]) + np.square(heads[b])).sum()
                for a, b in pairs
            ]
            assert found["stored"][side] == pytest.approx(np.mean(expected), abs=1e-4)
        # Descending singular values: 12 of 24, and the larger of each frequency's two.
        free = [energies(np.concatenate([values[a], values[b]])) for a, b in pairs]
        assert found["aligned"]["values"] == pytest.approx(np.mean([e[:12].sum() / e.sum() for e in free]), abs=1e-4)
        turned = [energies(complex_keys[[a, b]].swapaxes(0, 1)) for a, b in pairs]
        assert found["aligned"]["keys"] == pytest.approx(np.mean([e[:, 0].sum() / e.sum() for e in turned]), abs=1e-4)


def test_what_is_compared_are_the_heads_that_come_to_share(tmp_path: Path) -> None:
    """Heads 0 and 2, and 1 and 3, are alike: neighbours are not, and grouped by likeness they are."""
    model = scatter_heads(tiny_model(tiny_config("gpt2")), 2)
    interleave_heads(model)
    model.save_pretrained(tmp_path / "source")
    found = {}
    for grouping in ("contiguous", "similar"):
        convert(
            str(tmp_path / "source"),
            tmp_path / grouping,
            Request("gqa", 2, "svd", grouping=grouping),
            options=RunOptions(diagnose=True),
        )
        found[grouping] = recorded(tmp_path / grouping)["0"]["aligned"]["values"]
    assert found["similar"] == 1 > found["contiguous"] + 0.05


def test_keys_that_are_normed_are_not_aligned(tmp_path: Path) -> None:
    tiny_model(tiny_config("qwen3")).save_pretrained(tmp_path / "source")
    assert run(["convert", str(tmp_path / "source"), str(tmp_path / "mqa"), "--to", "mqa", "--diagnose"]) == 0
    assert [set(layer) for layer in recorded(tmp_path / "mqa").values()] == [{"stored"}] * 2


def test_a_conversion_measures_only_what_it_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing spends a few multiplications per byte on telling what is lost, and none on comparing heads."""
    tiny_model(tiny_config("llama", 4)).save_pretrained(tmp_path / "source")
    every = convert(str(tmp_path / "source"), tmp_path / "every", Request("gqa", 2), options=RunOptions(diagnose=True))
    assert list(every.energy) == [0, 1] and list(recorded(tmp_path / "every")) == ["0", "1"]
    one = convert(str(tmp_path / "source"), tmp_path / "one", Request("gqa", 2))
    assert one.energy == {1: every.energy[1]} and recorded(tmp_path / "one") == {}
    each = energy_numpy.cost(2, 12, 48)
    for groups, budget in ((1, 1.5 * each), (0, 0.5 * each)):
        monkeypatch.setattr(layers, "DIAGNOSED_PER_BYTE", 0.0)
        monkeypatch.setattr(layers, "DIAGNOSED_AT_LEAST", budget)
        rows = []
        monkeypatch.setattr(energy_numpy, "explained_by_factor", lambda run, count: rows.append(run) or 0.5)  # noqa: B023
        found = convert(str(tmp_path / "source"), tmp_path / f"part-{groups}", Request("gqa", 2))
        assert len(rows) == groups and len(found.energy) == groups
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "every/model.safetensors").read_bytes()


def test_a_latent_has_no_heads_to_compare(tmp_path: Path) -> None:
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path / "source")
    with pytest.raises(UsageError, match="--diagnose"):
        convert(
            str(tmp_path / "source"),
            tmp_path / "mla",
            Request("mla", kv_lora_rank=8),
            options=RunOptions(diagnose=True),
        )
    assert not (tmp_path / "mla").exists() and not (tmp_path / "mla.partial").exists()


def test_what_was_compared_before_a_cut_stays(tmp_path: Path) -> None:
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path / "source")
    request = Request("mqa", method="svd", max_shard_size=20_000)
    convert(str(tmp_path / "source"), tmp_path / "whole", request, options=RunOptions(diagnose=True))

    class Cut(Exception):
        pass

    def cut(count: int) -> None:
        if len(list((tmp_path / "cut.partial").glob("*.safetensors"))) > 1:
            raise Cut

    with pytest.raises(Cut):
        convert(
            str(tmp_path / "source"),
            tmp_path / "cut",
            request,
            options=RunOptions(diagnose=True),
            events=Events(bytes=cut),
        )
    assert convert(str(tmp_path / "source"), tmp_path / "cut", request, options=RunOptions(diagnose=True)).resumed
    assert recorded(tmp_path / "cut") == recorded(tmp_path / "whole")
