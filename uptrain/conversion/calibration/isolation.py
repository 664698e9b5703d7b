"""Whether the documents of a calibration text are kept apart: where the model's class can."""

from __future__ import annotations

from torch import Tensor

from uptrain.architectures.description import CheckpointDescription
from uptrain.checkpoint.events import Events
from uptrain.conversion.calibration.layer_runner import LayerRunner
from uptrain.data.boundary import Boundary
from uptrain.models import devices


def boundary_in(
    source: CheckpointDescription, blocks: Tensor, boundary: Boundary | None, events: Events
) -> Boundary | None:
    """Return the token between documents that attention must not cross while a source is calibrated.

    None where each block is one document. A class that can't keep documents apart reads blocks as they are, as it does
    in training, and a note says so.

    - `source`: the model.
    - `blocks`: (n, T) int64, its tokens.
    - `boundary`: the token between documents, None where the tokenizer has none.
    - `events`: receives `note`.
    """
    if boundary is None or not boundary.starts(blocks.numpy()).any():
        return None
    if LayerRunner(source, devices.device()).isolates(boundary.token):
        return boundary
    events.note("This model's class can't keep the documents of a block apart: calibration reads them as one text.")
    return None
