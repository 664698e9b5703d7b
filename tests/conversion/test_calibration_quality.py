"""`--quality` sets what options do not, and is part of the plan; an estimate comes before the first layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conversion.test_calibrate import QUICK, opened, save, tokens
from uptrain.conversion.calibration import engine
from uptrain.conversion.calibration.engine import calibrate
from uptrain.conversion.calibration.layer_runner import LayerRunner
from uptrain.conversion.calibration.time_estimate import seconds_per_layer
from uptrain.conversion.calibration_quality import QUALITIES, quality_help
from uptrain.conversion.calibration_settings import CalibrationSettings
from uptrain.conversion.request import Request, option_words
from uptrain.conversion.run.prepare import plan_conversion
from uptrain.errors import UsageError
from uptrain.formatting import duration
from uptrain.workflows import SweepSettings


def request(**options: Any) -> Request:
    return Request("mqa", method="calibrated", **options)


def test_options_that_are_given_win_over_the_preset() -> None:
    for name, preset in QUALITIES.items():
        plain = request(quality=name)
        assert plain.chosen_tokens == preset.tokens
        assert plain.calibration_settings == preset.settings
        given = request(quality=name, calibration_tokens=9, repair_steps=0, seed=3)
        assert given.chosen_tokens == 9
        assert given.calibration_settings.repair_steps == 0 and given.calibration_settings.seed == 3
        assert given.calibration_settings.probes == preset.settings.probes
        assert f"{preset.tokens:,} tokens" in quality_help()
    assert request().calibration_settings == CalibrationSettings()


def test_a_better_preset_reads_and_tries_no_less() -> None:
    fast, balanced, best = QUALITIES.values()
    for less, more in ((fast, balanced), (balanced, best)):
        assert less.tokens < more.tokens
        for name in ("probes", "refitted", "trials", "repair_steps", "independent"):
            assert getattr(less.settings, name) <= getattr(more.settings, name)
        assert set(less.settings.drifts) <= set(more.settings.drifts)
        assert set(less.settings.moments) <= set(more.settings.moments)


def test_it_is_recorded_repeated_by_the_command_and_part_of_the_plan(tmp_path: Path) -> None:
    folder = save(tmp_path / "src", "llama")
    plans = {name: plan_conversion(str(folder), request(quality=name)).plan for name in QUALITIES}
    assert len({plan.digest for plan in plans.values()}) == len(QUALITIES)
    default = plan_conversion(str(folder), request()).plan
    assert default.digest == plans["balanced"].digest
    recorded = plans["fast"].request.recorded()
    assert recorded["quality"] == "fast" and recorded["repair_steps"] == QUALITIES["fast"].settings.repair_steps
    words = option_words(recorded)
    assert words[words.index("--quality") + 1] == "fast"


def test_an_unknown_one_is_refused_by_conversions_and_sweeps() -> None:
    with pytest.raises(UsageError, match="--quality bst"):
        request(quality="bst")
    with pytest.raises(UsageError, match="--quality bst"):
        SweepSettings(quality="bst").check_calibration()
    settings = SweepSettings(quality="fast")
    assert settings.calibration["quality"] == "fast"
    assert settings.to_dict()["calibration_tokens"] == QUALITIES["fast"].tokens
    assert SweepSettings(quality="fast", calibration_tokens=7).to_dict()["calibration_tokens"] == 7


def test_the_estimate_comes_once_before_the_first_layer_that_is_made(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(engine, "seconds_per_layer", lambda *_: 10.0)
    target = opened(save(tmp_path, "llama"), 1)
    events: list[Any] = []
    for index, _, _ in calibrate(target, tokens(), QUICK, estimated=events.append):
        events.append(index)
    assert events == [10.0 * len(target.before), *range(len(target.before))]


def test_the_estimate_grows_with_what_is_tried(tmp_path, monkeypatch) -> None:
    target = opened(save(tmp_path, "llama"), 1)
    runner = LayerRunner(target.source, torch.device("cpu"))
    block = next(iter(list(runner.embed(tokens(2)))))
    ticks = iter(range(10_000))
    monkeypatch.setattr("uptrain.conversion.calibration.time_estimate.time.monotonic", lambda: next(ticks))
    with runner.layer(0) as layer, torch.no_grad():
        fast, balanced, best = (
            seconds_per_layer(layer.on(0), block, preset.settings, preset.tokens // 1024)
            for preset in QUALITIES.values()
        )
        assert 0 < fast < balanced < best


def test_a_duration_is_said_in_the_unit_that_fits() -> None:
    assert [duration(seconds) for seconds in (0.2, 1, 80, 600, 7200)] == [
        "1 second", "1 second", "80 seconds", "10 minutes", "2 hours",
    ]  # fmt: skip
