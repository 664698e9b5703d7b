"""Try hostile input on what users call, and hold it to one rule: it works, or it is refused in one sentence."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings

from uptrain.errors import UptrainError

TALLY: Counter[str] = Counter()
"""Inputs tried, by what became of them."""

SECONDS = 3
"""Of the processor's time: an input that takes as long hangs, for an ordinary one takes a hundredth of one."""
WAIT = 90
"""Seconds by the clock, for an input that waits for something."""

ALL = 2_500
"""Inputs of an ordinary run."""


class Hang(BaseException):
    """Not an Exception, so that no handler takes it for one."""


def inputs(count: int) -> settings:
    """Return the settings of a test that tries `count` inputs in an ordinary run, and its share in a long one."""
    asked = int(os.environ.get("UPTRAIN_FUZZ_INPUTS", ALL))
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=max(1, count * asked // ALL), deadline=None, suppress_health_check=checks, print_blob=True
    )


def attempt(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, str]:
    """Call it; return its value, and the sentence that refused the input or an empty one.

    Whatever else it raises, tracebacks to a user, fails the test; so does a hang.
    """
    try:
        with _limited():
            value, sentence = function(*args, **options), ""
    except Hang:
        raise AssertionError("it hangs") from None
    except UptrainError as error:
        value, sentence = None, str(error)
        assert sentence.strip() and sentence.isprintable() and len(sentence) < 5000, repr(sentence)
    TALLY["refused" if sentence else "accepted"] += 1
    return value, sentence


@contextmanager
def _limited() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    clocks = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAIT))
    before = [signal.signal(number, ring) for number, _, _ in clocks]
    for _, timer, seconds in clocks:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(clocks, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
