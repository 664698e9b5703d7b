"""Losses of tokens: cross-entropy and divergence with closed-form gradients, and the distance of hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from uptrain.training.recipe import Distill

IGNORED = -100
"""The target of a token that has no loss."""


def lm_loss(model: Any, ids: Tensor) -> Tensor:
    """Return the mean next-token cross-entropy of `ids` (sequences, tokens), in nats, computed in fp32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def hidden_distance(states: tuple[Tensor, ...], teacher: tuple[Tensor, ...], predicted: Tensor) -> Tensor:
    """Return Σ over tokens of the mean over layers of |student − teacher|² / |teacher|², a scalar in fp32.

    Each token's error is relative to its own length: the large hidden state of a first token must not dominate.

    - `states`: the student's hidden state after each layer, each (sequences, tokens, hidden_size).
    - `teacher`: the teacher's, of the same shapes.
    - `predicted`: (sequences, tokens) bool, the tokens to sum over.
    """
    total = torch.zeros((), device=predicted.device)
    for state, goal in zip(states, teacher, strict=True):
        wanted = goal.float()
        error = (state.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)
        total = total + error[predicted].sum()
    return total / max(1, len(states))


def token_losses(
    logits: Tensor, teacher: Tensor | None, targets: Tensor, distill: Distill, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return total, cross-entropy and divergence summed over tokens, (3,) in nats, and d total / d logits.

    total = (1 − weight) · cross-entropy + weight · temperature² · KL(teacher ‖ student), where the KL term takes both
    distributions at `temperature`. With `top_k`, the KL term has one event per likely token of the teacher, and one
    event for all other tokens.

    The gradient is (1 − weight) · (p − target) + weight · temperature · (p' − q). p' is the student at `temperature`.
    q is the teacher at `temperature`; with `top_k`, the other tokens share the rest in the student's proportions.

    - `logits`: the student's, (tokens, vocab_size) in fp32.
    - `teacher`: the teacher's, of the same shape, or None.
    - `targets`: (tokens,) int64, IGNORED where nothing is predicted.
    - `distill`: weight, temperature and top_k.
    - `gradient`: whether to return the gradient; else None.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    predicted = targets != IGNORED
    place = targets.clamp(min=0)[:, None]
    logs = logits.log_softmax(-1)
    cross_entropy = -(logs.gather(-1, place)[:, 0] * predicted).sum()
    if teacher is None:
        sums = torch.stack([cross_entropy, cross_entropy, cross_entropy.new_zeros(())])
        return sums, _from_target(logs, place, predicted) if gradient else None
    temperature, weight = distill.temperature, distill.weight
    mine = logs if temperature == 1 else (logits / temperature).log_softmax(-1)
    divergence, wanted = _divergence(mine, (teacher / temperature).log_softmax(-1), predicted, distill.top_k)
    sums = torch.stack([(1 - weight) * cross_entropy + weight * temperature**2 * divergence, cross_entropy, divergence])
    if not gradient:
        return sums, None
    outer = mine.exp().sub_(wanted).mul_(weight * temperature * predicted[:, None])
    if weight < 1:
        outer.add_(_from_target(logs, place, predicted), alpha=1 - weight)
    return sums, outer


def _from_target(logs: Tensor, place: Tensor, predicted: Tensor) -> Tensor:
    """Return softmax minus the one-hot target (tokens, vocab_size), in the memory of `logs`; 0 for ignored targets."""
    out = logs.exp_()
    out.scatter_(-1, place, out.gather(-1, place) - 1)
    out[~predicted] = 0
    return out


def _divergence(mine: Tensor, theirs: Tensor, predicted: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Return KL(theirs ‖ mine) of log-probabilities summed over tokens, and the student's goal (tokens, vocab_size)."""
    if top_k is None or top_k >= theirs.shape[-1]:
        wanted = theirs.exp()
        return (wanted * theirs.sub_(mine)).sum(-1)[predicted].sum(), wanted
    theirs, chosen = theirs.topk(top_k, dim=-1)
    few = mine.gather(-1, chosen)
    rest, wanted_rest = _log_rest(few), _log_rest(theirs)
    parts = (theirs.exp() * (theirs - few)).sum(-1) + wanted_rest.exp() * (wanted_rest - rest)
    wanted = (mine + (wanted_rest - rest)[:, None]).exp_().scatter_(-1, chosen, theirs.exp())
    return parts[predicted].sum(), wanted


def _log_rest(logs: Tensor) -> Tensor:
    """Return the log-probability of all tokens that are not in `logs`, (tokens, chosen) → (tokens,)."""
    # log(1 − p). Where the chosen tokens have all the probability but rounding, the rest is tiny and not log 0.
    return torch.log(-torch.expm1(logs.logsumexp(-1).clamp(max=-1e-7)))
