"""Where a latent's positions are has one meaning under the names of every version."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from uptrain.architectures.mla_rope import MLARope
from uptrain.conversion.request import Request
from uptrain.errors import UsageError
from uptrain.models.mla_targets import MLA_TARGET_CLASSES

FIRST = {"grid": MLARope.DECOUPLED, "longrope": MLARope.LONGROPE, "re-rotate": MLARope.PRE_ROPE}


@pytest.mark.parametrize("name", FIRST)
def test_the_names_of_the_first_version_ask_for_the_same_and_stay_in_manifests(name: str) -> None:
    rope = FIRST[name]
    assert MLARope.named(name) is MLARope.named(rope.value) is rope
    assert asdict(Request("mla", rope=name)) == asdict(Request("mla", rope=rope.value))
    assert Request("mla", rope=rope.value).rope == name == rope.recorded


@pytest.mark.parametrize("name", ["none", "free", "yarn", ""])
def test_no_other_name_can_be_asked_for(name: str) -> None:
    with pytest.raises(UsageError, match="--rope"):
        Request("mla", rope=name)


def test_each_has_one_place_for_positions_and_a_class_that_holds_it() -> None:
    for rope in MLARope:
        assert rope.shares_key + rope.rotates_expanded == rope.rotates
        assert rope.shares_key or not rope.chooses_pairs
        assert any(rope in entry.ropes for entry in MLA_TARGET_CLASSES.values())
    for entry in MLA_TARGET_CLASSES.values():
        assert {rope for ropes in entry.engines.values() for rope in ropes} == {*entry.ropes}
