"""Ask transformers' own config and rotary classes what a config.json's rotation is; a program for a child process too.

`python -m uptrain.models.rotary_tables` reads a JSON list of configs and writes what `answers` returns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

from uptrain.architectures.rope_parameters import EVERY


@dataclass(frozen=True)
class Table:
    """Inverse frequencies (dims/2,), in radians per token.

    - `short`: for short texts; `long`: for texts longer than any that the config names.
    - `factor`: what cosines and sines are multiplied by.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    factor: float


def rotary_tables(config: Mapping[str, Any]) -> dict[str, Table]:
    """Return the tables of a config's own class by layer type, EVERY alone where all layers have the same.

    There are none where this transformers doesn't know the class.

    Raises:
        Exception: of any kind, where the class can't read the config.
    """
    import torch
    import transformers
    from transformers import CONFIG_MAPPING

    from uptrain.architectures.description import auto_class_name
    from uptrain.models.register import register

    register()
    if config["model_type"] not in CONFIG_MAPPING:
        return {}
    made = CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(dict(config)))  # which writes into sections
    auto = getattr(transformers, auto_class_name(config))
    modules = [sys.modules[each.__module__] for each in auto._model_mapping[type(made)].__mro__]
    module = modules[0]
    if hasattr(module, "create_sinusoidal_positions"):
        # GPT-J and CodeGen have a table of sines and cosines. Its second row has the sines of the inverse frequencies.
        sines = module.create_sinusoidal_positions(2, made.rotary_dim)[1, : made.rotary_dim // 2]
        inverse = tuple(torch.asin(sines.double()).tolist())
        return {EVERY: Table(inverse, inverse, 1.0)}
    # Our own classes take over the rotary embedding of the class that they are made from.
    rotary = next(
        value(config=made)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and name.endswith("RotaryEmbedding")
    )
    if hasattr(rotary, "inv_freq"):
        return {EVERY: _table(rotary, made, {})}
    return {kind: _table(rotary, made, {"layer_type": kind}) for kind in dict.fromkeys(made.layer_types)}


def _table(rotary: Any, config: Any, chosen: dict[str, str]) -> Table:
    import torch

    kind = chosen.get("layer_type", "")
    prefix = f"{kind}_" if kind else ""
    short = tuple(getattr(rotary, f"{prefix}inv_freq").tolist())
    beyond = torch.tensor([[4 * config.max_position_embeddings]])
    rotary(torch.zeros(1), beyond, **chosen)
    long = tuple(getattr(rotary, f"{prefix}inv_freq").tolist())
    return Table(short, long, float(getattr(rotary, f"{prefix}attention_scaling")))


def answers(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Table] | str]:
    """Return each config's tables or, where its class can't read it, the reason."""
    found: list[dict[str, Table] | str] = []
    for config in configs:
        try:
            found.append(rotary_tables(config))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def main() -> None:
    """Answer the configs on stdin; what libraries print is no answer."""
    with redirect_stdout(sys.stderr):
        found = answers(json.load(sys.stdin))
    json.dump(found, sys.stdout, default=asdict)


if __name__ == "__main__":
    main()
