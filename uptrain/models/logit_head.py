"""A language model in two parts: the body up to the last hidden state, and the head that makes logits of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class LogitHead:
    """The head of a model of any family, so that logits can be made a few rows at a time.

    What a family does to logits after the linear head (a scale, a soft-cap) is read off its config and checked against
    the model's own logits on a few tokens; where they differ, `hidden` returns the logits themselves and the head is
    the identity: slower, never wrong.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.linear = plain.get_output_embeddings()
        config = plain.config
        self.scale = _number(config, "logit_scale", 1.0) / _number(config, "logits_scaling", 1.0)
        self.cap = _number(config, "final_logit_softcapping", 0.0)
        self.has_encoder = bool(config.is_encoder_decoder)
        self._shift: Any = getattr(plain, "prepare_decoder_input_ids_from_labels", None)
        # Some classes call their decoder themselves, past the body that wraps it (OPT).
        bodies = [plain.base_model, *([plain.get_decoder()] if hasattr(plain, "get_decoder") else [])]
        bodies = [] if self.has_encoder else bodies
        self.body = next((body for body in bodies if self._holds(plain, body)), None)

    @property
    def split(self) -> bool:
        """Tell whether logits are made from hidden states here, and not by the model."""
        return self.body is not None

    @property
    def weight(self) -> Tensor | None:
        """Return the head's matrix (vocab_size, hidden_size), or None where `hidden` gives logits already."""
        return self.linear.weight if self.split else None

    @property
    def bias(self) -> Tensor | None:
        """Return the head's bias (vocab_size,), if it has one."""
        return getattr(self.linear, "bias", None) if self.split else None

    @property
    def vocab_size(self) -> int:
        """Return the number of logits per token."""
        return int(self.model.config.vocab_size)

    def hidden(
        self, ids: Tensor, position_ids: Tensor | None = None, states: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the last hidden state (sequences, tokens, hidden_size) and, if asked for, that of every layer.

        Of a model with an encoder that reads the first half of `ids`, and its decoder writes the second (teacher
        forcing); the rest, of which nothing is predicted, are zeros.
        """
        if self.has_encoder:
            return self._written(ids, states)
        body = self.model if self.body is None else self.body
        also = {} if position_ids is None else {"position_ids": position_ids}
        out = body(input_ids=ids, use_cache=False, output_hidden_states=states, **also)
        return out[0], tuple(out.hidden_states[1:]) if states else ()

    def _written(self, ids: Tensor, states: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        half = ids.shape[1] // 2
        given = {"input_ids": ids[:, :half], "decoder_input_ids": self._shift(ids[:, half:])}
        out = self.model(**given, use_cache=False, output_hidden_states=states)
        found = (out.logits, *(out.decoder_hidden_states[1:] if states else ()))
        # As in a decoder alone, the state at a position then predicts the token after it.
        logits, *layers = (functional.pad(each, (0, 0, half - 1, 1)) for each in found)
        return logits, tuple(layers)

    def finish(self, logits: Tensor) -> Tensor:
        """Do to the linear head's output (tokens, vocab_size) what the family does."""
        return self._bent(logits) if self.split else logits

    def before_finish(self, outer: Tensor, finished: Tensor) -> Tensor:
        """Return the gradient by the linear head's output, given the one by what `finish` made of it."""
        if not self.split:
            return outer
        if self.cap:
            outer = outer * (1 - (finished / self.cap).square())
        return outer if self.scale == 1 else outer * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits (tokens, vocab_size) of hidden states (tokens, hidden_size)."""
        return self._made(hidden) if self.split else hidden.float()

    def _made(self, hidden: Tensor) -> Tensor:
        weight, bias = self.linear.weight, getattr(self.linear, "bias", None)
        return self._bent(functional.linear(hidden.to(weight.dtype), weight, bias).float())

    def _bent(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if not self.cap else self.cap * torch.tanh(logits / self.cap)

    @torch.no_grad()
    def _holds(self, plain: Any, body: Any) -> bool:
        if self.linear is None or body is None or body is plain:
            return False
        weight = self.linear.weight
        random = torch.Generator().manual_seed(0)
        given = torch.randn(1, 4, weight.shape[1], generator=random).to(weight)
        # The body is left out: running a large one on the CPU, before its weights are shared out, would take minutes.
        earlier = vars(body).get("forward")
        body.forward = lambda *args, **named: _Given(given)
        try:
            own = plain(input_ids=torch.zeros(1, 4, dtype=torch.long, device=weight.device), use_cache=False)[0]
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
            return False
        finally:
            del body.forward
            if earlier is not None:
                body.forward = earlier
        own, mine = own[0].float(), self._made(given[0])
        return own.shape == mine.shape and bool(
            torch.allclose(mine, own, rtol=1e-2, atol=1e-2 * float(own.abs().max()))
        )


def _number(config: Any, key: str, otherwise: float) -> float:
    # MPT's configs may have a word there, which its class doesn't read.
    value = getattr(config, key, None)
    return float(value) if isinstance(value, int | float) and value else otherwise


class _Given:
    """Stand for a body's output: the last hidden state, and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int | slice) -> Any:
        return (self.last_hidden_state,)[place]
