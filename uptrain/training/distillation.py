"""The objective of training: cross-entropy, divergence from a teacher and distance from its hidden states.

The logits of a whole batch are never in memory. The forward pass applies the head to a few hundred tokens at a time and
computes their gradient immediately, so that nothing is computed twice.
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
"""The number of logits of one model in memory at a time."""


class Objective(nn.Module):
    """A student with its loss as the forward pass, so that DDP and FSDP wrap model and loss together.

    The teacher is not a submodule: it has no gradient, it is not saved, and no optimizer sees it.

    - `student`: the model to train.
    - `distill`: the weights of the parts of the loss; None for cross-entropy alone.
    - `teacher`: the model to learn from, or None.

    Raises:
        UsageError: teacher and student have vocabularies of different sizes.
    """

    def __init__(self, student: Any, distill: Distill | None = None, teacher: Any = None) -> None:
        super().__init__()
        self.student = student
        self.distill = distill or Distill.model_validate({"weight": 0.0})
        self._hidden: tuple[Any, ...] = () if teacher is None else (teacher.requires_grad_(False).eval(),)
        if teacher is not None:
            _check_vocabulary(student, teacher)
        self._head = LogitHead(student)
        self._teacher_head = None if teacher is None else LogitHead(teacher)

    @property
    def teacher(self) -> Any:
        """Return the teacher, or None."""
        return self._hidden[0] if self._hidden else None

    @property
    def has_encoder(self) -> bool:
        """Return whether an encoder reads the first half of each sequence, and only the second half is predicted."""
        return self._head.has_encoder

    def compile_bodies(self) -> None:
        """Compile student and teacher up to their heads, in place."""
        for head in (self._head, self._teacher_head):
            if head is not None:
                (head.model if head.body is None else head.body).compile()

    def forget(self) -> None:
        """Drop both models, so that a hook or compiler with a reference to this object holds none of their memory."""
        self._modules.clear()
        self._hidden = ()
        for head in (self._head, self._teacher_head):
            if head is not None:
                vars(head).clear()

    def forward(self, ids: Tensor, targets: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return the sums over a batch's tokens, (4,) in fp32: total, cross-entropy, divergence, hidden distance.

        Only the total carries a gradient. Cross-entropy and divergence are in nats.

        - `ids`: (sequences, tokens) int64.
        - `targets`: the same shape; the token that each position predicts, or IGNORED.
        - `position_ids`: the same shape; starts at 0 in each packed document. None for one document per sequence.
        """
        compare = self.distill.hidden_weight > 0 and self.teacher is not None
        hidden, states = self._head.hidden(ids, position_ids, compare)
        teacher_hidden: Tensor | None = None
        teacher_states: tuple[Tensor, ...] = ()
        if self._teacher_head is not None:
            with torch.no_grad():
                teacher_hidden, teacher_states = self._teacher_head.hidden(ids, position_ids, compare)
                teacher_hidden = teacher_hidden.flatten(0, 1)
        total, cross_entropy, divergence = _head_loss(
            self._head, hidden.flatten(0, 1), targets.flatten(), self._teacher_head, teacher_hidden, self.distill
        )
        distance = torch.zeros((), device=ids.device)
        if compare:
            distance = hidden_distance(states, teacher_states, targets != IGNORED)
            total = total + self.distill.hidden_weight * distance
        return torch.stack([total, cross_entropy, divergence, distance.detach()])


def _head_loss(
    head: LogitHead,
    hidden: Tensor,
    targets: Tensor,
    teacher: LogitHead | None,
    teacher_hidden: Tensor | None,
    distill: Distill,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return total, cross-entropy and divergence over tokens, each a scalar; only the total carries a gradient.

    - `head`: the student's head.
    - `hidden`: the student's last hidden states (tokens, hidden_size).
    - `targets`: (tokens,) int64.
    - `teacher`: the teacher's head, or None.
    - `teacher_hidden`: the teacher's last hidden states (tokens, hidden_size), or None.
    - `distill`: the weights of the parts of the loss.
    """

    def losses(logits: Tensor, rows: slice, gradient: bool) -> tuple[Tensor, Tensor | None]:
        expected = None if teacher is None or teacher_hidden is None else teacher.logits(teacher_hidden[rows])
        finished = head.finish(logits)
        sums, outer = token_losses(finished, expected, targets[rows], distill, gradient)
        return sums, None if outer is None else head.before_finish(outer, finished)

    rows = max(1, _LOGITS // (head.vocab_size or hidden.shape[-1]))
    out: tuple[Tensor, Tensor] = _Chunked.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, losses, rows
    )
    return out[0], out[1][0], out[1][1]


_Losses = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""Takes logits (tokens, vocab_size), their rows and whether to return the gradient of the first sum by the logits."""


class _Chunked(torch.autograd.Function):
    """Apply a linear head and a loss of its logits to a few rows at a time, with gradients in the forward pass."""

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
        ctx.present = [each is not None for each in grads]
        ctx.dtypes = [None if each is None else each.dtype for each in (hidden, weight, bias)]
        parts = sums[1:]
        ctx.mark_non_differentiable(parts)
        return sums[0].clone(), parts

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        grads = [next(saved) if present else None for present in ctx.present]
        # In place: these tensors belong to this function, and one has the size of the head.
        scaled = [None if each is None else each.mul_(outer[0]) for each in grads]
        return (
            *(None if each is None else each.to(dtype) for each, dtype in zip(scaled, ctx.dtypes, strict=True)),
            None,
            None,
        )


def _one(
    inputs: Tensor, weight: Tensor | None, bias: Tensor | None, losses: _Losses, some: slice, grads: list[Tensor | None]
) -> Tensor:
    """Return the three sums of some rows and add their gradients to `grads`.

    - `inputs`: the rows' hidden states (rows, hidden_size), in the dtype of products.
    - `weight`: (vocab_size, hidden_size), or None where `inputs` are logits.
    - `bias`: (vocab_size,), or None.
    - `losses`: computes the sums and the gradient by the logits.
    - `some`: the rows.
    - `grads`: gradients of hidden states, weight and bias; None for one that is not needed.
    """
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


def _check_vocabulary(student: Any, teacher: Any) -> None:
    size, expected = teacher.config.vocab_size, student.config.vocab_size
    if size != expected:
        raise UsageError(
            f"The teacher predicts {size} tokens and the model {expected}, so their logits can't be compared.",
            "Name the checkpoint that this model was converted from as distill.teacher.",
        )
