"""What a user asks of a conversion: the options, checked with each other and against the source's heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.mla_rope import MLARope
from uptrain.checkpoint.header import FLOAT_DTYPES
from uptrain.conversion.calibration_quality import CalibrationQuality, quality_named
from uptrain.conversion.calibration_settings import BLOCK_STEPS, REPAIRS, CalibrationSettings
from uptrain.data.sources import weighted_names
from uptrain.errors import UsageError, did_you_mean
from uptrain.methods.method import EVERY_PART, Grouping, Method, TargetKind
from uptrain.methods.registry import (
    GROUPINGS,
    METHODS,
    TARGETS,
    default_method,
    method_options,
    methods_with,
)

ENGINES = ("any", "llama.cpp")
LATENT_FIELDS = ("kv_lora_rank", "qk_rope_head_dim", "q_lora_rank", "cache", "rope", "key_weight")
"""The fields that only a latent has."""
NEUTRAL: Mapping[str, object] = {
    "grouping": "contiguous", "engine": "any", "allow_nonfinite": False, "repair": REPAIRS[0],
}  # fmt: skip
"""The defaults that are no request."""
BUILTIN = "builtin"
"""The name of the calibration text that comes with Python."""


@dataclass(frozen=True)
class Request:
    """What a conversion makes of a checkpoint. None means that an option was not given.

    An option that can't have an effect is refused, never ignored.

    - `target`: what attention becomes: gqa, mqa or mla.
    - `groups`: (gqa) how many key/value heads stay.
    - `method`: a name in `METHODS`; "auto" is the first that serves the target.
    - `seed`: for methods and groupings that draw random numbers. Default: 0.
    - `dtype`: what floating weights are stored as. Default: as they are.
    - `max_shard_size`: bytes per file of weights. Default: as the source is split.
    - `grouping`: a name in `GROUPINGS`: which heads share one.
    - `calibrate`: text for a method that needs text: a file, a dataset or `builtin`; several as TEXT:WEIGHT,….
    - `quality`: a name in `QUALITIES`: how much such a method reads and tries, where the next ones don't say.
    - `calibration_tokens`: how many tokens of all texts are read at most.
    - `calibration_block`: tokens of a calibration block.
    - `repair`: what such a method repairs: `attention` (default), or `blocks`, each layer's norms and MLP too.
    - `repair_steps`: gradient steps per layer that repair attention.
    - `kv_lora_rank`: (mla) values of the latent per token.
    - `qk_rope_head_dim`: (mla) dims of the shared rotary key.
    - `q_lora_rank`: (mla) rank of the queries, None for whole queries.
    - `cache`: (mla) share of the source's cache, 0 to 1, instead of `kv_lora_rank`.
    - `rope`: (mla) where the positions of keys are, an option of `MLARope`.
    - `engine`: (mla) what must be able to load the result.
    - `key_weight`: (mla) weight of key error relative to value error.
    - `allow_nonfinite`: accept NaN and infinite values of the source; in attention only where the request `pools`.
    """

    target: str = "gqa"
    groups: int | None = None
    method: str = "auto"
    seed: int | None = None
    dtype: str | None = None
    max_shard_size: int | None = None
    grouping: str = "contiguous"
    calibrate: str | None = None
    quality: str | None = None
    calibration_tokens: int | None = None
    calibration_block: int | None = None
    repair: str | None = None
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
            object.__setattr__(self, "method", default_method(self.kind))
        if self.kind.latent:
            self._check_latent()
        else:
            self._check_heads()
        _one_of("--method", self.method, METHODS)
        _one_of("--grouping", self.grouping, GROUPINGS)
        if self.dtype is not None:
            _one_of("--dtype", self.dtype, FLOAT_DTYPES)
        if self.repair is not None:
            _one_of("--repair", self.repair, REPAIRS)
        self._check_grouping()
        self._check_effects()
        if self.chosen_tokens < 1 or (self.repair_steps or 0) < 0:
            raise UsageError(
                "--calibration-tokens or --repair-steps is too small.", "Give at least 1 token, and no negative steps."
            )
        if self.calibration_block is not None and self.calibration_block < 2:
            raise UsageError(f"--calibration-block {self.calibration_block} is too small.", "Give at least 2 tokens.")
        weighted_names("--calibrate", self.chosen_text)
        if self.kind.groups is not None and self.groups not in (None, self.kind.groups):
            raise UsageError(
                f"--groups {self.groups} contradicts --to {self.target}, which has one key/value head.",
                "Leave --groups out, or use --to gqa.",
            )
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise UsageError(f"--max-shard-size {self.max_shard_size} is not a positive number of bytes.")

    def _check_grouping(self) -> None:
        if self.grouping not in self.chosen_method.groupings:
            others = [
                method.name for method in METHODS.values() if method.mixes_dims and self.grouping in method.groupings
            ]
            raise UsageError(
                f"--grouping {self.grouping} can't be used with --method {self.method}.",
                f"Use --method {' or '.join(others)}.",
            )

    def _check_effects(self) -> None:
        """Refuse options that have no effect with this method and grouping."""
        for name in method_options():
            if getattr(self, name) is None or _has_effect(name, vars(self)):
                continue
            option, users = _option(name), methods_with(name)
            seeded = [f"--grouping {each.name}" for each in GROUPINGS.values() if each.seeded]
            if name == "seed":
                raise UsageError(
                    f"{option} has no effect with --method {self.method}, which draws no random numbers.",
                    f"Leave {option} out. It is for --method {' and '.join([*users, *seeded])}.",
                )
            raise UsageError(
                f"{option} requires --method {' or '.join(users)}, not {self.method}.",
                f"Leave it out, or add --method {users[0]}.",
            )

    def _check_heads(self) -> None:
        """Refuse what only a latent has."""
        given = [name for name in LATENT_FIELDS if getattr(self, name) is not None]
        if given:
            raise UsageError(
                f"{_option(given[0])} requires --to mla.", f"Add --to mla, or leave {_option(given[0])} out."
            )
        if self.engine != "any":
            raise UsageError(f"--engine {self.engine} requires --to mla.", "Add --to mla, or leave --engine out.")

    def _check_latent(self) -> None:
        """Refuse what a latent can't have, and sizes that are none."""
        if self.groups is not None:
            raise UsageError(
                f"--groups {self.groups} can't be used with --to mla, which makes a latent.", "Use --cache."
            )
        makers = [method.name for method in METHODS.values() if method.serves(self.kind)]
        if self.method not in makers:
            raise UsageError(
                f"--method {self.method} makes fewer heads, not a latent.", f"Use --method {' or '.join(makers)}."
            )
        if self.grouping != "contiguous":
            raise UsageError(
                f"--grouping {self.grouping} can't be used with --to mla: one latent serves all heads.", "Leave it out."
            )
        _one_of("--engine", self.engine, ENGINES)
        if self.rope is not None:
            rope = MLARope.named(self.rope)
            if rope is None or not rope.rotates:
                _one_of("--rope", self.rope, MLARope.options())
            else:
                object.__setattr__(self, "rope", rope.recorded)
        self._check_latent_sizes()

    def _check_latent_sizes(self) -> None:
        for name in ("kv_lora_rank", "q_lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{_option(name)} {value} is not a positive number.")
        if self.cache is not None and not 0 < self.cache <= 1:
            raise UsageError(f"--cache {self.cache:.3g} is not a share of the cache.", "Give a share like 25%.")
        if self.cache is not None and self.kv_lora_rank is not None:
            raise UsageError("--cache and --kv-lora-rank both set the latent's size.", "Leave one of them out.")
        if self.key_weight is not None and not 0 < self.key_weight < float("inf"):
            raise UsageError(f"--key-weight {self.key_weight} is not a positive number.")

    @property
    def kind(self) -> TargetKind:
        """Return what attention becomes, as an object."""
        return TARGETS[self.target]

    @property
    def chosen_method(self) -> Method:
        """Return the method as an object."""
        return METHODS[self.method]

    @property
    def chosen_grouping(self) -> Grouping:
        """Return the grouping as an object."""
        return GROUPINGS[self.grouping]

    @property
    def chosen_seed(self) -> int:
        """Return the seed, 0 by default."""
        return self.seed or 0

    @property
    def chosen_text(self) -> str:
        """Return the name of the calibration text, by default that of the text that comes with Python."""
        return BUILTIN if self.calibrate is None else self.calibrate

    @property
    def chosen_tokens(self) -> int:
        """Return how many tokens of calibration text are read at most."""
        return self.chosen_quality.tokens if self.calibration_tokens is None else self.calibration_tokens

    @property
    def chosen_quality(self) -> CalibrationQuality:
        """Return how much calibration reads and tries, where options don't say."""
        return quality_named(self.quality)

    @property
    def calibration_settings(self) -> CalibrationSettings:
        """Return what calibration tries."""
        preset, steps = self.chosen_quality.settings, self.repair_steps
        return replace(
            preset,
            seed=self.chosen_seed,
            repair_steps=preset.repair_steps if steps is None else steps,
            block_steps=BLOCK_STEPS if self.repairs_blocks else preset.block_steps,
        )

    def recorded(self, changed: bool = True) -> dict[str, Any]:
        """Return the options that have an effect on the result, including defaults.

        Where no head was `changed`, neither the method nor its options had an effect.
        """
        defaults = {
            "seed": self.chosen_seed, "calibrate": self.chosen_text, "quality": self.chosen_quality.name,
            "calibration_tokens": self.chosen_tokens, "repair": self.repair or REPAIRS[0],
            "repair_steps": self.calibration_settings.repair_steps,
        }  # fmt: skip
        found = in_effect({**asdict(self), **defaults})
        unused = () if changed else ("method", "grouping", "key_weight", *method_options())
        return {name: value for name, value in found.items() if name not in unused}

    @property
    def repairs_blocks(self) -> bool:
        """Whether calibration may change norms and MLPs too."""
        return self.repair == "blocks"

    @property
    def pools(self) -> bool:
        """Whether each new head is made of the values of a few old heads alone."""
        return self.chosen_method.pools and not self.chosen_grouping.moves

    @property
    def changed_parts(self) -> frozenset[str]:
        """Return which of q, k, v and o change: where heads move, their queries and output columns move too."""
        plain = not self.chosen_grouping.moves and not self.kind.latent
        return self.chosen_method.changes if plain else EVERY_PART

    @property
    def needs_torch(self) -> bool:
        """Whether heads are changed with torch while the result is written."""
        # What calibration made before is only read.
        factored = self.chosen_method.needs_torch and not self.chosen_method.needs_text
        return factored or self.chosen_grouping.needs_torch


def in_effect(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a request that had an effect; `values` are those in an uptrain.json of any version.

    Earlier versions recorded the default of every option.
    """
    return {
        name: value
        for name, value in values.items()
        if value is not None and value != NEUTRAL.get(name) and _has_effect(name, values)
    }


def option_words(values: Mapping[str, Any]) -> list[str]:
    """Return the command-line words of a request, whose `values` are as for `in_effect`."""
    words: list[str] = []
    for name, value in in_effect(values).items():
        option = "--to" if name == "target" else _option(name)
        if name == "max_shard_size":
            value = f"{value}B"
        rope = MLARope.named(str(value)) if name == "rope" else None
        value = rope.value if rope is not None else value
        words += [option] if value is True else [option, str(value)]
    return words


def _has_effect(name: str, values: Mapping[str, Any]) -> bool:
    """Return whether a field has an effect with the method and grouping among `values`, which any version wrote."""
    if name not in method_options():
        return True
    method, grouping = METHODS.get(str(values.get("method"))), GROUPINGS.get(str(values.get("grouping")))
    used = method is not None and name in method.options
    return used or (name == "seed" and grouping is not None and grouping.seeded)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _one_of(option: str, value: str, known: Mapping[str, object] | tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{option} {value} is not known. Use {', '.join(known)}.", did_you_mean(value, known))


def resolve_groups(request: Request, spec: AttentionSpec, name: str) -> int:
    """Return how many key/value heads the result has; `spec` is the source's attention, `name` the source's.

    Raises:
        UsageError: the request asks for more heads than there are, or for a number that does not divide them.
    """
    heads = spec.num_key_value_heads
    what = "attention heads" if spec.kind == "mha" else "key/value heads"
    divisors = [number for number in range(1, heads + 1) if heads % number == 0]
    if request.kind.groups is not None:
        return request.kind.groups
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
