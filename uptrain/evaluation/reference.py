"""A baseline for several evaluations: loaded once and, as far as memory allows, run once on each window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from uptrain.checkpoint.folder_digest import weights_digest
from uptrain.checkpoint.source import Source
from uptrain.evaluation.reading import predicted


@dataclass
class Reference:
    """The baseline `source`, and its logits of earlier windows on the CPU, at most `memory` bytes of them."""

    source: Source
    memory: int = 0
    _model: Any = None
    _dtype: torch.dtype | None = None
    _weights: str = ""
    _seen: dict[tuple[bytes, int, torch.dtype], Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the model and of the stored logits."""
        weights = [] if self._model is None else list(self._model.parameters())
        return sum(tensor.nbytes for tensor in (*weights, *self._seen.values()))

    def weights(self) -> str:
        """Return the digest of the weights; the first call reads them."""
        self._weights = self._weights or weights_digest(self.source.path)
        return self._weights

    def load(self, load_model: Callable[[], Any]) -> Any:
        """Return the model in the checkpoint's dtype; the first call loads it with `load_model`."""
        if self._model is None:
            self._model = load_model()
            self._dtype = self._model.dtype
        # The evaluation before left it in the dtype of its speed measurement.
        return self._model.to(self._dtype)

    def logits(self, shown: Tensor, first: int) -> Tensor:
        """Return logits (tokens − first, vocab_size) that predict the tokens of `shown` (tokens,) from `first` on."""
        model = self._model
        key = (shown.cpu().numpy().tobytes(), first, model.dtype)
        if key in self._seen:
            return self._seen[key].to(shown.device)
        found = predicted(model, shown, first)
        if found.nbytes <= self.memory:
            self.memory -= found.nbytes
            self._seen[key] = found.to("cpu", copy=True)
        return found
