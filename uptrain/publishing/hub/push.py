"""Publish a checkpoint on the Hub: prepare it, then upload it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, overload

from uptrain.publishing.hub.prepare import PushSettings, prepare
from uptrain.publishing.hub.upload import Prepared, Pushed, upload


@overload
def push(directory: str | Path, repo: str, *, dry_run: Literal[False] = False, **options: Any) -> Pushed: ...
@overload
def push(directory: str | Path, repo: str, *, dry_run: Literal[True], **options: Any) -> Prepared: ...
def push(directory: str | Path, repo: str, *, dry_run: bool = False, **options: Any) -> Pushed | Prepared:
    """Check `directory`, write its model card, and upload both to the Hub in one commit.

    - `directory`: a checkpoint that uptrain wrote.
    - `repo`: the repository, OWNER/NAME; it is created if it does not exist.
    - `dry_run`: check everything and return the card and the files, but upload nothing.
    - `options`: the fields of `PushSettings`: `private`, `revision`, `create_pr`, `license`, `base_model` and
      `allow_gated_base`.

    Returns where the checkpoint is on the Hub; with `dry_run`, what would be uploaded.

    Raises:
        UptrainError: as `prepare` and `upload`.
    """
    prepared = prepare(Path(directory), repo, PushSettings(**options, dry_run=dry_run))
    return prepared if dry_run else upload(prepared)
