"""The objective: cross-entropy, divergence from a teacher and distance from its hidden states, in any mixture.

Logits of a whole batch are never held: the head is applied to a few hundred tokens at a time, and the gradient of
those is taken at once, in the forward pass, so nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from uptrain.errors import UsageError
from uptrain.models.logit_head import LogitHead
from uptrain.training.losses import IGNORED, hidden_distance, token_losses
from uptrain.training.recipe import Distill

_LOGITS = 2**24
"""Logits held at once for one model."""


class Objective(nn.Module):
    """A student and what is asked of it; its forward pass is the loss, so that DDP and FSDP wrap all of it.

    The teacher is no submodule: it has no gradient, is not saved, and no optimizer sees it.
    """

    def __init__(self, student: Any, distill: Distill | None = None, teacher: Any = None) -> None:
        super().__init__()
        self.student = student
        self.distill = distill or Distill.model_validate({"weight": 0.0})
        self._hidden: tuple[Any, ...] = () if teacher is None else (teacher.requires_grad_(False).eval(),)
        self._head = LogitHead(student)
        self._teacher_head = None if teacher is None else LogitHead(teacher)
        if teacher is not None:
            _check_alike(student, teacher)

    @property
    def teacher(self) -> Any:
        """Return the teacher, or None."""
        return self._hidden[0] if self._hidden else None

    @property
    def has_encoder(self) -> bool:
        """Tell whether the first half of what it is given is read by an encoder, and only the second predicted."""
        return self._head.has_encoder

    def compile_bodies(self) -> None:
        """Compile student and teacher up to the head, in place."""
        for head in (self._head, self._teacher_head):
            if head is not None:
                (head.model if head.body is None else head.body).compile()

    def forget(self) -> None:
        """Let go of both models, so that what still refers to this (a hook, a compiler) holds no memory of theirs."""
        self._modules.clear()
        self._hidden = ()
        for head in (self._head, self._teacher_head):
            if head is not None:
                vars(head).clear()

    def forward(self, ids: Tensor, targets: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return the sums over a batch's tokens, (4,) in fp32: total, cross-entropy, divergence, hidden distance.

        `ids` is (sequences, tokens); `targets` is the same shape: the token that each position predicts, or IGNORED.
        `position_ids` starts anew at each packed document and keeps documents apart; None for one a sequence.
        Only total carries a gradient; cross-entropy and divergence are in nats.
        """
        wanted = self.distill.hidden_weight > 0 and self.teacher is not None
        hidden, states = self._head.hidden(ids, position_ids, wanted)
        taught: Tensor | None = None
        taught_states: tuple[Tensor, ...] = ()
        if self._teacher_head is not None:
            with torch.no_grad():
                taught, taught_states = self._teacher_head.hidden(ids, position_ids, wanted)
                taught = taught.flatten(0, 1)
        total, cross_entropy, divergence = _head_loss(
            self._head, hidden.flatten(0, 1), targets.flatten(), self._teacher_head, taught, self.distill
        )
        far = torch.zeros((), device=ids.device)
        if wanted:
            far = hidden_distance(states, taught_states, targets != IGNORED)
            total = total + self.distill.hidden_weight * far
        return torch.stack([total, cross_entropy, divergence, far.detach()])


def _head_loss(
    head: LogitHead, hidden: Tensor, targets: Tensor, teacher: LogitHead | None, taught: Tensor | None, distill: Distill
) -> tuple[Tensor, Tensor, Tensor]:
    """Return total, cross-entropy and divergence of the rows of `hidden`; only total carries a gradient."""

    def losses(logits: Tensor, rows: slice, gradient: bool) -> tuple[Tensor, Tensor | None]:
        theirs = None if teacher is None or taught is None else teacher.logits(taught[rows])
        finished = head.finish(logits)
        sums, outer = token_losses(finished, theirs, targets[rows], distill, gradient)
        return sums, None if outer is None else head.before_finish(outer, finished)

    rows = max(1, _LOGITS // (head.vocab_size or hidden.shape[-1]))
    out: tuple[Tensor, Tensor] = _Chunked.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, losses, rows
    )
    return out[0], out[1][0], out[1][1]


_Losses = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""Of some rows' logits: the three sums and, if asked for, the gradient of the first by those logits."""


class _Chunked(torch.autograd.Function):
    """Apply a linear head and a loss of its logits to a few rows at a time, taking gradients on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        losses: _Losses,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        wants = [ctx.needs_input_grad[position] for position in range(3)]
        kind = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        inputs = hidden if kind is None or weight is None else hidden.to(kind)
        used = weight if kind is None or weight is None else weight.to(kind)
        sums = torch.zeros(3, device=hidden.device)
        grads = [
            torch.empty_like(hidden) if wants[0] else None,
            torch.zeros_like(weight, dtype=torch.float32) if wants[1] and weight is not None else None,
            torch.zeros_like(bias, dtype=torch.float32) if wants[2] and bias is not None else None,
        ]
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                some = slice(start, min(start + rows, len(hidden)))
                sums += _one(inputs[some], used, bias, losses, some, grads)
        ctx.save_for_backward(*[each for each in grads if each is not None])
        ctx.kept = [each is not None for each in grads]
        ctx.dtypes = [None if each is None else each.dtype for each in (hidden, weight, bias)]
        figures = sums[1:]
        ctx.mark_non_differentiable(figures)
        return sums[0].clone(), figures

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        grads = [next(saved) if kept else None for kept in ctx.kept]
        # In place: these are ours, and of the head's size.
        scaled = [None if each is None else each.mul_(outer[0]) for each in grads]
        return (
            *(None if each is None else each.to(dtype) for each, dtype in zip(scaled, ctx.dtypes, strict=True)),
            None,
            None,
        )


def _one(
    inputs: Tensor, weight: Tensor | None, bias: Tensor | None, losses: _Losses, some: slice, grads: list[Tensor | None]
) -> Tensor:
    """Return the three sums of some rows, and add their gradients to `grads`, of hidden, weight and bias."""
    low = None if bias is None else bias.to(inputs.dtype)
    logits = (inputs if weight is None else functional.linear(inputs, weight, low)).float()
    sums, outer = losses(logits, some, any(each is not None for each in grads))
    if outer is None:
        return sums
    narrow = outer.to(inputs.dtype)
    of_hidden, of_weight, of_bias = grads
    if of_hidden is not None:
        of_hidden[some] = narrow if weight is None else narrow @ weight
    if of_weight is not None:
        if of_weight.dtype == narrow.dtype:
            of_weight.addmm_(narrow.T, inputs)
        else:
            of_weight += narrow.T @ inputs
    if of_bias is not None:
        of_bias += outer.sum(0)
    return sums


def _check_alike(student: Any, teacher: Any) -> None:
    mine, theirs = student.config.vocab_size, teacher.config.vocab_size
    if mine != theirs:
        raise UsageError(
            f"The teacher predicts {theirs} tokens and the model {mine}, so their logits can't be compared.",
            "Name the checkpoint that this model was converted from as distill.teacher.",
        )
