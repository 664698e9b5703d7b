"""The checkpoint that a card describes: its name, its repeatable history and its cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from uptrain.architectures.attention import cache_bytes_per_token
from uptrain.architectures.description import describe
from uptrain.architectures.validation import DTYPE_KEYS
from uptrain.checkpoint.header import FLOAT_DTYPES, ITEM_BITS
from uptrain.publishing.hub.history import Stage, parent_of, since_public


@dataclass(frozen=True)
class CardSubject:
    """The checkpoint that a card describes.

    - `repo`: its repository, OWNER/NAME.
    - `stages`: its history.
    - `config`: its config.json.
    - `base`: the Hub id of its source, or None.
    - `revision`: the branch; None for main.
    """

    repo: str
    stages: Sequence[Stage]
    config: Mapping[str, Any]
    base: str | None
    revision: str | None = None

    @property
    def name(self) -> str:
        """Return the repository's name without its owner."""
        return self.repo.rpartition("/")[2]

    @property
    def repeatable(self) -> Sequence[Stage]:
        """Return the part of the history that starts at a public model."""
        return since_public(self.stages)

    @property
    def source(self) -> str:
        """Return the name of the source for a reader; empty for a model that was trained from scratch."""
        parent = parent_of(self.repeatable[0]) if self.repeatable else None
        if parent is None or parent.origin == "nothing":
            return self.base or ""
        if parent.origin == "demo":
            return "uptrain's demo checkpoint"
        return self.base or PurePath(parent.name).name

    @property
    def converted(self) -> list[Stage]:
        """Return the conversions of the repeatable history."""
        return [stage for stage in self.repeatable if stage.get("stage") == "convert"]

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """Return the cache bytes per token before all conversions and after them, both in this checkpoint's dtype.

        Each stage gives both numbers in the dtype it wrote, and training may have changed that since; the share of
        the cache that conversions keep is the same in every dtype.
        """
        share = math.prod(_after(stage) / stage["cache_bytes_per_token"]["before"] for stage in self.converted)
        itemsize = ITEM_BITS[FLOAT_DTYPES[self.dtype]] // 8 if self.dtype in FLOAT_DTYPES else 0
        after = _after(self.converted[-1])
        if itemsize:
            described = describe(dict(self.config), f"{self.repo}'s config.json")
            after = cache_bytes_per_token(described.attention, itemsize)
        return round(after / share), after

    @property
    def dtype(self) -> str:
        """Return what config.json calls the weights' dtype; empty where it is silent."""
        return next((str(self.config[key]) for key in DTYPE_KEYS if self.config.get(key)), "")


def _after(stage: Stage) -> int:
    after: int = stage["cache_bytes_per_token"]["after"]
    return after
