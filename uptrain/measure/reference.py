"""A baseline that several evaluations compare with: loaded once, and where memory allows run once on each window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from uptrain.checkpoint.source import Source


@dataclass
class Reference:
    """The baseline `source`, and the logits of windows it has seen, on the CPU, as long as `memory` bytes hold them."""

    source: Source
    memory: int = 0
    _model: Any = None
    _dtype: torch.dtype | None = None
    _seen: dict[tuple[bytes, int, int, torch.dtype], Tensor] = field(default_factory=dict)

    def load(self, load_model: Callable[[Source], Any]) -> Any:
        """Return its model in the checkpoint's own dtype, which `load_model` loads the first time."""
        if self._model is None:
            self._model = load_model(self.source)
            self._dtype = self._model.dtype
        # An evaluation leaves it in the dtype that it was timed in.
        return self._model.to(self._dtype)

    def logits(self, shown: Tensor, keep: slice) -> Tensor:
        """Return the logits (kept, vocabulary) at `keep` of the window `shown` (tokens,)."""
        model = self._model
        key = (shown.cpu().numpy().tobytes(), keep.start, keep.stop, model.dtype)
        if key in self._seen:
            return self._seen[key].to(shown.device)
        found: Tensor = model(input_ids=shown[None], use_cache=False).logits[0, keep]
        if found.nbytes <= self.memory:
            self.memory -= found.nbytes
            self._seen[key] = found.to("cpu", copy=True)
        return found
