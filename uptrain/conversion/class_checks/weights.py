"""Check that a conversion's source has, and its result will have, every weight that their classes need.

transformers' own loading answers, from names and shapes alone: in this process where torch is imported already, else in
a child process, so that a conversion stays small. Answers are stored in the user's cache, and only the first conversion
of such a checkpoint waits for the child.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.model_class import class_named
from uptrain.checkpoint.locks import alone_in
from uptrain.checkpoint.manifest import versions
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.class_checks.names import check_kin
from uptrain.conversion.plan.planner import Plan
from uptrain.data.token_cache import cache_root
from uptrain.errors import CheckpointError
from uptrain.models import child_process
from uptrain.models.class_fit import Fit, check_fit, is_buffer, listed, note_of
from uptrain.models.target import REMOTE_CODE

_NEEDED = ("torch", "transformers", "accelerate")
_SECONDS = 600


@dataclass(frozen=True)
class Question:
    """A config.json, and the shapes of the tensors that are to fit its class."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def text(self) -> str:
        """Return the question as JSON; equal questions have equal texts."""
        return json.dumps({"config": self.config, "shapes": dict(sorted(self.shapes.items()))}, sort_keys=True)

    @property
    def digest(self) -> str:
        """Digest the question and all that decides its answer."""
        return hashlib.sha256(f"{_versions()}\n{self.text}".encode()).hexdigest()


def check_classes(checkpoint: Checkpoint, plan: Plan, name: str) -> tuple[str, ...]:
    """Refuse a source, or a planned result, that is not all of what its class needs; return notes for the user.

    Args:
        checkpoint: the open source.
        plan: what is to be made of it.
        name: what the user called the source.

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
    found = {question.digest: _stored(question) for question in questions}
    if all(found.values()):
        return [found[question.digest] or Fit() for question in questions]
    lacking = [module for module in _NEEDED if find_spec(module) is None]
    if lacking:
        why = f"{', '.join(lacking)} not installed (pip install 'uptrain[train]')"
        return [Fit(problem=why) for _ in questions]
    if "torch" in sys.modules and "transformers" in sys.modules:
        from uptrain.models.class_keys import ask

        fresh = [ask(question.config, question.shapes) for question in questions]
        _store(questions, fresh)
        return fresh
    with _alone():
        again = [_stored(question) for question in questions]
        if all(again):
            return [fit or Fit() for fit in again]
        fresh = _asked_in_child(questions)
        _store(questions, fresh)
    return fresh


def _asked_in_child(questions: Sequence[Question]) -> list[Fit]:
    asked = "[" + ",".join(question.text for question in questions) + "]"
    try:
        done = child_process.ask("uptrain.models.class_keys", text=asked, seconds=_SECONDS)
        if done.returncode == 0:
            return [Fit.from_dict(each) for each in json.loads(done.stdout)]
        lines = done.stderr.strip().splitlines()
        why = lines[-1] if lines else f"the process that asks ended with {done.returncode}"
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        why = f"the process that asks failed ({type(error).__name__})"
    return [Fit(problem=why) for _ in questions]


@cache
def _versions() -> str:
    # A change of our own classes between versions counts too.
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in REMOTE_CODE.glob("*.py"))
    return json.dumps([versions(), files])


def _place() -> Path | None:
    root = cache_root()
    return None if root is None else root / "classes"


def _stored(question: Question) -> Fit | None:
    """Return the stored answer; None where there is none that can be read."""
    place = _place()
    with suppress(OSError, ValueError, KeyError, TypeError):
        if place is not None:
            return Fit.from_dict(json.loads((place / f"{question.digest}.json").read_text()))
    return None


def _store(questions: Sequence[Question], found: Sequence[Fit]) -> None:
    """Store answers; a cache that can't be written is done without."""
    place = _place()
    if place is None:
        return
    for question, fit in zip(questions, found, strict=True):
        if fit.problem:
            continue  # it may be gone next time
        partial = place / f"{question.digest}.{os.getpid()}.partial"
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(fit.to_dict()))
            partial.replace(place / f"{question.digest}.json")


def _alone() -> AbstractContextManager[None]:
    """Let one process at a time ask, so that those that convert together start one child, not one each."""
    place = _place()
    with suppress(OSError):
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
            return alone_in(place)
    return nullcontext()
