"""The only module that prints: results on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from uptrain.formatting import size as size

if TYPE_CHECKING:
    from rich.console import Console

    from uptrain.errors import UptrainError
    from uptrain.training.metrics import TrainingStep


@cache
def _console(stderr: bool) -> Console:
    from rich.console import Console

    wrap = not (sys.stderr if stderr else sys.stdout).isatty()
    # A value between colons is text, not rich's name of an emoji.
    return Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=wrap)


def result(text: str) -> None:
    """Print one line of result."""
    _console(False).print(text, markup=False)


def result_json(value: Any) -> None:
    """Print a result as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def note(text: str) -> None:
    """Print one line that is not a result: what happens now, or the next command."""
    _console(True).print(text, markup=False, style="dim")


def fail(error: UptrainError) -> None:
    """Print an error and its hint on stderr."""
    console = _console(True)
    console.print("[bold red]Error:[/] ", end="")
    console.print(error.message, markup=False)
    if error.hint:
        console.print(error.hint, markup=False, style="dim")


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], align: Literal["left", "right"] = "right"
) -> None:
    """Print a table on stdout.

    - `title`: a line above the table; empty for none.
    - `columns`: the headings.
    - `rows`: the cells.
    - `align`: alignment of all columns after the first.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = Table(title=Text(title) if title else None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for position, column in enumerate(columns):
        out.add_column(column, justify="left" if position == 0 else align, overflow="fold", no_wrap=position == 0)
    for row in rows:
        # A value in brackets is text, not rich's markup.
        out.add_row(*map(Text, row))
    _console(False).print(out, soft_wrap=False)


def facts(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns on stdout."""
    from rich.table import Table
    from rich.text import Text

    out = Table(title=Text(title) if title else None, box=None, show_header=False, title_justify="left", pad_edge=False)
    out.add_column(style="bold", no_wrap=True)
    out.add_column(overflow="fold")
    for name, value in pairs:
        out.add_row(Text(name), Text(value))
    _console(False).print(out, soft_wrap=False)


@contextmanager
def bytes_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show bytes done, speed and time left on stderr if it is a terminal. Yields the callback that adds bytes."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=_console(True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def layer_progress() -> Callable[[int, int], None]:
    """Return a callback that prints on stderr how many layers are calibrated, and the time left.

    A call with 0 layers done starts another calibration.
    """
    import time

    began, earlier = time.monotonic(), -1

    def show(done: int, layers: int) -> None:
        nonlocal began, earlier
        if not done:
            began, earlier = time.monotonic(), -1
            return
        earlier = done - 1 if earlier < 0 else earlier  # layers of an interrupted run took no time now
        minutes, seconds = divmod(round((time.monotonic() - began) / (done - earlier) * (layers - done)), 60)
        if sys.stderr.isatty() or done == layers:
            note(f"Calibrated layer {done} of {layers}, {minutes}:{seconds:02d} left")

    return show


@contextmanager
def parts_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar per part of a measurement, with the time left, on stderr if it is a terminal.

    Yields the callback, which takes the name of the part, the amount done and the whole amount.
    """
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # A console of its own: evaluation hides what other libraries print on stderr, but not this bar.
    screen = Console(file=sys.stderr)
    with Progress(*columns, console=screen, transient=True) as progress:
        bars: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done)

        yield show


@contextmanager
def training_progress(steps: int, hidden: bool = False) -> Iterator[Callable[[TrainingStep], None]]:
    """Show step, loss, learning rate, speed, memory and time left on stderr. Yields the callback.

    A terminal shows a live line. Other files get a line per tenth of the run.

    - `steps`: the number of steps of the whole run.
    - `hidden`: print nothing.
    """
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    words = "{task.fields[loss]}  lr {task.fields[rate]}  {task.fields[speed]} tok/s  {task.fields[memory]}"
    columns = (
        TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None), TextColumn(words, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
    )  # fmt: skip
    quiet = hidden or not sys.stderr.isatty()
    progress = Progress(*columns, console=_console(True), transient=True, expand=True)
    # Not `disable`: old releases of rich print an empty line even for a disabled bar.
    with nullcontext() if quiet else progress:
        # The bar appears with the first step. Before that, text is tokenised and the model is loaded.
        task = progress.add_task("", total=steps, visible=False, loss="–", rate="–", speed="–", memory="", left="")

        def show(step: TrainingStep) -> None:
            # Pure distillation: the loss is the divergence.
            same = step.divergence is None or abs(step.divergence - step.loss) < 1e-6
            losses = f"loss {step.loss:.4f}" + ("" if same else f" KL {step.divergence:.4f}")
            progress.update(
                task, completed=step.step, visible=True, loss=losses, rate=f"{step.learning_rate:.2e}",
                speed=f"{step.tokens_per_second:,.0f}", memory=size(step.memory_bytes), left=f"{_clock(step)} left",
            )  # fmt: skip
            if hidden:
                return
            if step.skipped:
                note(step.skipped)
            elif step.held_out_loss is not None:
                note(f"Step {step.step:,}: held-out loss {step.held_out_loss:.4f}")
            elif quiet and step.step in _tenths(steps):
                # A log file or a notebook still shows progress.
                note(f"Step {step.step:,} of {steps:,}: {losses}, {_clock(step)} left")

        yield show


def _clock(step: TrainingStep) -> str:
    minutes, seconds = divmod(round(step.seconds_left), 60)
    return f"{minutes}:{seconds:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _tenths(steps: int) -> set[int]:
    return {max(1, round(steps * tenth / 10)) for tenth in range(1, 10)}
