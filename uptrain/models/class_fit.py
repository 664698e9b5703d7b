"""Which tensors of a checkpoint a class of transformers misses, which it has no place for, and the messages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from uptrain.architectures.schema import Family
from uptrain.errors import CheckpointError

SHOWN = 4
"""Tensors that a sentence names; of more it gives the number."""

_BUFFERS = re.compile(
    r"(^|\.)(rotary(_emb)?\..+|inv_freq|masked_bias|causal_mask|position_ids|embed_positions|_extra_state)$"
)
"""What older classes stored and today's compute, and Transformer Engine's state: no weights."""


@dataclass(frozen=True)
class Fit:
    """How the tensors of a checkpoint fit a class, by the class's own loading.

    - `class_name`: the class; `known`: config.json names it, else it is the body of its family.
    - `missing`: tensors that the class needs and the file lacks.
    - `mismatched`: a tensor's name, its shape in the file and the one that the class needs.
    - `unjoined`: tensors that the class makes of several in the file, which don't go together.
    - `unexpected`: tensors of the file that the class has no place for.
    - `problem`: why the class could not be asked, empty where it was.
    """

    class_name: str = ""
    known: bool = True
    missing: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    unjoined: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    problem: str = ""

    @classmethod
    def of(cls, class_name: str, info: Mapping[str, Any], known: bool = True) -> Fit:
        """Return the fit that a `from_pretrained` of transformers reports as loading info."""
        mismatched = [(name, tuple(stored), tuple(needed)) for name, stored, needed in info["mismatched_keys"]]
        names = {key: tuple(sorted(info.get(key) or ())) for key in ("missing_keys", "unexpected_keys", "unjoined")}
        return cls(
            class_name, known, names["missing_keys"], tuple(sorted(mismatched)), names["unjoined"],
            names["unexpected_keys"],
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Fit:
        """Return what `to_dict` gave, read from JSON again.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        mismatched = [(str(name), _sizes(stored), _sizes(needed)) for name, stored, needed in found["mismatched"]]
        return cls(
            str(found["class_name"]), bool(found["known"]), _names(found["missing"]), tuple(mismatched),
            _names(found["unjoined"]), _names(found["unexpected"]), str(found["problem"]),
        )  # fmt: skip


def _names(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list):
        raise TypeError("not a list of names")
    return tuple(map(str, found))


def _sizes(found: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in found)


def check_fit(fit: Fit, name: str, family: Family | None, layers: int | None = None) -> None:
    """Refuse a checkpoint whose weights are not all that its class needs, or of which the class leaves out a layer's.

    - `fit`: how it fits.
    - `name`: what the user called it.
    - `family`: its entry in the table; None where it has none, and then tensors beyond the class are allowed.
    - `layers`: how many layers config.json names, for the message.

    Raises:
        CheckpointError: tensors are missing, of other sizes, or no part of the class.
    """
    if fit.missing:
        raise CheckpointError(
            f"{name} lacks {listed(fit.missing)}, without which {fit.class_name} would run on random values.",
            f"Download or save it again. If it has no such part on purpose, name its class in `architectures` of "
            f"config.json, not {fit.class_name}.",
        )
    if fit.mismatched or fit.unjoined:
        found = [f"{key} is {list(stored)}, not {list(needed)}" for key, stored, needed in fit.mismatched]
        found += [f"what {key} is made of does not go together" for key in fit.unjoined]
        raise CheckpointError(
            f"{name} does not have the sizes that config.json promises to {fit.class_name}: {listed(found, '; ')}.",
            "Correct config.json (vocab_size, hidden_size, …), or download the checkpoint again.",
        )
    beyond = in_layers(fit.unexpected, family) if family is not None else ()
    if beyond:
        counted = f" ({layers} layers)" if layers else ""
        raise CheckpointError(
            f"{name} holds {listed(beyond)}, which {fit.class_name}, as config.json sets it{counted}, silently leaves "
            "out.",
            "Correct config.json, or load it with transformers and save it again if those tensors are not wanted.",
        )


def in_layers(names: Sequence[str], family: Family) -> tuple[str, ...]:
    """Return those of `names` that are weights of a layer, whatever its number; buffers of older classes aren't."""
    path = family.inside()[0]
    paths = {path, path.replace("decoder", "encoder")}
    starts = "|".join(re.escape(prefix + each) for prefix in (*family.prefixes, "") for each in paths)
    layer = re.compile(rf"({starts})\.\d+\.")
    return tuple(name for name in names if layer.match(name) and not is_buffer(name, family))


def is_buffer(name: str, family: Family | None) -> bool:
    """Tell whether a tensor is a table that older classes stored and today's compute."""
    own = family.buffers if family is not None else ()
    return bool(_BUFFERS.search(name)) or any(name.endswith(f".{buffer}") for buffer in own)


def note_of(fit: Fit, family: Family | None) -> str:
    """Return a sentence on tensors that are copied though the class has no place for them, empty where all have."""
    others = [name for name in fit.unexpected if not is_buffer(name, family)]
    if not others:
        return ""
    return f"{fit.class_name} has no place for {listed(others)}: transformers leaves them out, and they are copied."


def listed(names: Sequence[str], between: str = ", ") -> str:
    """Return the first few of `names` in one phrase, and the number of all where there are more."""
    shown = between.join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more ({len(names)} in all)"
