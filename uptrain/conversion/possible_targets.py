"""What a model can become: the one list of it that `inspect`, `inspect --suggest` and `families` read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.schema import Family
from uptrain.conversion.plan.checks import check_groups
from uptrain.conversion.plan.mla import plan_mla
from uptrain.conversion.plan.quantized import check_target
from uptrain.conversion.request import Request, resolve_groups
from uptrain.errors import UsageError
from uptrain.methods.method import TargetKind
from uptrain.models.mla_targets import MLA_TARGET_CLASSES
from uptrain.models.target import TargetClass
from uptrain.models.targets import TARGET_CLASSES, choose_target, own_target


@dataclass(frozen=True, kw_only=True)
class PossibleTarget:
    """One thing that a checkpoint can become.

    - `request`: what asks for it.
    - `target`: the class that holds it.
    - `attention`: the attention of its layers.
    """

    request: Request
    target: TargetClass
    attention: tuple[AttentionSpec, ...]


def head_requests(heads: int, method: str = "auto") -> list[Request]:
    """Return a request for every number of groups below `heads` key/value heads, the fewest groups first."""
    counts = [count for count in range(1, heads) if heads % count == 0]
    return [Request("mqa" if count == 1 else "gqa", count, method) for count in counts]


def latent_requests(shares: Iterable[float]) -> list[Request]:
    """Return a request for a latent of each share (0 to 1) of the source's cache."""
    return [Request("mla", cache=share) for share in shares]


def possible_targets(source: CheckpointDescription, requests: Iterable[Request]) -> Iterator[PossibleTarget]:
    """Yield what each request makes of a checkpoint, without those that no class holds.

    Raises:
        CheckpointError: the checkpoint can't be read.
    """
    for request in requests:
        try:
            yield _possible_target(source, request)
        except UsageError:
            continue


def target_classes(family: Family, kind: TargetKind) -> list[tuple[TargetClass, str]]:
    """Return the classes that can hold a family's result, in the order in which they are tried.

    With each comes the config flag that the source must have for it, empty where there is none.
    """
    names = family.targets.get(kind.name, ())
    if kind.latent:
        return [(MLA_TARGET_CLASSES[name].target, "") for name in names]
    if names or not family.native or family.keys.latent or not family.keys.num_key_value_heads:
        return [(TARGET_CLASSES[name], "") for name in names]
    return [(own_target(family), (family.keys.grouped or "") if kind.takes_groups else "")]


def _possible_target(source: CheckpointDescription, request: Request) -> PossibleTarget:
    if request.kind.latent:
        latent = plan_mla(source, request)
        target, attention = latent.entry.target, latent.after
    else:
        groups = resolve_groups(request, source.attention[0], source.name)
        target = choose_target(source, request.target, same=False)
        check_groups(source, target.family, groups)
        attention = tuple(spec.grouped(groups) for spec in source.attention)
    check_target(source, target, request.kind.latent)
    return PossibleTarget(request=request, target=target, attention=attention)
