"""Where the positions of a latent's keys are: the one object that the plan, the target classes and the method ask."""

from __future__ import annotations

from enum import Enum


class MLARope(Enum):
    """Where the positions of a latent's keys are. A value is how the command line spells it.

    Source: DeepSeek-AI 2024, DeepSeek-V2, section 2.1.3 for the decoupled rotary key; Ding et al. 2024, LongRoPE, for a
    table with a factor per pair.
    """

    NONE = "none"
    """Nowhere: the source's keys see no rotation."""
    DECOUPLED = "decoupled"
    """In one rotary key that all heads share, with the source's fastest rope pairs (truncated)."""
    LONGROPE = "longrope"
    """In one rotary key that all heads share, with rope pairs of the model's own choice."""
    PRE_ROPE = "pre-rope"
    """In every key, rotated after it is expanded: the latent holds keys from before rotation."""

    @property
    def recorded(self) -> str:
        """Return the name in manifests, plans and requests, which is that of the first version."""
        return _RECORDED[self]

    @property
    def shares_key(self) -> bool:
        """Tell whether a rotary key that all heads share is cached with the latent."""
        return self in (MLARope.DECOUPLED, MLARope.LONGROPE)

    @property
    def truncates(self) -> bool:
        """Tell whether the shared rotary key has the source's fastest rope pairs, and no others."""
        return self is MLARope.DECOUPLED

    @property
    def chooses_pairs(self) -> bool:
        """Tell whether the model chooses its rope pairs, and config.json has a table of its own for them."""
        return self is MLARope.LONGROPE

    @property
    def rotates(self) -> bool:
        """Tell whether keys see a rotation at all."""
        return self is not MLARope.NONE

    @property
    def rotates_expanded(self) -> bool:
        """Tell whether each step expands the cached latent to keys and rotates them."""
        return self is MLARope.PRE_ROPE

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return the values of `--rope` that the help names; those of the first version are read too."""
        return tuple(rope.value for rope in cls if rope.rotates)

    @classmethod
    def named(cls, name: object) -> MLARope | None:
        """Return the entry that an option, a request or a manifest calls `name`; None where there is none."""
        return next((rope for rope in cls if name in (rope.value, rope.recorded)), None)


_RECORDED = {
    MLARope.NONE: "free", MLARope.DECOUPLED: "grid", MLARope.LONGROPE: "longrope", MLARope.PRE_ROPE: "re-rotate",
}  # fmt: skip
