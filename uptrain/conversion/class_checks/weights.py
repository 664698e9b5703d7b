"""Check that a conversion's source has, and its result will have, every weight that their classes need.

transformers' own loading answers, from names and shapes alone: in this process where torch is imported already, else in
a child process, so that a conversion stays small. Answers are stored in the user's cache, and only the first conversion
of such a checkpoint waits for the child.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.model_class import class_named
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.class_checks.answers import SECONDS, AnswerFormat, find_answers
from uptrain.conversion.class_checks.names import check_kin
from uptrain.conversion.plan.planner import Plan
from uptrain.errors import CheckpointError
from uptrain.models import child_process
from uptrain.models.class_fit import Fit, check_fit, is_buffer, listed, note_of

_NEEDED = ("torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Question:
    """A config.json, and the shapes of the tensors that are to fit its class."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def text(self) -> str:
        """Return the question as JSON; equal questions have equal texts."""
        return json.dumps({"config": self.config, "shapes": dict(sorted(self.shapes.items()))}, sort_keys=True)


def check_classes(checkpoint: Checkpoint, plan: Plan, name: str) -> tuple[str, ...]:
    """Refuse a source, or a planned result, that is not all of what its class needs; return notes for the user.

    - `checkpoint`: the open source.
    - `plan`: what is made of it.
    - `name`: what the user called the source.

    Raises:
        CheckpointError: tensors are missing, have other sizes than config.json promises, or would be left out.
    """
    source = Question(checkpoint.config, {key: info.shape for key, info in checkpoint.tensors.items()})
    outputs = {operation.output.name: operation for operation in plan.operations}
    result = Question(plan.whole_config, {key: operation.output.shape for key, operation in outputs.items()})
    family = plan.source.family
    layers = plan.source.config.get(family.keys.num_hidden_layers)
    if plan.source.quantization is not None:
        # Its quantizer would have to answer, and may need a GPU.
        check_kin(plan.source)
        return (f"{name} is quantized in part, so it was checked by its tensors' names and sizes, not by its class.",)
    before, after = answers((source, result))
    problem = before.problem or after.problem
    if problem:
        check_kin(plan.source)
        where = f"{name} was checked by its tensors' names and sizes alone, without asking its class"
        return (f"{where}: {problem}",)
    check_fit(before, name, family, layers)
    check_fit(after, f"The result of {name}", plan.target.family)
    lost = [key for key in after.unexpected if not is_buffer(key, family) and key in outputs]
    lost = [key for key in lost if outputs[key].source not in before.unexpected]
    if lost:
        raise CheckpointError(
            f"The result's class {after.class_name} has no place for {listed(lost)} of {name}.", "Use another --to."
        )
    return tuple(note for note in (_unknown(before, plan.source), note_of(before, family)) if note)


def _unknown(fit: Fit, source: CheckpointDescription) -> str:
    if fit.known:
        return ""
    return (
        f"{source.name} names the class {class_named(source.config)}, which transformers does not have for its family: "
        f"only {fit.class_name} was asked what it needs."
    )


def answers(questions: Sequence[Question]) -> list[Fit]:
    """Return how the tensors of each question fit its class; a `Fit` with a `problem` where nothing can say."""
    here = "torch" in sys.modules and "transformers" in sys.modules
    texts = [question.text for question in questions]
    return find_answers(texts, FITS, lambda: _ask(questions, here), alone=not here and not _lacking())


def _lacking() -> list[str]:
    return [module for module in _NEEDED if find_spec(module) is None]


def _ask(questions: Sequence[Question], here: bool) -> list[Fit]:
    if lacking := _lacking():
        why = f"{', '.join(lacking)} not installed (pip install 'uptrain[train]')"
        return [Fit(problem=why) for _ in questions]
    if here:
        from uptrain.models.class_keys import ask

        return [ask(question.config, question.shapes) for question in questions]
    return _asked_in_child(questions)


def _asked_in_child(questions: Sequence[Question]) -> list[Fit]:
    asked = "[" + ",".join(question.text for question in questions) + "]"
    try:
        done = child_process.ask("uptrain.models.class_keys", text=asked, seconds=SECONDS)
        if done.returncode == 0:
            return [Fit.from_dict(each) for each in json.loads(done.stdout)]
        lines = done.stderr.strip().splitlines()
        why = lines[-1] if lines else f"the process that asks ended with {done.returncode}"
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        why = f"the process that asks failed ({type(error).__name__})"
    return [Fit(problem=why) for _ in questions]


FITS: AnswerFormat[Fit] = AnswerFormat(write=lambda fit: None if fit.problem else fit.to_dict(), read=Fit.from_dict)
"""A problem may be gone next time, so it is not stored."""
