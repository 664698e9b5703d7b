"""The command that measures: options and help. Bodies import what they need when they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uptrain.cli import console
from uptrain.cli.types import Sizes, check_belongs, device_option, texts_of
from uptrain.errors import UsageError

if TYPE_CHECKING:
    from uptrain.evaluation.reference import Reference


@click.command()
@click.argument("directory", metavar="MODEL")
@click.option(
    "--baseline", help="Compare with this MODEL on the same tokens: KL and top-1 agreement. Default: what MODEL was "
    "converted from, as its uptrain.json says, if that is on this machine.",
)  # fmt: skip
@click.option("--no-baseline", is_flag=True, help="Compare with nothing.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    help="Text or JSONL file, glob, or dataset name; repeatable, each is a row. Default: python-stdlib:held-out, "
    "which is here.",
)
@click.option(
    "--context",
    "contexts",
    type=Sizes(2),
    metavar="TOKENS[,TOKENS]",
    multiple=True,
    help="Window, in tokens; the same text is scored with each; repeatable. Default: 1024, or all the positions that "
    "MODEL has.",
)
@click.option("--stride", type=click.IntRange(1), help="How far the window moves. Default: half of --context.")
@click.option("--tokens", type=click.IntRange(2), default=32_768, show_default=True, help="Score so much of each text.")
@click.option(
    "--speed-context", type=Sizes(1), metavar="TOKENS[,TOKENS]", help="Measure speed after so many tokens. Default: "
    "512, or what MODEL has positions for.",
)  # fmt: skip
@click.option(
    "--speed-batch", type=Sizes(1), metavar="N[,N]", default="1", show_default=True, help="Measure speed of so many "
    "sequences at once, at each --speed-context; 1 is always among them.",
)  # fmt: skip
@click.option("--no-speed", is_flag=True, help="Leave speed out.")
@device_option
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Compute quality in this dtype.")
@click.option(
    "--task",
    "tasks",
    metavar="NAME[,NAME]",
    multiple=True,
    help="Run these tasks of lm-eval too: names, or paths of task YAML files; repeatable. Needs 'uptrain[eval]'.",
)
@click.option("--include-path", type=click.Path(), metavar="DIR", help="Of --task: look for task YAML files there too.")
@click.option("--task-limit", type=click.IntRange(1), metavar="N", help="Of --task: take N documents. Default: all.")
@click.option(
    "--needle", is_flag=True, help="Hide a pass key in the text and ask for it: retrieval by length and depth."
)
@click.option(
    "--needle-lengths", type=Sizes(1), metavar="TOKENS[,TOKENS]", help="Of --needle: prompts' lengths. Default: those "
    "of --context.",
)  # fmt: skip
@click.option(
    "--needle-depths", type=Sizes(0, 100), metavar="PERCENT[,PERCENT]", default="0,25,50,75,100", show_default=True,
    help="Of --needle: how much of the text comes before the key.",
)  # fmt: skip
@click.option(
    "--needle-trials", type=click.IntRange(1), default=10, show_default=True, help="Of --needle: prompts for each "
    "length and depth.",
)  # fmt: skip
@click.option(
    "--samples", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="Show what the models write "
    "after N openings of each text.",
)  # fmt: skip
@click.option("--sample-tokens", type=click.IntRange(1), default=48, show_default=True, help="Of --samples: how much.")
@click.option(
    "--allow-pickle", is_flag=True, help="Also read .bin weights, of either (restricted unpickling). Only if you trust "
    "them.",
)  # fmt: skip
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write the result there. Default: MODEL/eval.json, if uptrain wrote that folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate(
    directory: str,
    texts: tuple[str, ...],
    contexts: tuple[tuple[int, ...], ...],
    out: Path | None,
    as_json: bool,
    no_speed: bool,
    no_baseline: bool,
    tasks: tuple[str, ...],
    include_path: str | None,
    task_limit: int | None,
    needle: bool,
    needle_lengths: tuple[int, ...] | None,
    needle_depths: tuple[int, ...],
    needle_trials: int,
    **options: Any,
) -> None:
    """Measure MODEL's perplexity, its cache's real bytes per token and its speed, alone or against a baseline.

    Against a baseline also how far apart their predictions are, with 95 % intervals. docs/evaluation.md says how each
    figure is computed, and what the JSON holds. What is measured is added to MODEL/eval.json: what was measured before,
    on the same weights, stays.

    \b
    uptrain eval demo-gqa4
    uptrain eval demo-gqa4 --baseline demo
    uptrain eval ./llama-gqa4 --baseline ./llama --text wiki.test.txt --context 2048 --stride 512
    uptrain eval ./llama-gqa4 --baseline ./llama --text wiki.txt --text code.jsonl --context 1024,4096
    uptrain eval ./llama-gqa4 --baseline ./llama --task piqa,./my-task.yaml
    uptrain eval ./llama-gqa4 --baseline ./llama --needle --needle-lengths 1024,4096,16384
    uptrain eval ./llama-gqa4 --baseline ./llama --speed-batch 1,8 --speed-context 512,4096,16384
    """
    from uptrain.cli import evaluate_report
    from uptrain.evaluation.evaluate import evaluate as run
    from uptrain.evaluation.evaluate import save_place, write_evaluation
    from uptrain.evaluation.needle import NeedleSettings
    from uptrain.evaluation.tasks import TaskSettings

    _check_options(no_speed, bool(tasks), needle, bool(options["samples"]))
    if no_speed:
        options["repeats"] = 0
    text = texts_of(texts)
    context = [size for listed in contexts for size in listed] or None
    baseline = _baseline(directory, options.pop("baseline"), no_baseline, options["allow_pickle"])
    names = tuple(name.strip() for listed in tasks for name in listed.split(",") if name.strip())
    if names:
        options["tasks"] = TaskSettings(names, include_path, task_limit)
    if needle:
        depths = tuple(percent / 100 for percent in needle_depths)
        options["needle"] = NeedleSettings(needle_lengths or (), depths, needle_trials)
    # What can't be written is said before anything is measured.
    place = save_place(directory, out)
    with console.parts_progress() as show:
        found = run(directory, baseline, text, context=context, on_progress=show, on_note=console.note, **options)
    evaluate_report.evaluation(found, as_json)
    if place is not None:
        notes = write_evaluation(found, place)
        console.note(" ".join([f"Wrote {place}.", *notes]))


def _baseline(directory: str, named: str | None, none: bool, allow_pickle: bool) -> str | Reference | None:
    """Return what to compare with: as named, else what `directory` was converted from, where that is here."""
    if named is not None and none:
        raise UsageError(f"--no-baseline leaves out --baseline {named}.", "Give one of them.")
    if named is not None or none:
        return named
    from uptrain.evaluation.baseline import find_baseline
    from uptrain.evaluation.reference import Reference

    source, said = find_baseline(directory, allow_pickle)
    if said:
        console.note(said)
    return None if source is None else Reference(source)


def _check_options(no_speed: bool, tasks: bool, needle: bool, samples: bool) -> None:
    """Refuse what is said of a part that isn't measured."""
    check_belongs(("include_path", "task_limit"), "--task", tasks)
    check_belongs(("needle_lengths", "needle_depths", "needle_trials"), "--needle", needle)
    check_belongs(("sample_tokens",), "--samples", samples)
    context = click.get_current_context()
    for name in ("speed_context", "speed_batch"):
        if no_speed and context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"--no-speed leaves nothing for {option} to change.", "Leave one of them out.")


COMMANDS: dict[str, click.Command] = {"eval": evaluate}
"""What the command line adds, by the name it is typed under."""
