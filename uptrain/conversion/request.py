"""What a user asks of a conversion, checked against what the source's heads allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from uptrain.architectures.attention import AttentionSpec
from uptrain.checkpoint.header import FLOAT_DTYPES
from uptrain.conversion.calibration_settings import CalibrationSettings
from uptrain.errors import UsageError, did_you_mean

TARGETS = ("gqa", "mqa", "mla")

CHANGED_PARTS: Mapping[str, frozenset[str]] = {
    "mean": frozenset("kv"),
    "first": frozenset("kv"),
    "random": frozenset("kv"),
    "svd": frozenset("qkvo"),
    "calibrated": frozenset("qkvo"),
}
"""Each method, and which of a layer's projections q, k, v and o it changes."""


GROUPINGS = ("contiguous", "similar")
ROPES = ("grid", "longrope", "re-rotate")
ENGINES = ("any", "llama.cpp")
LATENT_METHODS = ("svd", "calibrated")
LATENT_FIELDS = ("kv_lora_rank", "qk_rope_head_dim", "q_lora_rank", "cache", "rope", "key_weight")
"""What only a latent has."""
CALIBRATION_FIELDS = ("calibrate", "calibration_tokens", "repair_steps")
"""What only --method calibrated has."""
SEEDED_METHODS = ("random", "calibrated")
NEUTRAL: Mapping[str, object] = {"grouping": "contiguous", "engine": "any", "allow_nonfinite": False}
"""Values that ask for nothing."""
BUILTIN = "builtin"
CALIBRATION_TOKENS = 65_536


@dataclass(frozen=True)
class Request:
    """A target, how to reach it, and how the result is stored. `max_shard_size` is in bytes.

    None means that an option was not given. An option that can't have an effect is refused, never ignored.

    `grouping` says which heads share: neighbours, or those whose sharing loses least. `calibrate` names the text
    of `calibrated`: a file, a dataset or `builtin`, of which it reads `calibration_tokens`; `repair_steps` are its
    gradient steps per layer. `seed` is for what draws random numbers.
    `method` "auto" is mean, and svd for a latent. `allow_nonfinite` keeps NaN and infinite values: in attention only
    where it `pools`.

    Of a latent: `cache` is the share of the source's cache to keep, in place of `kv_lora_rank`; `rope` says how keys
    carry positions; `engine` what must be able to load it; `key_weight` how much more keys count than values.
    """

    target: str = "gqa"
    groups: int | None = None
    method: str = "auto"
    seed: int | None = None
    dtype: str | None = None
    max_shard_size: int | None = None
    grouping: str = "contiguous"
    calibrate: str | None = None
    calibration_tokens: int | None = None
    repair_steps: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    q_lora_rank: int | None = None
    cache: float | None = None
    rope: str | None = None
    engine: str = "any"
    key_weight: float | None = None
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        _one_of("--to", self.target, TARGETS)
        if self.method == "auto":
            object.__setattr__(self, "method", "svd" if self.target == "mla" else "mean")
        self._check_latent()
        _one_of("--method", self.method, CHANGED_PARTS)
        _one_of("--grouping", self.grouping, GROUPINGS)
        if self.dtype is not None:
            _one_of("--dtype", self.dtype, FLOAT_DTYPES)
        if self.method == "calibrated" and self.grouping != "contiguous":
            raise UsageError("--grouping similar doesn't go with --method calibrated.", "Use --method svd.")
        self._check_effects()
        if self.chosen_tokens < 1 or (self.repair_steps or 0) < 0:
            raise UsageError("--calibration-tokens and --repair-steps can't be negative.")
        if self.target == "mqa" and self.groups not in (None, 1):
            raise UsageError(
                f"--to mqa keeps one head, so --groups {self.groups} contradicts it.", "Leave it out, or say --to gqa."
            )
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise UsageError(f"--max-shard-size {self.max_shard_size} is not a positive number of bytes.")

    def _check_effects(self) -> None:
        """Refuse what this target and method make no use of."""
        for name in (*CALIBRATION_FIELDS, "seed"):
            if getattr(self, name) is None or _has_effect(name, vars(self)):
                continue
            option = f"--{name.replace('_', '-')}"
            if name == "seed":
                raise UsageError(
                    f"{option} has no effect on --method {self.method}: it draws no random numbers.",
                    f"Leave {option} out; it is for --method {' and '.join(SEEDED_METHODS)} and --grouping similar.",
                )
            raise UsageError(
                f"{option} is for --method calibrated, not {self.method}.", "Leave it out, or add --method calibrated."
            )

    def _check_latent(self) -> None:
        if self.target != "mla":
            for name in LATENT_FIELDS:
                if getattr(self, name) is not None:
                    raise UsageError(f"--{name.replace('_', '-')} is for a latent.", "Add --to mla.")
            if self.engine != "any":
                raise UsageError(f"--engine {self.engine} is for a latent.", "Add --to mla.")
            return
        if self.groups is not None:
            raise UsageError(f"--to mla keeps a latent, so --groups {self.groups} contradicts it.", "Use --cache.")
        if self.method not in LATENT_METHODS:
            raise UsageError(
                f"--method {self.method} makes fewer heads, not a latent.", f"Use {' or '.join(LATENT_METHODS)}."
            )
        if self.grouping != "contiguous":
            raise UsageError("--grouping is for shared heads: a latent is one for all.")
        _one_of("--engine", self.engine, ENGINES)
        if self.rope is not None:
            _one_of("--rope", self.rope, ROPES)
        for name in ("kv_lora_rank", "q_lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value} is not a positive number.")
        if self.cache is not None and not 0 < self.cache <= 1:
            raise UsageError(f"--cache {self.cache:.3g} is no share of the cache.", "Give one like 25%.")
        if self.cache is not None and self.kv_lora_rank is not None:
            raise UsageError("--cache and --kv-lora-rank both set the latent's size.", "Give one of them.")
        if self.key_weight is not None and not 0 < self.key_weight < float("inf"):
            raise UsageError(f"--key-weight {self.key_weight} is not a positive number.")

    @property
    def chosen_seed(self) -> int:
        """Return the seed: the one that was given, else 0."""
        return self.seed or 0

    @property
    def chosen_text(self) -> str:
        """Return what `calibrated` reads: what was given, else the text that comes with Python."""
        return self.calibrate or BUILTIN

    @property
    def chosen_tokens(self) -> int:
        """Return how many tokens `calibrated` reads at most."""
        return CALIBRATION_TOKENS if self.calibration_tokens is None else self.calibration_tokens

    def recorded(self, changed: bool = True) -> dict[str, Any]:
        """Return what a result depends on: the options that have an effect, those left to their defaults included.

        With `changed` off, no head was changed, so neither the method nor what belongs to it had an effect.
        """
        steps = CalibrationSettings.repair_steps if self.repair_steps is None else self.repair_steps
        defaults = {
            "seed": self.chosen_seed, "calibrate": self.chosen_text, "calibration_tokens": self.chosen_tokens,
            "repair_steps": steps,
        }  # fmt: skip
        found = in_effect({**asdict(self), **defaults})
        unused = () if changed else ("method", "grouping", "seed", "key_weight", *CALIBRATION_FIELDS)
        return {name: value for name, value in found.items() if name not in unused}

    @property
    def pools(self) -> bool:
        """Say whether each new head is made of a few old ones' values alone, and no others'."""
        return self.method in ("mean", "first") and self.grouping == "contiguous"

    @property
    def changed_parts(self) -> frozenset[str]:
        """Return which of q, k, v and o change: moving heads takes their queries and output columns along."""
        plain = self.grouping == "contiguous" and self.target != "mla"
        return CHANGED_PARTS[self.method] if plain else frozenset("qkvo")


def in_effect(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of a request that had an effect; `values` are an uptrain.json's of any version.

    Earlier versions recorded every option's default, whether it had an effect or not.
    """
    return {
        name: value
        for name, value in values.items()
        if value is not None and value != NEUTRAL.get(name) and _has_effect(name, values)
    }


def option_words(values: Mapping[str, Any]) -> list[str]:
    """Return the words of the command line that ask for a request, of which `values` are as for `in_effect`."""
    words: list[str] = []
    for name, value in in_effect(values).items():
        option = "--to" if name == "target" else f"--{name.replace('_', '-')}"
        if name == "max_shard_size":
            value = f"{value}B"
        words += [option] if value is True else [option, str(value)]
    return words


def _has_effect(name: str, values: Mapping[str, Any]) -> bool:
    method = values.get("method")
    if name in CALIBRATION_FIELDS:
        return method == "calibrated"
    if name == "seed":
        return method in SEEDED_METHODS or values.get("grouping") == "similar"
    return True


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
