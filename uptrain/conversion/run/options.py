"""How a conversion runs: settings that change neither its plan nor its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from uptrain.conversion.request import Request
from uptrain.errors import UsageError

if TYPE_CHECKING:
    from uptrain.conversion.calibration.text import SharedCalibration

MEMORY = 4 * 2**30
"""Default number of bytes that a process may hold while it calibrates."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a conversion runs. No option changes the bytes of the result's weights.

    - `join`: share the work with other processes that make the same call with the same `out` at the same time.
    - `diagnose`: measure every layer too: the energy that each method explains, and the similarity of the heads that
      are merged.
    - `memory`: bytes that this process may hold while it calibrates; None stands for `MEMORY`.
    - `shared`: what calibrations of one source have in common, such as its tokens and activations.
    """

    join: bool = False
    diagnose: bool = False
    memory: int | None = None
    shared: SharedCalibration | None = None

    @property
    def calibration_memory(self) -> int:
        """Return the bytes that this process may hold while it calibrates."""
        return MEMORY if self.memory is None else self.memory

    def check(self, request: Request) -> None:
        """Refuse options that have no effect on this request.

        Raises:
            UsageError: `diagnose` for a latent, or `memory` where nothing is calibrated.
        """
        if self.diagnose and request.kind.latent:
            raise UsageError(
                "--diagnose compares heads that come to share one, and --to mla has none.", "Leave --diagnose out."
            )
        if self.memory is not None and not request.chosen_method.needs_text:
            raise UsageError(
                f"--memory is for --method calibrated, not {request.method}.",
                "Leave it out: other methods hold a few layers at a time, as --dry-run says.",
            )
