"""Faults that the suite injected, by kind, and how many of them the tests that injected them found survived."""

from __future__ import annotations

from collections import Counter

KILLED = "killed just before a call, or in the middle of a write"
FAILED = "a call that changes something fails: full disk, EIO, read-only"
UNREAD = "a read of the source fails (EIO)"
SECOND = "a second run at a boundary of the first"
CHANGED = "the source changes at a boundary"
CALIBRATING = "killed, or the disk full, while layers are calibrated"
REAL = "real ones: SIGKILL, SIGINT, a full disk, a read-only disk"

INJECTED: Counter[str] = Counter()
SURVIVED: Counter[str] = Counter()
_NOW: Counter[str] = Counter()
"""Injected by the test that runs now."""


def struck(kind: str, times: int = 1) -> None:
    """Note that faults were injected: when they happen, not when they are planned."""
    _NOW[kind] += times


def settle(passed: bool, kind: str | None = None) -> None:
    """Close a test's account; all that it injected, of one `kind` if that is given, survived if it `passed`."""
    found = Counter({kind: _NOW.total()}) if kind and _NOW else Counter(_NOW)
    INJECTED.update(found)
    SURVIVED.update(found if passed else {})
    _NOW.clear()
