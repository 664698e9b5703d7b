"""Retrieval from long contexts: a pass key that is hidden in filler text and asked for at the end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from uptrain.checkpoint.events import Events
from uptrain.data.text_encoder import TextEncoder
from uptrain.errors import UsageError
from uptrain.evaluation.intervals import interval, wilson
from uptrain.evaluation.pair import ModelPair
from uptrain.evaluation.progress import counted
from uptrain.evaluation.settings import EvaluationSettings, NeedleSettings
from uptrain.models import devices

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True, kw_only=True)
class NeedleCell:
    """Retrieval at one length and depth: of the model, and of the baseline on the same prompts.

    `exact_match` is the share of prompts after which greedy decoding writes the key, with Wilson's 95 % interval.
    `log_probability` is the mean over the key's tokens, in nats, with an interval over prompts.
    `difference_interval` is the interval of the model's log-probability minus the baseline's, paired by prompt.
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
    """Token ids up to the end of the question, and those of the key, which should follow."""

    ids: list[int]
    key: list[int]


def prompts(tokenizer: Any, filler: Sequence[int], length: int, depth: float, trials: int) -> list[Prompt]:
    """Return prompts of one length with the key hidden at one depth.

    The same keys are hidden at every length and depth.

    - `tokenizer`: the tokenizer of the model.
    - `filler`: tokens of the text around the key, (tokens,); each prompt starts at another place of it.
    - `length`: tokens per prompt, the key included.
    - `depth`: share of the filler before the key, 0 to 1.
    - `trials`: number of prompts.

    Source: Mohtashami & Jaggi 2023, "Landmark Attention", section 4.2 (the pass key).

    Raises:
        UsageError: the key's sentence and the question alone are longer than `length`.
    """
    encoder = TextEncoder(tokenizer)
    found = []
    for trial in range(trials):
        key = f"{random.Random(trial).randrange(10_000, 100_000)}"
        needle, question, answered = encoder.tokens_of([NEEDLE.format(key=key), QUESTION, f"{QUESTION} {key}"])
        # A tokenizer may join the last letters of the question to the key: then the key begins with them.
        same = next((at for at, ids in enumerate(zip(question, answered, strict=False)) if ids[0] != ids[1]),
                    len(question))  # fmt: skip
        room = length - len(encoder.start) - len(needle) - len(answered)
        if room < 0:
            raise UsageError(
                f"A needle and its question are {length - room} tokens, but the prompt has {length}.",
                "Use a longer --needle-lengths.",
            )
        at = trial * len(filler) // trials
        text = [filler[(at + step) % len(filler)] for step in range(room)]
        cut = round(depth * room)
        found.append(Prompt([*encoder.start, *text[:cut], *needle, *text[cut:], *answered[:same]], answered[same:]))
    return found


def check_needles(tokenizer: Any, settings: NeedleSettings, positions: int) -> None:
    """Refuse prompt lengths that the models can't read, before anything is measured.

    Raises:
        UsageError: a length of more than `positions` tokens, or too short for the needle and its question.
    """
    if max(settings.lengths) > positions:
        raise UsageError(
            f"A needle prompt of {max(settings.lengths)} tokens is longer than the {positions} that the model takes.",
            "Use a shorter --needle-lengths.",
        )
    prompts(tokenizer, [0], min(settings.lengths), 0, settings.trials)


def measure_retrieval(pair: ModelPair, settings: EvaluationSettings, events: Events) -> list[NeedleCell]:
    """Return a cell per length and depth, in ascending order of length; empty where no needle is asked for."""
    needle = settings.needle
    if needle is None:
        return []
    lengths, filler = sorted({*needle.lengths}), pair.first_text.ids.tolist()
    advance = counted("Needles", len(lengths) * len(needle.depths) * needle.trials * len(pair.models), events)
    cells = []
    for length, depth in product(lengths, needle.depths):
        asked = prompts(pair.tokenizers[0], filler, length, depth, needle.trials)
        answers: list[list[tuple[bool, float]]] = []
        for model in pair.models:
            answers.append([])
            for prompt in asked:
                answers[-1].append(ask(model, prompt))
                advance(1)
        cells.append(_cell(length, depth, asked, answers))
    return cells


def _cell(
    length: int, depth: float, asked: Sequence[Prompt], answers: Sequence[list[tuple[bool, float]]]
) -> NeedleCell:
    """Return the metrics of one cell from each model's answers, as `ask` returns them."""
    counts = [len(prompt.key) for prompt in asked]
    sums = [[nats for _, nats in each] for each in answers]
    values: dict[str, Any] = {}
    for prefix, each, nats in zip(("", "baseline_"), answers, sums, strict=False):
        exact = sum(right for right, _ in each)
        values |= {
            f"{prefix}exact_match": exact / len(each),
            f"{prefix}exact_match_interval": wilson(exact, len(each)),
            f"{prefix}log_probability": sum(nats) / sum(counts),
            f"{prefix}log_probability_interval": interval(nats, counts),
        }
    if len(answers) > 1:
        values["difference_interval"] = interval([one - other for one, other in zip(*sums, strict=True)], counts)
    return NeedleCell(length=length, depth=depth, samples=len(asked), **values)


@devices.enough_memory("A needle", "Lower --needle-lengths, or compute in a smaller --dtype or on --device cpu.")
@torch.no_grad()
def ask(model: Any, prompt: Prompt) -> tuple[bool, float]:
    """Return whether greedy decoding writes the key, and the sum of the log-probabilities of its tokens, in nats.

    Greedy decoding writes the key if each of its tokens ranks first after the tokens before it. One forward pass over
    prompt and key therefore gives both.
    """
    ids = torch.tensor([[*prompt.ids, *prompt.key]], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(prompt.key) + 1).logits[0, :-1]
    key: Tensor = ids[0, -len(prompt.key) :]
    logs = logits.float().log_softmax(-1)
    return bool((logits.argmax(-1) == key).all()), float(logs.gather(-1, key[:, None]).cpu().double().sum())
