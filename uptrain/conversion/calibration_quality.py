"""How much a calibration reads and tries: presets by name, for users who would rather not set each option."""

from __future__ import annotations

from dataclasses import dataclass

from uptrain.conversion.calibration_settings import CalibrationSettings
from uptrain.errors import UsageError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class CalibrationQuality:
    """A preset of `--quality`. Options that are given win over it.

    - `name`: its name.
    - `summary`: what it is for.
    - `tokens`: how many tokens of calibration text are read at most.
    - `settings`: what is tried.
    """

    name: str
    summary: str
    tokens: int
    settings: CalibrationSettings

    def described(self) -> str:
        """Return the preset in one phrase, with the options that it stands for."""
        return f"{self.name}: {self.summary} ({self.tokens:,} tokens, {self.settings.repair_steps} steps)"


_PRESETS = (
    CalibrationQuality(
        name="fast",
        summary="a first look",
        tokens=16_384,
        settings=CalibrationSettings(probes=4, trials=6, drifts=(0.0, 1.0), repair_steps=10),
    ),
    CalibrationQuality(name="balanced", summary="the default", tokens=65_536, settings=CalibrationSettings()),
    CalibrationQuality(
        name="best",
        summary="more text, more candidates",
        tokens=262_144,
        settings=CalibrationSettings(
            probes=16,
            moments=("both", "sequence", "original"),
            refitted=3,
            trials=24,
            drifts=(0.0, 0.25, 0.5, 0.75, 1.0),
            independent=True,
            repair_steps=120,
        ),
    ),
)
QUALITIES = {preset.name: preset for preset in _PRESETS}
"""Every preset by its name, the quickest first."""
DEFAULT_QUALITY = "balanced"


def quality_named(name: str | None) -> CalibrationQuality:
    """Return a preset, the default for None.

    Raises:
        UsageError: there is none of this name.
    """
    found = QUALITIES.get(DEFAULT_QUALITY if name is None else name)
    if found is None:
        raise UsageError(
            f"--quality {name} is not known. Use {', '.join(QUALITIES)}.", did_you_mean(str(name), QUALITIES)
        )
    return found


def quality_help() -> str:
    """Return what each preset stands for."""
    return "; ".join(preset.described() for preset in _PRESETS)
