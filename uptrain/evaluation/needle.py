"""Retrieval from long contexts: a pass key hidden in filler text, asked for at the end."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uptrain.data.token_text import encode, start_ids
from uptrain.errors import UsageError
from uptrain.evaluation.intervals import interval, wilson
from uptrain.evaluation.progress import Progress, counted
from uptrain.models import devices

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class NeedleSettings:
    """Which prompts to ask: `trials` for each length in tokens (empty: the contexts) and depth (0 to 1)."""

    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = DEPTHS
    trials: int = 10


@dataclass(frozen=True)
class NeedleCell:
    """Retrieval at one length and depth: of the model, and of the baseline on the same prompts.

    `exact_match` is the share of prompts after which greedy decoding writes the key, with Wilson's 95 % interval;
    `log_probability` is the mean over the key's tokens, in nats, with an interval over prompts.
    `difference_interval` is that of the model's log-probability less the baseline's, paired by prompt.
    """

    length: int
    depth: float
    samples: int
    exact_match: float
    exact_match_interval: tuple[float, float]
    log_probability: float
    log_probability_interval: tuple[float, float] | None
    baseline_exact_match: float | None = None
    baseline_exact_match_interval: tuple[float, float] | None = None
    baseline_log_probability: float | None = None
    baseline_log_probability_interval: tuple[float, float] | None = None
    difference_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Prompt:
    """Token ids up to the question's end, and the key's, which should follow."""

    ids: list[int]
    key: list[int]


def prompts(tokenizer: Any, filler: Sequence[int], length: int, depth: float, trials: int) -> list[Prompt]:
    """Return prompts that are `length` tokens with their key, the needle after a `depth` share of the filler.

    The same keys are hidden at every length and depth; each trial's filler starts elsewhere in `filler` (tokens,).

    Source: Mohtashami & Jaggi 2023, "Landmark Attention", section 4.2 (the pass key).

    Raises:
        UsageError: the needle and the question alone are longer.
    """
    begin = start_ids(tokenizer)
    found = []
    for trial in range(trials):
        key = f"{random.Random(trial).randrange(10_000, 100_000)}"
        needle, question, answered = encode(tokenizer, [NEEDLE.format(key=key), QUESTION, f"{QUESTION} {key}"])
        # Where a tokenizer joins the question's last letters to the key, the key begins with them.
        same = next((at for at, ids in enumerate(zip(question, answered, strict=False)) if ids[0] != ids[1]),
                    len(question))  # fmt: skip
        room = length - len(begin) - len(needle) - len(answered)
        if room < 0:
            raise UsageError(
                f"A needle and its question are {length - room} tokens, but the prompt shall have {length}.",
                "Use a longer --needle-lengths.",
            )
        at = trial * len(filler) // trials
        text = [filler[(at + step) % len(filler)] for step in range(room)]
        cut = round(depth * room)
        found.append(Prompt([*begin, *text[:cut], *needle, *text[cut:], *answered[:same]], answered[same:]))
    return found


def check_needles(tokenizer: Any, wanted: NeedleSettings, longest: int) -> None:
    """Refuse lengths that can't be asked, before anything is measured.

    Raises:
        UsageError: a length that the models have no positions for, or that has no room for the needle.
    """
    if max(wanted.lengths) > longest:
        raise UsageError(
            f"A needle prompt of {max(wanted.lengths)} tokens is longer than the {longest} that the model takes.",
            "Use a shorter --needle-lengths.",
        )
    prompts(tokenizer, [0], min(wanted.lengths), 0, wanted.trials)


def find_needles(
    loaded: Sequence[Any],
    tokenizer: Any,
    filler: Sequence[int],
    wanted: NeedleSettings,
    on_progress: Progress | None = None,
) -> Iterator[NeedleCell]:
    """Yield a cell for each length and depth of one or two models, the first one's figures first."""
    lengths = sorted({*wanted.lengths})
    advance = counted("Needles", len(lengths) * len(wanted.depths) * wanted.trials * len(loaded), on_progress)
    for length in lengths:
        for depth in wanted.depths:
            asked = prompts(tokenizer, filler, length, depth, wanted.trials)
            answers: list[list[tuple[bool, float]]] = []
            for each in loaded:
                answers.append([])
                for prompt in asked:
                    answers[-1].append(ask(each, prompt))
                    advance(1)
            yield _cell(length, depth, asked, answers)


def _cell(
    length: int, depth: float, asked: Sequence[Prompt], answers: Sequence[list[tuple[bool, float]]]
) -> NeedleCell:
    counts = [len(prompt.key) for prompt in asked]
    sums = [[nats for _, nats in each] for each in answers]
    figures: list[Any] = []
    for each, nats in zip(answers, sums, strict=True):
        exact = sum(right for right, _ in each)
        share = (exact / len(each), wilson(exact, len(each)))
        figures += [*share, sum(nats) / sum(counts), interval(nats, counts)]
    if len(answers) > 1:
        figures.append(interval([one - other for one, other in zip(*sums, strict=True)], counts))
    return NeedleCell(length, depth, len(asked), *figures)


@devices.enough_memory("A needle", "Lower --needle-lengths, or compute in a smaller --dtype or on --device cpu.")
@torch.no_grad()
def ask(model: Any, prompt: Prompt) -> tuple[bool, float]:
    """Tell whether greedy decoding would write the key, and the sum of its tokens' log-probabilities.

    Greedy decoding writes it exactly if each of its tokens ranks first after those before it, so that one pass over
    prompt and key says both.
    """
    ids = torch.tensor([[*prompt.ids, *prompt.key]], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(prompt.key) + 1).logits[0, :-1]
    key: Tensor = ids[0, -len(prompt.key) :]
    logs = logits.float().log_softmax(-1)
    return bool((logits.argmax(-1) == key).all()), float(logs.gather(-1, key[:, None]).cpu().double().sum())
