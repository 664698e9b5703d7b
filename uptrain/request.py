"""What a user asks of a conversion, checked against what the source's heads allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from uptrain.attention import AttentionSpec
from uptrain.checkpoint.header import FLOAT_DTYPES
from uptrain.errors import UsageError, did_you_mean

TARGETS = ("gqa", "mqa")

CHANGED_PARTS: Mapping[str, frozenset[str]] = {
    "mean": frozenset("kv"),
    "first": frozenset("kv"),
    "random": frozenset("kv"),
    "svd": frozenset("qkvo"),
    "calibrated": frozenset("qkvo"),
}
"""Each method, and which of a layer's projections q, k, v and o it changes."""


GROUPINGS = ("contiguous", "similar")


@dataclass(frozen=True)
class Request:
    """A target, how to reach it, and how the result is stored. `max_shard_size` is in bytes.

    `grouping` says which heads share: neighbours, or those whose sharing loses least. `calibrate` names the text
    of `calibrated`: a file, a dataset or `builtin`; `repair_steps` are its gradient steps a layer, None the default.
    """

    target: str = "gqa"
    groups: int | None = None
    method: str = "mean"
    seed: int = 0
    dtype: str | None = None
    max_shard_size: int | None = None
    grouping: str = "contiguous"
    calibrate: str = "builtin"
    calibration_tokens: int = 65_536
    repair_steps: int | None = None

    def __post_init__(self) -> None:
        _one_of("--to", self.target, TARGETS)
        _one_of("--method", self.method, CHANGED_PARTS)
        _one_of("--grouping", self.grouping, GROUPINGS)
        if self.dtype is not None:
            _one_of("--dtype", self.dtype, FLOAT_DTYPES)
        if self.method == "calibrated" and self.grouping != "contiguous":
            raise UsageError("--grouping similar doesn't go with --method calibrated.", "Use --method svd.")
        if self.calibration_tokens < 1 or (self.repair_steps or 0) < 0:
            raise UsageError("--calibration-tokens and --repair-steps can't be negative.")
        if self.target == "mqa" and self.groups not in (None, 1):
            raise UsageError(f"--to mqa keeps one head, so --groups {self.groups} contradicts it.")
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise UsageError(f"--max-shard-size {self.max_shard_size} is not a positive number of bytes.")

    @property
    def changed_parts(self) -> frozenset[str]:
        """Return which of q, k, v and o change: moving heads takes their queries and output columns along."""
        return CHANGED_PARTS[self.method] if self.grouping == "contiguous" else frozenset("qkvo")


def _one_of(option: str, value: str, known: Mapping[str, object] | tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{option} {value} is not known. Use {', '.join(known)}.", did_you_mean(value, known))


def resolve_groups(request: Request, spec: AttentionSpec, name: str) -> int:
    """Return how many key/value heads the result keeps.

    Raises:
        UsageError: more than there are, or a number that doesn't divide them.
    """
    heads = spec.num_key_value_heads
    what = "attention heads" if spec.kind == "mha" else "key/value heads"
    divisors = [number for number in range(1, heads + 1) if heads % number == 0]
    if request.target == "mqa":
        return 1
    if request.groups is None:
        return _default_groups(divisors)
    use = f"Use {_either(divisors)}."
    if request.groups < 1:
        raise UsageError(f"--groups {request.groups} is not a positive number.", use)
    if request.groups > heads:
        raise UsageError(f"--groups {request.groups} is more than {name}'s {heads} {what}.", use)
    if request.groups not in divisors:
        raise UsageError(f"--groups {request.groups} does not divide {name}'s {heads} {what}.", use)
    return request.groups


def _default_groups(divisors: list[int]) -> int:
    # Ainslie et al. 2023 settle on 8 groups; smaller models get the largest that still saves half.
    saving = [number for number in divisors if number <= max(1, divisors[-1] // 2)]
    return 8 if 8 in saving else saving[-1]


def _either(numbers: list[int]) -> str:
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
