"""A result goes out under the licence of what it was made from, and never round a gate."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import checkpoint
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import UsageError
from uptrain.publishing.hub.licence import Ancestor, Licence, find_licence, read_card, refuse_gated

SHA = "c0ffee" * 6 + "beef"
HUB = [{"stage": "convert", "source": {"name": "org/llama", "origin": "hub", "revision": SHA}}]


def manifest(folder: Path) -> list[dict[str, Any]]:
    from uptrain.checkpoint.manifest import read_manifest

    found = read_manifest(folder)
    assert found is not None
    stages: list[dict[str, Any]] = found["stages"]
    return stages


def card(folder: Path, lines: str, text: str = "# Mine\n") -> None:
    (folder / "README.md").write_text(f"---\n{lines}\n---\n{text}")


def test_a_local_source_hands_its_card_s_licence_on_through_every_stage(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "llama")
    half = convert(str(source), tmp_path / "half", Request("gqa", 2)).out
    done = convert(str(half), tmp_path / "done", Request("mqa")).out
    with pytest.raises(UsageError, match="not declared anywhere"):
        find_licence(done, manifest(done), [], None, {})
    card(source, "license: mit")
    assert find_licence(done, manifest(done), [], None, {}) == Licence("mit", "source/README.md")
    assert find_licence(done, manifest(done), [], "Apache-2.0", {}).id == "apache-2.0"
    card(done, "license: gpl-3.0")
    assert find_licence(done, manifest(done), [], None, read_card(done)[0]).id == "gpl-3.0"


@pytest.mark.parametrize("name", ["LICENSE", "Licence.rst", "COPYING", "MODEL_LICENSE.pdf"])
def test_a_licence_text_alone_is_carried_over_as_it_is(name: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "llama")
    (source / name).write_text("Be kind.")
    done = convert(str(source), tmp_path / "done", Request("mqa")).out
    shutil.rmtree(source)
    found = find_licence(done, manifest(done), [], None, {})
    assert (found.id, found.link) == ("other", name) and (done / name).read_text() == "Be kind."


def test_a_hub_source_s_own_terms_are_linked_where_they_stand(tmp_path: Path) -> None:
    terms = {"license": "other", "license_name": "llama-community", "license_link": "docs/TERMS.md"}
    found = find_licence(tmp_path, HUB, [Ancestor("org/llama", card=terms)], None, {})
    assert (found.id, found.name) == ("other", "llama-community")
    assert found.link is not None and found.link.endswith(f"/org/llama/blob/{SHA}/docs/TERMS.md")
    terms["license_link"] = "https://example.org/terms"
    found = find_licence(tmp_path, HUB, [Ancestor("org/llama", card=terms)], None, {})
    assert found.link == "https://example.org/terms"


@pytest.mark.parametrize("known", [None, {}, {"license": "unknown"}, {"license": ["mit", "gpl"]}, {"license": 3}])
def test_a_source_that_says_nothing_usable_is_not_guessed_for(known: dict[str, Any] | None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--license"):
        find_licence(tmp_path, HUB, [Ancestor("org/llama", card=known)], None, {})


def test_a_gate_anywhere_in_the_history_refuses(save_tiny: Callable[..., Path]) -> None:
    refuse_gated([Ancestor("org/a"), Ancestor("org/b", card={})])
    with pytest.raises(UsageError, match=r"org/b.*gated") as stop:
        refuse_gated([Ancestor("org/a"), Ancestor("org/b", gated=True)])
    assert "--private" in stop.value.hint
