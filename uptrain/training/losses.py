"""Losses of tokens: cross-entropy and divergence with their gradients in closed form, and distance of hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from uptrain.training.recipe import Distill

IGNORED = -100
"""The target of a token that no loss is taken of."""


def lm_loss(model: Any, ids: Tensor) -> Tensor:
    """Return the mean next-token cross-entropy in nats of `ids` (sequences, tokens), computed in fp32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def hidden_distance(states: tuple[Tensor, ...], taught: tuple[Tensor, ...], counted: Tensor) -> Tensor:
    """Return Σ over tokens of the mean over layers of |student − teacher|² / |teacher|², a scalar in fp32.

    Each of `states` and `taught` is (sequences, tokens, hidden_size); `counted` (sequences, tokens) says which tokens
    count. Each token is measured by its own length: a first token's outlier must not outweigh the rest.
    """
    total = torch.zeros((), device=counted.device)
    for mine, theirs in zip(states, taught, strict=True):
        wanted = theirs.float()
        error = (mine.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)
        total = total + error[counted].sum()
    return total / max(1, len(states))


def token_losses(
    logits: Tensor, taught: Tensor | None, targets: Tensor, distill: Distill, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return total, cross-entropy and divergence summed over tokens, (3,) in nats, and d total / d logits.

    `logits` and `taught` are (tokens, vocab_size) in fp32, `targets` (tokens,), IGNORED where nothing is predicted.
    total = (1 − weight) · cross-entropy + weight · temperature² · KL(teacher ‖ student), both at `temperature` in the
    KL term. With `top_k`, KL is taken over the teacher's most likely tokens and one more event, all the others.
    The gradient is (1 − weight) · (p − target) + weight · temperature · (p' − q), p' at `temperature`; q is the
    teacher, of which `top_k` leaves the chosen tokens, the others sharing what remains as the student has them.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    counted = targets != IGNORED
    place = targets.clamp(min=0)[:, None]
    logs = logits.log_softmax(-1)
    cross_entropy = -(logs.gather(-1, place)[:, 0] * counted).sum()
    if taught is None:
        sums = torch.stack([cross_entropy, cross_entropy, cross_entropy.new_zeros(())])
        return sums, _from_target(logs, place, counted) if gradient else None
    heat, weight = distill.temperature, distill.weight
    mine = logs if heat == 1 else (logits / heat).log_softmax(-1)
    divergence, wanted = _divergence(mine, (taught / heat).log_softmax(-1), counted, distill.top_k)
    sums = torch.stack([(1 - weight) * cross_entropy + weight * heat**2 * divergence, cross_entropy, divergence])
    if not gradient:
        return sums, None
    outer = mine.exp().sub_(wanted).mul_(weight * heat * counted[:, None])
    if weight < 1:
        outer.add_(_from_target(logs, place, counted), alpha=1 - weight)
    return sums, outer


def _from_target(logs: Tensor, place: Tensor, counted: Tensor) -> Tensor:
    """Return softmax minus the target's one-hot (tokens, vocab_size), in the memory of `logs`; 0 where uncounted."""
    out = logs.exp_()
    out.scatter_(-1, place, out.gather(-1, place) - 1)
    out[~counted] = 0
    return out


def _divergence(mine: Tensor, theirs: Tensor, counted: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Return KL(theirs ‖ mine) of log-probabilities summed over tokens, and what the student's are drawn towards."""
    if top_k is None or top_k >= theirs.shape[-1]:
        wanted = theirs.exp()
        return (wanted * theirs.sub_(mine)).sum(-1)[counted].sum(), wanted
    theirs, chosen = theirs.topk(top_k, dim=-1)
    few = mine.gather(-1, chosen)
    rest, wanted_rest = _log_rest(few), _log_rest(theirs)
    parts = (theirs.exp() * (theirs - few)).sum(-1) + wanted_rest.exp() * (wanted_rest - rest)
    wanted = (mine + (wanted_rest - rest)[:, None]).exp_().scatter_(-1, chosen, theirs.exp())
    return parts[counted].sum(), wanted


def _log_rest(logs: Tensor) -> Tensor:
    """Return the log-probability of all tokens that are not in `logs`, (tokens, chosen) → (tokens,)."""
    # log(1 − p): where the chosen ones hold all but rounding, the rest is a tiny number and not log 0.
    return torch.log(-torch.expm1(logs.logsumexp(-1).clamp(max=-1e-7)))
