"""What hostile files are made of: values of every wrong kind, and small damage to right ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

NAMES = [
    "../evil.safetensors", "/etc/passwd", "C:\\evil.safetensors", "..\\evil.safetensors", "sub/evil.safetensors",
    "a\0b", "\n\x1b[31mred", "\ud800", "x" * 5000, "", ".", "..", "~", "~nobody/x", "model.safetensors", "ü",
    "{prefix}",     "__metadata__", "NUL.safetensors", "link.safetensors", "http://evil/x",
]  # fmt: skip

NUMBERS = [
    0, -1, 1, 2, 3, 7, 64, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, 10**400, -(2**63), 0.0, 0.5, -0.5, 1e-320, 1e308,
    float("inf"), float("-inf"), float("nan"),
]  # fmt: skip

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(NAMES),
    st.integers(-3, 70),
    st.floats(),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
"""Any JSON value, and some that JSON has no words for."""


@st.composite
def damaged(draw: st.DrawFn, base: Any, keys: tuple[str, ...] = (), most: int = 3) -> Any:
    """Return a copy of nested `base` with up to `most` places removed, replaced or added, `keys` among them."""
    value = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, most))):
        place = value
        while True:
            inner = _entries(place)
            deeper = [key for key in inner if isinstance(place[key], dict | list) and place[key]]
            if not deeper or draw(st.integers(0, 2)) == 0:
                break
            place = place[draw(st.sampled_from(deeper))]
        inner = _entries(place)
        if isinstance(place, list):
            if inner:
                place[draw(st.sampled_from(inner))] = draw(values)
            continue
        key = draw(st.sampled_from([*inner, *keys]) if (inner or keys) else st.text(max_size=6))
        action = draw(st.integers(0, 4))
        if action == 0:
            place.pop(key, None)
        elif action == 1 and key in place:
            place[draw(st.sampled_from(NAMES))] = place.pop(key)
        else:
            place[key] = draw(values)
    return value


_ALIKE: dict[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.sampled_from([0, 1, 2, 7, 2**31, 2**32 - 1, 2**40]) | st.integers(0, 20),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=4) | st.sampled_from(["", "a", "b", " ", "x*", "A", "B", "\u2581", "AAAA", "[", "ab" * 40]),
}


@st.composite
def retouched(draw: st.DrawFn, base: Any, most: int = 3) -> Any:
    """Return a copy of nested `base` with up to `most` of its values replaced by others of their type."""
    value = copy.deepcopy(base)
    places = list(_leaves(value))
    for _ in range(draw(st.integers(0, most)) if places else 0):
        place, key = draw(st.sampled_from(places))
        place[key] = draw(_ALIKE[type(place[key])])
    return value


def _leaves(place: Any) -> Iterator[tuple[Any, Any]]:
    for key in _entries(place):
        if isinstance(place[key], dict | list):
            yield from _leaves(place[key])
        elif type(place[key]) in _ALIKE and key not in ("type", "version"):
            yield place, key


def _entries(place: Any) -> list[Any]:
    return list(place) if isinstance(place, dict) else list(range(len(place)))


@st.composite
def as_json(draw: st.DrawFn, value: st.SearchStrategy[Any]) -> bytes:
    """Write a value as JSON, now and then with a byte changed, cut off, nested deep or a key twice."""
    text = json.dumps(draw(value)).encode()
    action = draw(st.integers(0, 12))
    if action == 0 and text:
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + bytes([draw(st.integers(0, 255))]) + text[at + 1 :]
    elif action == 1:
        text = text[: draw(st.integers(0, len(text)))]
    elif action == 2:
        text = b'{"a":' * 3000 + text + b"}" * 3000
    elif action == 3 and text.startswith(b"{") and len(text) > 2:
        text = text[:-1] + b"," + text[1:]
    elif action == 4:
        text = text.decode().encode(draw(st.sampled_from(["utf-16", "utf-8-sig", "latin-1"])), "replace")
    elif action == 5:
        text = draw(st.binary(max_size=40))
    return text
