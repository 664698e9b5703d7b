"""Find which prefix a checkpoint's tensor names have, and prefixes that a training tool or a larger model added."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from uptrain.architectures.projections import module_of
from uptrain.architectures.schema import Family
from uptrain.errors import CheckpointError

TOOL_PREFIXES: Mapping[str, str] = MappingProxyType(
    {
        "_orig_mod": "torch.compile",
        "module": "DistributedDataParallel",
        "_fsdp_wrapped_module": "FullyShardedDataParallel",
        "_checkpoint_wrapped_module": "activation checkpointing",
        "base_model": "peft",
    }
)
"""Parts of names that training tools add, and the tool that adds each."""
_INSIDE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts that can also be inside a name, where the tool wraps single layers."""
_OTHER_TOWERS = ("vision", "visual", "image", "audio", "speech")


@dataclass(frozen=True)
class Foreign:
    """Tensor names that are a family's, except for what a wrapper added.

    Attributes:
        example: one of the checkpoint's names.
        added: the parts of `example` that are not the family's.
        renames: patterns, and their replacements in the family's names.
        count: how many tensors have such a name.
    """

    example: str
    added: tuple[str, ...]
    renames: Mapping[str, str]
    count: int


def find_prefix(family: Family, names: Collection[str], name: str) -> str:
    """Return which of the family's prefixes a checkpoint's tensor names have.

    - `family`: the checkpoint's family.
    - `names`: its tensor names.
    - `name`: what the user called it.

    Raises:
        CheckpointError: no tensor has the family's names.
    """
    for prefix in family.prefixes:
        if _stands(family, prefix, names):
            return prefix
    refuse_foreign(family, names, name)
    raise CheckpointError(
        f"{name} says it is {family.model_type} but has no tensor {_first(family, family.prefixes[0])}.",
        "Is it an adapter? Merge it into its base first.",
    )


def refuse_foreign(family: Family, names: Collection[str], name: str) -> None:
    """Refuse a checkpoint whose tensor `names` are the family's, except for a prefix that a wrapper added.

    Raises:
        CheckpointError: there is such a prefix, with which transformers would load none of those tensors.
    """
    found = foreign_names(family, names)
    if found is None:
        return
    tools = [tool for part, tool in TOOL_PREFIXES.items() if part in ".".join(found.added).split(".")]
    of = f"of {' and '.join(tools)}" if tools else "of a model that it was part of"
    wanted = _first(family, family.prefixes[0])
    # What a file says may hold quotes, and is to be pasted into Python.
    renames = ", ".join(f"{pattern!r}: {new!r}" for pattern, new in found.renames.items())
    raise CheckpointError(
        f"{name} has the prefix {' and '.join(found.added)} {of} in {found.count} of its {len(names)} "
        f"tensor names: {found.example}, where {family.model_type} has {wanted}.",
        # Without save_original_format=False transformers would write the names that it has read.
        f"Write it without, and copy the tokenizer's files: transformers.{family.auto_class}.from_pretrained("
        f"{name!r}, dtype='auto', key_mapping={{{renames}}}).save_pretrained('NEW', save_original_format=False).",
    )


def foreign_names(family: Family, names: Collection[str]) -> Foreign | None:
    """Return what a wrapper added to the family's names; None if nothing was added or they are other names."""
    if any(_stands(family, prefix, names) for prefix in family.prefixes):
        return None
    leads: dict[str, tuple[str, str]] = {}
    for prefix in family.prefixes:
        for name in names:
            lead = _lead(name, _first(family, prefix))
            if lead is not None and not any(word in lead for word in _OTHER_TOWERS):
                leads.setdefault(lead, (name, prefix))
        if leads:
            break
    if not leads:
        return None
    plain = [_stripped(name) for name in names]
    lead = max(leads, key=lambda each: (sum(name.startswith(each) for name in plain), each))
    example, prefix = leads[lead]
    whole = example.removesuffix(_first(family, prefix))
    new = "" if prefix == family.prefixes[0] else family.prefixes[0]
    if whole != example:
        renames = {f"^{re.escape(whole)}": new}
        return Foreign(example, (whole,), renames, sum(name.startswith(whole) for name in names))
    inside = sorted({part for part in example.split(".") if part in _INSIDE})
    renames = {rf"{part}\.": "" for part in inside} | ({f"^{re.escape(lead)}": new} if lead else {})
    count = sum(any(part in name.split(".") for part in inside) for name in names)
    return Foreign(example, (*([lead] if lead else []), *(f"{part}." for part in inside)), renames, count)


def _stands(family: Family, prefix: str, names: Collection[str]) -> bool:
    """Tell whether the first layer's output projection has that prefix; a quantized projection may have no weight."""
    start = _first(family, prefix).removesuffix("weight")
    return any(name.startswith(start) for name in names)


def _first(family: Family, prefix: str) -> str:
    """Name the first layer's output projection, which every checkpoint of the family has."""
    return family.attention(prefix, 0) + module_of(family.projections, "o") + ".weight"


def _stripped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def _lead(name: str, wanted: str) -> str | None:
    """Return what precedes the family's name, without wrappers of single layers; None where it is another name."""
    plain = _stripped(name)
    if plain != wanted and not plain.endswith(f".{wanted}"):
        return None
    return plain.removesuffix(wanted)
