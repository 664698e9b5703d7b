"""The demo, on the embedded checkpoint: convert to shared heads, measure, uptrain, measure again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uptrain.checkpoint.events import Events
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.evaluation import Evaluation, EvaluationSettings, evaluate
from uptrain.evaluation.result import ModelMetrics
from uptrain.training import recipes

RECIPE = "demo-uptrain"
GROUPS = 4
TOKENS = 16_384
UPTRAINED_ON = 204_800
"""Tokens of uptraining: half the recipe's, so that two cores without bfloat16 take less than two minutes for all."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Metrics of the three models; both evaluations compare with the original on the same held-out tokens."""

    original: ModelMetrics
    converted: Evaluation
    uptrained: Evaluation
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "original": self.converted.to_dict()["baseline"],
            "converted": self.converted.to_dict(),
            "uptrained": self.uptrained.to_dict(),
            "folder": str(self.folder),
        }


def run_demo(
    out: Path,
    *,
    tokens: int = TOKENS,
    overrides: tuple[str, ...] = (),
    events: Events = Events(),
) -> Demo:
    """Convert the demo into `out`, uptrain it by the shipped recipe, and measure both against the original.

    - `out`: the folder of both checkpoints.
    - `tokens`: how many held-out tokens each evaluation scores.
    - `overrides`: `key=value` of the recipe, applied after the demo's own.
    - `events`: `note` receives each stage as a sentence, `step` each training step.

    Raises:
        UptrainError: as `convert`, `train` and `evaluate`.
    """
    from uptrain.training.run import train

    say = events.note
    converted, uptrained = out / f"demo-gqa{GROUPS}", out / f"demo-gqa{GROUPS}-uptrained"
    say(f"Converting demo (8 key/value heads) to {GROUPS} with mean pooling → {converted}")
    convert("demo", converted, Request(target="gqa", groups=GROUPS), overwrite=True)
    say("Measuring it against the original on held-out text")
    before = evaluate(str(converted), EvaluationSettings(tokens=tokens), baseline="demo")
    say(f"Uptraining it with recipes/{RECIPE}.yaml → {uptrained}")
    given = (f"model={converted}", f"output={uptrained}", "overwrite=true", "held_out=[]", f"tokens={UPTRAINED_ON}")
    train(recipes.load_recipe(RECIPE, (*given, *overrides)), restart=True, events=Events(step=events.step))
    say("Measuring the result")
    after = evaluate(str(uptrained), EvaluationSettings(tokens=tokens), baseline="demo")
    assert before.baseline is not None
    return Demo(original=before.baseline, converted=before, uptrained=after, folder=out)
