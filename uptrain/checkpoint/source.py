"""Turn what a user calls a model into a local folder: a path, `demo`, or a Hub id."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

from uptrain.errors import CheckpointError, UsageError

DEMO = Path(__file__).parent.parent / "demo" / "checkpoint"
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "*.tiktoken"]


@dataclass(frozen=True)
class Source:
    """A model a user named, and the local folder that holds it; `allow_pickle` says that its pickles may be read."""

    path: Path
    name: str
    origin: Literal["folder", "hub", "demo"]
    revision: str | None = None
    allow_pickle: bool = False

    @property
    def short_name(self) -> str:
        """Return the last part of the name, fit for a folder: `llama` for `org/llama`."""
        return (self.path.name if self.origin == "folder" else self.name.rsplit("/", 1)[-1]) or "model"

    def describe(self) -> str:
        """Say where the model comes from."""
        return {
            "folder": f"the folder {self.path}",
            "demo": "uptrain's embedded demo checkpoint",
            "hub": f"{self.name} on the Hub, revision {self.revision}",
        }[self.origin]


def resolve(model: str, revision: str | None = None, allow_pickle: bool = False, weights: bool = True) -> Source:
    """Find the folder that `model` names: a folder if one exists, else `demo`, else a Hub id, downloaded.

    Without `weights`, only a Hub repository's small files are downloaded.

    Raises:
        CheckpointError: no such folder and no such repository, or the Hub can't be reached.
        UsageError: `model` can be neither a folder nor a Hub id.
    """
    try:
        path = Path(model).expanduser()
        found = path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, nobody's home, or a NUL
        raise UsageError(f"{model!r} can't be the name of a folder.", "Name one, ORG/NAME, or 'demo'.") from None
    if path.is_dir():
        return Source(path.resolve(), model, "folder", allow_pickle=allow_pickle)
    if model == "demo":
        return Source(DEMO, model, "demo")
    if found:
        raise UsageError(f"{model} is a file.", "Name the folder that holds it, with its config.json.")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UsageError(f"There is no folder {model}.", "Name a checkpoint folder, a Hub id, or 'demo'.")
    patterns = [
        *_SMALL_FILES,
        *(["*.safetensors"] if weights else []),
        *(["*.bin"] if weights and allow_pickle else []),
    ]
    with hub_errors(model, revision):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    return Source(folder, model, "hub", revision=folder.name, allow_pickle=allow_pickle)


@contextmanager
def hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence that names the host.

    Raises:
        CheckpointError: unknown, gated, unreachable, or the disk is full.
        UsageError: `model` is no Hub id.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    host = urlparse(constants.ENDPOINT).netloc
    local = "or download it elsewhere and name the local folder"
    try:
        yield
    except HFValidationError:
        raise UsageError(
            f"{model!r} is neither a folder nor a Hub id.", "Name a folder, ORG/NAME, or 'demo'."
        ) from None
    except GatedRepoError:
        raise CheckpointError(
            f"{model} is gated on {host}.", f"Ask for access there and run `hf auth login`, {local}."
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{model} on {host} has no revision {revision}.") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"There is no folder {model}, and {host} knows no such model (or it is private).",
            f"Check the spelling, run `hf auth login`, {local}.",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(f"The disk is full: {model} can't be downloaded.", "Set HF_HOME elsewhere.") from None
        raise CheckpointError(
            f"There is no folder {model}, and the Hub at {host} can't be reached.",
            f"Check the network or HF_ENDPOINT, {local}.",
        ) from None
