"""A method is one entry of the registry: a toy is listed, runs, and refuses what it can't do, by that alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from uptrain.checkpoint.reader import open_checkpoint
from uptrain.checkpoint.source import resolve
from uptrain.cli.app import run
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import UsageError
from uptrain.methods import METHODS
from uptrain.methods.method import Method
from uptrain.methods.registry import GROUPINGS, TARGETS, default_method

TOY = """
from uptrain.methods.method import Converted, Method
from uptrain.methods.registry import METHODS


def last(heads, groups):
    size = len(heads) // groups
    return heads[size - 1 :: size]


def convert(layer, groups, context):
    from uptrain.methods.pooling import pool_layer

    return Converted(pool_layer(layer, groups, last))


def pool_norm(weight, heads, groups):
    from uptrain.methods.pooling import pool_norm

    return pool_norm(weight, heads, groups, last)


METHODS["last"] = Method(
    name="last", summary="the last head of each group kept", changes=frozenset("kv"), convert=convert,
    pool_norm=pool_norm, pools=True,
)
"""


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Method:
    monkeypatch.setitem(METHODS, "last", METHODS["mean"])  # so that it is taken out afterwards
    exec(compile(TOY, "toy.py", "exec"), {})
    return METHODS["last"]


def key_rows(folder: Path, layer: int, heads: int) -> np.ndarray:
    """Return a GPT-2 layer's keys by head, (heads, hidden_size, head_dim), from its fused and transposed weight."""
    checkpoint = open_checkpoint(folder)
    name = next(name for name in checkpoint.tensors if name.endswith(f"h.{layer}.attn.c_attn.weight"))
    fused = checkpoint.read(name).astype(np.float32)
    hidden = len(fused)
    width = (fused.shape[1] - hidden) // 2
    return fused[:, hidden : hidden + width].reshape(hidden, heads, -1).transpose(1, 0, 2)


def test_a_toy_method_converts_the_demo(toy: Method, tmp_path: Path) -> None:
    convert("demo", tmp_path / "out", Request(groups=2, method="last"))
    source = key_rows(resolve("demo").path, 1, 8)
    np.testing.assert_array_equal(key_rows(tmp_path / "out", 1, 2), source[[3, 7]])


def test_a_toy_method_is_offered_and_refused_like_any_other(toy: Method, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"--method .*lost.*last"):
        Request(method="lost")
    with pytest.raises(UsageError, match="fewer heads, not a latent"):
        Request("mla", method="last")
    with pytest.raises(UsageError, match="--seed has no effect"):
        Request(method="last", seed=1)
    assert run(["families", "--json"]) == 0
    assert '"last"' in capsys.readouterr().out
    assert run(["families"]) == 0
    assert "last" in capsys.readouterr().out


def test_a_toy_method_in_a_file_is_in_the_help_and_runs(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    script = "import toy, sys; from uptrain.cli.app import run; sys.exit(run(sys.argv[1:]))"

    def uptrain(*arguments: str) -> str:
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "the last head of each group kept" in " ".join(uptrain("convert", "--help").split())
    uptrain("convert", "demo", "out", "--groups", "4", "--method", "last")
    np.testing.assert_array_equal(key_rows(tmp_path / "out", 0, 4), key_rows(resolve("demo").path, 0, 8)[1::2])


def test_importing_the_registry_imports_neither_torch_nor_numpy() -> None:
    script = (
        "import sys, uptrain; before = set(sys.modules); import uptrain.methods; "
        "print([name for name in ('torch', 'numpy') if name in sys.modules.keys() - before])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_each_entry_has_the_name_it_is_found_by() -> None:
    for table in (METHODS, GROUPINGS, TARGETS):
        assert all(entry.name == name for name, entry in table.items())  # type: ignore[attr-defined]
    assert {default_method(target) for target in TARGETS.values()} <= METHODS.keys()
    assert all(set(method.groupings) <= GROUPINGS.keys() for method in METHODS.values())
    assert all(option in vars(Request()) for method in METHODS.values() for option in method.options)


def test_a_method_that_returns_a_bare_layer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "bare", replace(METHODS["first"], name="bare", convert=lambda layer, *rest: layer))
    with pytest.raises(TypeError, match=r"--method bare returned a LayerHeads.*Converted\(layer\)"):
        convert("demo", tmp_path / "out", Request("gqa", 4, "bare"))
    assert not (tmp_path / "out").exists()


def test_a_method_that_leaves_queries_alone_must_pool_norms() -> None:
    with pytest.raises(ValueError, match="pool_norm"):
        Method(name="bad", summary="", changes=frozenset("kv"), convert=METHODS["mean"].convert)


def test_the_documentation_describes_every_method_and_grouping() -> None:
    text = (Path(__file__).parents[2] / "docs/methods.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in METHODS)
    assert all(f"`{name}`" in text or f"--grouping {name}" in text for name in GROUPINGS)
