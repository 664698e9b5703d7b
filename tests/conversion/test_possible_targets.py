"""What a model can become is what its conversion makes: the same class, and attention of the same cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.description import describe_checkpoint
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.plan.planner import make_plan
from uptrain.conversion.possible_targets import head_requests, latent_requests, possible_targets, target_classes
from uptrain.errors import UsageError
from uptrain.methods.registry import TARGETS

Save = Callable[..., Path]


def test_every_divisor_below_the_heads_is_asked_for_and_one_head_is_mqa() -> None:
    found = [(request.target, request.groups) for request in head_requests(12)]
    assert found == [("mqa", 1), ("gqa", 2), ("gqa", 3), ("gqa", 4), ("gqa", 6)]
    assert head_requests(1) == []


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon", "gptj", "cohere", "opt"])
def test_what_is_possible_is_what_the_plan_makes_and_the_rest_is_refused(family: str, save_tiny: Save) -> None:
    checkpoint = open_checkpoint(save_tiny(family))
    source = describe_checkpoint(checkpoint, family)
    requests = [*head_requests(source.attention[0].num_key_value_heads), *latent_requests([0.5, 0.25])]
    possible = list(possible_targets(source, requests))
    assert possible
    for found in possible:
        plan = make_plan(checkpoint, found.request, family)
        assert (plan.target, plan.after) == (found.target, found.attention)
        classes = [target.name for target, _ in target_classes(FAMILIES[family], TARGETS[found.request.target])]
        assert found.target.name in classes
    for request in requests:
        if request not in [found.request for found in possible]:
            with pytest.raises(UsageError):
                make_plan(checkpoint, request, family)
