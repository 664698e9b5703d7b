"""Find the local folder of a model that the user named: by a path, `demo`, or a Hub id."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

from uptrain.checkpoint.download import download, is_offline, unreachable
from uptrain.checkpoint.gguf import refuse_gguf
from uptrain.errors import CheckpointError, UsageError

DEMO = Path(__file__).parent.parent / "workflows" / "demo" / "checkpoint"


@dataclass(frozen=True)
class Source:
    """A model that the user named, and the local folder that holds it.

    Attributes:
        path: the folder.
        name: what the user called the model.
        origin: where it comes from.
        revision: the commit of a Hub repository.
        listed: the names of all files of a Hub repository; `path` has those that are read. None where nothing lists
            them: for folders, and without a network for repositories that another program downloaded.
        allow_pickle: whether its pickles may be read.
    """

    path: Path
    name: str
    origin: Literal["folder", "hub", "demo"]
    revision: str | None = None
    listed: tuple[str, ...] | None = field(default=None, compare=False, repr=False)
    allow_pickle: bool = False

    @property
    def short_name(self) -> str:
        """Return the last part of the name, which can name a folder: `llama` for `org/llama`."""
        return (self.path.name if self.origin == "folder" else self.name.rsplit("/", 1)[-1]) or "model"

    def describe(self) -> str:
        """Return where the model comes from, for people."""
        return {
            "folder": f"the folder {self.path}",
            "demo": "uptrain's embedded demo checkpoint",
            "hub": f"{self.name} on the Hub, revision {self.revision}"
            + ("" if self.listed is not None else "; what of it is not in the cache stays behind"),
        }[self.origin]


def resolve(model: str, revision: str | None = None, allow_pickle: bool = False, weights: bool = True) -> Source:
    """Find the folder that `model` names: a folder if one exists, else `demo`, else a Hub id, downloaded.

    - `model`: what the user called it.
    - `revision`: a branch, tag or commit of a Hub repository, None for the main branch.
    - `allow_pickle`: whether the user trusts `.bin` weights.
    - `weights`: whether to download a Hub repository's weights and the files copied with them; without it, only the
      files that describe the model. Files in the Hub's cache need no network.

    Raises:
        CheckpointError: there is no such folder or repository, or the Hub can't be reached.
        UsageError: `model` can be neither a folder nor a Hub id.
    """
    try:
        path = Path(model).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, nobody's home, or a NUL
        raise UsageError(f"{model!r} can't be the name of a folder.", "Name one, ORG/NAME, or 'demo'.") from None
    if revision is not None and (path.is_dir() or model == "demo"):
        raise UsageError(f"--revision {revision} is for a Hub id, and {model} is here.", "Leave --revision out.")
    if path.is_dir():
        return Source(path.resolve(), model, "folder", allow_pickle=allow_pickle)
    if model == "demo":
        return Source(DEMO, model, "demo")
    if there:
        refuse_gguf(path)
        raise UsageError(f"{model} is a file.", "Name the folder that holds it, with its config.json.")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UsageError(f"There is no folder {model}.", "Name a checkpoint folder, a Hub id, or 'demo'.")
    with hub_errors(model, revision):
        found = download(model, revision, allow_pickle, weights)
    return Source(found.folder, model, "hub", found.folder.name, found.listed, allow_pickle)


@contextmanager
def hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn an error of huggingface_hub into one sentence that names the server.

    Raises:
        CheckpointError: the model is unknown or gated, the Hub can't be reached, or the disk is full.
        UsageError: `model` is not a Hub id.
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

    server = urlparse(constants.ENDPOINT).netloc
    local = "or download it elsewhere and name the local folder"
    try:
        yield
    except HFValidationError:
        raise UsageError(
            f"{model!r} is neither a folder nor a Hub id.", "Name a folder, ORG/NAME, or 'demo'."
        ) from None
    except GatedRepoError:
        raise CheckpointError(
            f"{model} is gated on {server}.", f"Ask for access there and run `hf auth login`, {local}."
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{model} on {server} has no revision {revision}.") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"There is no folder {model}, and {server} knows no such model (or it is private).",
            f"Check the spelling, run `hf auth login`, {local}.",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(f"The disk is full: {model} can't be downloaded.", "Set HF_HOME elsewhere.") from None
        cached = ", no config.json of it in the Hub's cache" if is_offline() else ""
        check = "Unset HF_HUB_OFFLINE" if is_offline() else "Check the network or HF_ENDPOINT"
        raise CheckpointError(
            f"There is no folder {model}{cached}, and {unreachable()}.", f"{check}, {local}."
        ) from None
