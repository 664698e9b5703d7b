"""Heads that share everything look the same, heads that share nothing don't, and spectra are the singular values."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from uptrain.cli.app import run
from uptrain.methods import energy_numpy

Save = Callable[..., Path]
DIMS, HIDDEN = 8, 40


def one(pair: energy_numpy.Floats) -> float:
    return energy_numpy.explained_by_factor(pair, 1)


def phases(pair: energy_numpy.Floats) -> float:
    return energy_numpy.explained_by_phases(pair, 1, False, DIMS)


@pytest.fixture
def head() -> energy_numpy.Floats:
    return np.random.default_rng(0).standard_normal((DIMS, HIDDEN), dtype=np.float32)


def test_a_change_of_basis_is_no_difference_and_nothing_in_common_is_a_half(head: energy_numpy.Floats) -> None:
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((HIDDEN, HIDDEN)))[0].astype(np.float32)
    turned = np.linalg.qr(np.random.default_rng(2).standard_normal((DIMS, DIMS)))[0].astype(np.float32) @ head
    apart = np.stack([basis[:DIMS], basis[DIMS : 2 * DIMS]])
    same = energy_numpy.pair_similarity(np.stack([head, turned, head * 2]), one)
    assert same == pytest.approx(np.ones((3, 3)), abs=1e-5)
    assert energy_numpy.pair_similarity(apart, one) == pytest.approx(np.array([[1, 0.5], [0.5, 1]]), abs=1e-5)


def test_rotated_keys_may_differ_by_a_phase_a_frequency_and_no_more(head: energy_numpy.Floats) -> None:
    angles = np.random.default_rng(1).uniform(0, 6, DIMS // 2)[:, None].astype(np.float32)
    real, imaginary = head[: DIMS // 2], head[DIMS // 2 :]
    turned = np.concatenate(
        [np.cos(angles) * real - np.sin(angles) * imaginary, np.sin(angles) * real + np.cos(angles) * imaginary]
    )
    assert energy_numpy.pair_similarity(np.stack([head, turned]), phases) == pytest.approx(np.ones((2, 2)), abs=1e-5)
    mixed = np.roll(head, 1, axis=0)
    assert energy_numpy.pair_similarity(np.stack([head, mixed]), phases)[0, 1] < 0.9
    assert energy_numpy.pair_similarity(np.stack([head, mixed]), one)[0, 1] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("heads", [3, 9])
def test_spectra_are_the_stack_s_singular_values(heads: int) -> None:
    rows = np.random.default_rng(heads).standard_normal((heads, DIMS, HIDDEN), dtype=np.float32)
    expected = np.linalg.svd(rows.reshape(-1, HIDDEN).astype(np.float64), compute_uv=False)
    assert energy_numpy.spectrum(rows) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_inspect_draws_a_picture(
    family: str, save_tiny: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny(family)
    assert run(["inspect", str(source), "--plot", str(tmp_path / "heads.png")]) == 0
    assert "0, 1" in capsys.readouterr().err
    with Image.open(tmp_path / "heads.png") as picture:
        assert picture.width > 1000 and len({*picture.convert("RGB").get_flattened_data()}) > 50


def test_what_cannot_be_drawn_is_refused(save_tiny: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny("llama")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][0, 0] = torch.nan
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    assert run(["inspect", str(source), "--plot", str(tmp_path / "heads.png")]) == 1
    assert "Layer 1" in capsys.readouterr().err.replace("\n", " ")
    assert run(["inspect", str(source), "--plot", str(tmp_path / "no/heads.png")]) == 2
    assert not (tmp_path / "heads.png").exists()


@pytest.mark.slow
def test_neither_inspect_nor_its_picture_loads_torch(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama")
    for options in ([], ["--plot", str(tmp_path / "heads.png")]):
        code = (
            "import sys; from uptrain.cli.app import run;"
            f"assert run(['inspect', {str(source)!r}, *{options!r}]) == 0; assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
