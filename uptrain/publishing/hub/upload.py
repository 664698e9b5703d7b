"""Upload a prepared folder to the Hub in one commit, so that nobody loads half of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uptrain.checkpoint.adapters import ADAPTER_CONFIG
from uptrain.checkpoint.manifest import SIGNATURE
from uptrain.errors import UsageError
from uptrain.publishing.hub.errors import push_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"


@dataclass(frozen=True)
class Prepared:
    """A checked folder, ready for upload.

    - `directory`, `repo`: the folder and the repository.
    - `private`, `revision`, `create_pr`: as in `PushSettings`.
    - `card`: the text of the model card.
    - `files`: the files to upload with their bytes, the card among them.
    - `notes`: sentences for the user.
    """

    directory: Path
    repo: str
    private: bool
    revision: str | None
    create_pr: bool
    card: str
    files: dict[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Pushed:
    """A finished push.

    - `repo`, `url`: the repository and its address.
    - `commit`: the commit.
    - `pull_request`: its address, if --create-pr was given.
    - `removed`: files of an earlier push that were removed.
    """

    repo: str
    url: str
    commit: str
    pull_request: str | None
    removed: tuple[str, ...]


def upload(prepared: Prepared, progress: bool = False) -> Pushed:
    """Create the repository if it does not exist, and upload card and files in one commit.

    Files that an interrupted push has sent are not sent again. Weights, code and the signature of an earlier push are
    removed in the same commit if this push does not replace them, so that nobody loads a mixture.

    Raises:
        UsageError: `private`, but the repository is public.
        UptrainError: no token or right to write, no connection, or a server error.
        Interrupted: stopped by Ctrl-C.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo, revision = HfApi(library_name="uptrain"), prepared.repo, prepared.revision
    with push_errors(repo, revision=revision), _progress_bars(progress):
        api.create_repo(repo, private=True if prepared.private else None, exist_ok=True)
        if prepared.private and not api.model_info(repo).private:
            raise UsageError(f"{repo} exists and is public, so --private is not possible.", "Choose another name.")
        if revision not in (None, "main") and not prepared.create_pr:
            api.create_branch(repo, branch=str(revision), exist_ok=True)
        removed = _stale(api, prepared)
        operations = [
            CommitOperationAdd(name, prepared.card.encode() if name == CARD else prepared.directory / name)
            for name in prepared.files
        ]
        done = api.create_commit(
            repo,
            [*operations, *(CommitOperationDelete(name) for name in removed)],
            commit_message=f"Upload {prepared.directory.resolve().name}, made with uptrain",
            revision=revision,
            create_pr=prepared.create_pr,
        )
    return Pushed(repo, f"{api.endpoint}/{repo}", done.oid, done.pr_url, removed)


def _stale(api: HfApi, prepared: Prepared) -> tuple[str, ...]:
    revision = None if prepared.create_pr else prepared.revision
    there = api.list_repo_files(prepared.repo, revision=revision)
    return tuple(name for name in there if name not in prepared.files and "/" not in name and _of_weights(name))


def _of_weights(name: str) -> bool:
    # An adapter's config would be loaded on top of the new weights.
    return name.endswith((".safetensors", ".bin", ".index.json", ".py")) or name in (SIGNATURE, ADAPTER_CONFIG)


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
