"""`uptrain families` says what the plan does, and docs/families.md says what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conversion.test_families import TARGETS, family, request
from uptrain.cli import console
from uptrain.cli.app import run
from uptrain.conversion import plan_conversion
from uptrain.conversion.family_table import FamilyRow, families
from uptrain.conversion.request import Request
from uptrain.errors import UsageError
from uptrain.methods import METHODS

Save = Callable[..., Path]
KNOWN: dict[str, FamilyRow] = {found.model_type: found for found in families()}
DOCUMENT = Path(__file__).parents[2] / "docs/families.md"
BEGIN, END = "<!-- uptrain families --markdown -->\n", "\n<!-- /families -->"


@pytest.mark.parametrize(("name", "groups"), [(name, groups) for name, heads, groups in TARGETS if heads == 4])
def test_each_target_lands_where_the_table_says_by_the_methods_it_says(name: str, groups: int, save_tiny: Save) -> None:
    known, source = KNOWN[family(name).model_type], str(save_tiny(name))
    holders = known.mqa if groups == 1 else known.gqa
    flags = name.split("+")[1:]
    pooled = any(key in flags for key in known.pool_only_with)
    normed = any(key in flags for key in known.normed_with)
    for method, entry in METHODS.items():
        unfit = (pooled and entry.mixes_dims) or (normed and entry.pool_norm is None)
        if method not in known.methods or unfit:
            with pytest.raises(UsageError):
                plan_conversion(source, request(groups, method))
            continue
        target = plan_conversion(source, request(groups, method))[2].target
        assert (target.name, bool(target.remote_code)) in [
            (holder.model_type, holder.remote_code) for holder in holders
        ]
        assert all(holder.needs in ("", *flags) for holder in holders)


@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if not known.mla])
def test_a_family_without_a_class_for_latents_says_so(name: str, save_tiny: Save) -> None:
    with pytest.raises(UsageError, match=name):
        plan_conversion(str(save_tiny(name)), Request("mla", cache=0.5))


def test_the_document_has_the_table_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["families", "--markdown"]) == 0
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == capsys.readouterr().out.rstrip("\n"), "paste the command's output"


def test_json_and_table_name_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["families", "--json"]) == 0
    listed = {entry["model_type"] for entry in json.loads(capsys.readouterr().out)}
    assert listed == {name.split("+")[0] for name, _, _ in TARGETS}
    assert run(["families"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in listed)


def test_the_table_breaks_no_name_on_a_terminal_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    console._console.cache_clear()
    assert run(["families"]) == 0
    console._console.cache_clear()
    shown = capsys.readouterr().out.splitlines()
    table = shown[: next(at for at, line in enumerate(shown) if line.startswith("Of two classes"))]
    assert max(map(len, table)) <= 80
    words = {word.rstrip("*;") for line in table for word in line.split()}
    for known in KNOWN.values():
        holders = {holder.model_type for holder in (*known.gqa, *known.mqa, *known.mla)}
        keys = {key.rpartition(".")[2] for key in (*known.pool_only_with, *known.normed_with)}
        assert {known.model_type, *(holders - {known.model_type}), *keys} <= words
