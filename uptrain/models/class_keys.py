"""Ask a class of transformers, without a byte of weights, how a checkpoint's tensors fit it.

Its own loading answers, on the meta device: renamed keys, experts that are joined, tied weights and keys to ignore are
what they are in `from_pretrained`. `python -m uptrain.models.class_keys` answers questions as JSON on stdin, so that a
conversion never has torch in its own process.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel

from uptrain.architectures.description import auto_class_name
from uptrain.architectures.model_class import class_named, is_language_model
from uptrain.models.checked_loading import loading_info
from uptrain.models.class_fit import Fit
from uptrain.models.register import own_class, register


def ask(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Fit:
    """Return how tensors of these names and shapes fit the class that a config.json names.

    A language model is asked of as the Auto class loads it. A class that transformers doesn't have for this family is
    answered by the family's body. A class that can't be asked gives a `Fit` with a `problem`.
    """
    register()
    with _quietly(), torch.random.fork_rng(devices=[]):
        try:
            made = _config(config)
            loader, known = _class(made, config)
            tensors = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
            _, info = loading_info(
                loader, None, config=made, state_dict=tensors, device_map={"": "meta"}, dtype=torch.float32
            )
            return Fit.of(loader.__name__, info, known)
        except Exception as error:
            # Whatever a config makes a class do; the caller has another check.
            return Fit(problem=" ".join((str(error) or type(error).__name__).split())[:500])


def _config(config: Mapping[str, Any]) -> Any:
    values = deepcopy(dict(config))  # which writes into sections
    return type(AutoConfig.for_model(values["model_type"])).from_dict(values)


def _class(made: Any, config: Mapping[str, Any]) -> tuple[Any, bool]:
    """Return the class to ask, and whether it is the one that the config means."""
    if is_language_model(config):
        return getattr(transformers, auto_class_name(config))._model_mapping[type(made)], True
    named = class_named(config) or ""
    found = own_class(named) or getattr(transformers, named, None)
    known = isinstance(found, type) and isinstance(made, getattr(found, "config_class", None) or ())
    return (found, True) if known else (AutoModel._model_mapping[type(made)], False)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers' report, which `Fit` holds, and its bars off the screen."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def main() -> None:
    """Answer the questions on stdin, each a config and shapes by name."""
    with redirect_stdout(sys.stderr):
        answers = [ask(question["config"], question["shapes"]).to_dict() for question in json.load(sys.stdin)]
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
