"""Plan fewer key/value heads: how many, the class that holds them, its config and its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from uptrain.architectures.description import CheckpointDescription, write_groups
from uptrain.architectures.head_order import check_order
from uptrain.architectures.projections import LayerHeads, join, module_of, module_shape, modules_of
from uptrain.checkpoint.dtypes import Array
from uptrain.conversion.plan.attention import AttentionPlan, LayerWork, PartShape
from uptrain.conversion.plan.checks import check_effects, check_groups
from uptrain.conversion.plan.target_tensors import rotate_as_before
from uptrain.conversion.request import Request, resolve_groups
from uptrain.models.target import TargetClass
from uptrain.models.targets import OF_THE_FOLDER, choose_target, result_class, target_config


@dataclass(frozen=True, kw_only=True)
class HeadsPlan(AttentionPlan):
    """Fewer key/value heads, or as many in another class.

    - `groups`: how many key/value heads each layer has.
    - `moves`: whether the grouping moves heads.
    """

    groups: int
    moves: bool

    @property
    def label(self) -> str:
        """Return mqa, or gqa and the number of heads."""
        return "mqa" if self.groups == 1 else f"gqa{self.groups}"

    @property
    def sizes(self) -> Mapping[str, int]:
        """Return nothing: every attention has heads."""
        return MappingProxyType({})

    @property
    def recorded(self) -> Mapping[str, Any]:
        """Return nothing: every manifest has the number of heads."""
        return MappingProxyType({})

    @property
    def changes_heads(self) -> bool:
        """Whether the source has more key/value heads."""
        return self.groups != self.source.attention[0].num_key_value_heads

    @property
    def changes_storage(self) -> bool:
        """Whether the target class stores the projections otherwise."""
        return self.source.family.projections != self.target.family.projections

    @property
    def renames_modules(self) -> bool:
        """Whether the attention has other modules: never, but for those that the target class renames."""
        return False

    @property
    def writes_rotation(self) -> bool:
        """Whether the target class wants the rotation written out."""
        return self.target.rotary

    @property
    def pools_norms(self) -> bool:
        """Whether there are fewer heads."""
        return self.changes_heads

    def check_tensors(self) -> None:
        """Refuse to move heads that other tensors count.

        Raises:
            UsageError: there are such tensors.
        """
        if self.moves and self.changes_heads:
            check_order(self.source)

    def write_config(self) -> dict[str, Any]:
        """Return the source's config as the target class reads it, with the number of heads.

        Raises:
            UsageError: the target class can't express the source's rotation or purpose.
        """
        source, target = self.source, self.target
        if not self.changes_heads and target.family is source.family:
            config = _as_it_is(target, source.config)
        else:
            config = target_config(target, source.config)
            write_groups(target.family, config, self.groups)
            config["architectures"] = [result_class(target, source)]
        if target.rotary:
            rotate_as_before(config, target, source)
        return config

    def parts(self, layer: int, changed: Iterable[str], present: Mapping[str, list[str]]) -> Iterator[PartShape]:
        """Yield the tensors of the projections in `changed`, as the target class stores them."""
        own, other = self.source.family.projections, self.target.family.projections
        for module in modules_of(other, frozenset(changed)):
            part = next(part for part in "qkvo" if module_of(other, part) == module)
            origin = module_of(own, part)
            rows, columns = module_shape(other, self.after[layer], module, self.source.hidden_size)
            out_features = columns if other.transposed else rows
            for kind in ("weight", "bias") if self.target.biased else present[origin]:
                shape = (rows, columns) if kind == "weight" else (out_features,)
                yield PartShape(f"{module}.{kind}", shape, origin)

    def convert(self, heads: LayerHeads, layer: int, work: LayerWork) -> dict[str, Array]:
        """Return the layer with fewer heads, in the target class's projections."""
        if self.changes_heads:
            heads = work.share(heads, self.groups, layer)
        return join(self.target.family.projections, self.after[layer], work.fit(heads, layer))


def plan_heads(source: CheckpointDescription, request: Request) -> HeadsPlan:
    """Plan the key/value heads that `request` asks of a checkpoint.

    Raises:
        UsageError: no class holds that many, or an option would have no effect.
    """
    before, name = source.attention, source.name
    groups = resolve_groups(request, before[0], name)
    same = groups == before[0].num_key_value_heads
    target = choose_target(source, "mqa" if groups == 1 else "gqa", same)
    check_effects(request, groups, before[0].num_key_value_heads, name)
    if not same:
        check_groups(source, target.family, groups)
    after = tuple(spec.grouped(groups) for spec in before)
    return HeadsPlan(source=source, target=target, after=after, groups=groups, moves=request.chosen_grouping.moves)


def _as_it_is(target: TargetClass, config: Mapping[str, Any]) -> dict[str, Any]:
    # A name of code or weights in the source's config is left out, as its file is.
    own = target_config(target, config)
    rest = {key: value for key, value in config.items() if key not in OF_THE_FOLDER}
    return {**rest, "auto_map": own["auto_map"]} if "auto_map" in own else rest
