"""Publish a checkpoint on the Hub: check that it may and can be, and describe it, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from uptrain.checkpoint.manifest import EVALUATION, MANIFEST, SIGNATURE, read_manifest
from uptrain.checkpoint.reader import read_config
from uptrain.checkpoint.sidecars import reading_code_of
from uptrain.checkpoint.signature import is_signed, signed_by
from uptrain.checkpoint.weights import weights_digest
from uptrain.errors import CheckpointError, UptrainError, UsageError
from uptrain.publishing.hub.card import build_card
from uptrain.publishing.hub.checks import check_folder
from uptrain.publishing.hub.errors import push_errors
from uptrain.publishing.hub.figures import read_figures
from uptrain.publishing.hub.history import Parent, Stage, hub_parents
from uptrain.publishing.hub.licence import Ancestor, find_licence, look_up, read_card, refuse_gated
from uptrain.publishing.hub.subject import Subject
from uptrain.publishing.hub.upload import CARD, Prepared, Pushed, upload


def push(directory: str | Path, repo: str, **options: Any) -> Pushed:
    """Check `directory`, build its card and upload both to `repo`; options as for `prepare`.

    Raises:
        UptrainError: as `prepare` and `upload`.
    """
    return upload(prepare(Path(directory), repo, **options))


def prepare(
    directory: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    allow_gated_base: bool = False,
    dry: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Prepared:
    """Check everything that must hold before `directory` is published, and build its card; nothing is uploaded.

    `license` and `base_model` (a Hub id) say what the history can't. With `dry`, a Hub that can't be reached is a note.

    Raises:
        VerificationError: a file does not match the manifest, or the manifest its signature.
        CheckpointError: the folder can't be published as it is.
        UsageError: no licence, a gated source, options that contradict each other, or `repo` is no OWNER/NAME.
        UptrainError: the Hub can't be asked about the sources.
    """
    _check_names(repo, base_model, revision, create_pr)
    early = read_manifest(directory) if directory.is_dir() else None
    if early is None:
        # Says what is missing.
        check_folder(directory)
        raise AssertionError
    if is_signed(directory):
        signed_by(directory)
    stages = early["stages"]
    notes: list[str] = []
    # Terms first: reading all weights can take minutes.
    ancestors = _ancestors(stages, base_model, dry, notes)
    if not private and not allow_gated_base:
        refuse_gated(ancestors)
    own = read_card(directory)
    named: list[Stage] = [{"source": {"name": base_model, "origin": "hub"}}] if base_model else []
    licence = find_licence(directory, [*named, *stages], ancestors, license, own[0])
    parents = hub_parents(stages)
    base = base_model or (parents[0].name if parents else None)
    # One that is listed was there when the folder was written, so it is of the weights before.
    figures = read_figures(directory) if EVALUATION not in early["files"] else None
    if figures is not None and figures.weights not in ("", weights_digest(directory, early["files"])):
        notes.append(f"{EVALUATION} measured other weights than these, so it stays here and the card has none of it.")
        figures = None
    subject = Subject(repo, stages, _config(directory), base, None if create_pr else revision)
    try:
        card = str(build_card(subject, licence, figures, own))
    except ValueError as error:
        raise UsageError(f"{directory / CARD} has metadata that no card takes: {error}.", "Mend its head.") from None
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{directory / MANIFEST} has a history with parts missing.", "Convert again.") from None
    if paths := dict.fromkeys(_private_paths(stages)):
        notes.append(f"{MANIFEST} names paths of this machine, which become readable: {', '.join(paths)}.")
    _, manifest = check_folder(directory, on_bytes, notes.append)
    files = _files(directory, manifest, figures is not None, notes)
    return Prepared(
        directory, repo, private, revision, create_pr, card, {CARD: len(card.encode()), **files}, tuple(notes)
    )


def _config(directory: Path) -> dict[str, Any]:
    """Return config.json with the code that any config names for reading input, which a card must mention."""
    config = read_config(directory)
    reading = reading_code_of(directory)
    return {**config, "auto_map": {**config.get("auto_map", {}), **reading}} if reading else config


def _check_names(repo: str, base_model: str | None, revision: str | None, create_pr: bool) -> None:
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    for name in filter(None, (repo, base_model)):
        with push_errors(name):
            validate_repo_id(name)
        if name.count("/") != 1:
            raise UsageError(f"{name} has no owner.", f"Write OWNER/{name}.")
    if create_pr and revision not in (None, "main"):
        raise UsageError(f"--create-pr proposes a change of main, not of {revision}.", "Leave one of them out.")


def _ancestors(stages: list[Stage], base_model: str | None, dry: bool, notes: list[str]) -> list[Ancestor]:
    parents = [*([Parent(base_model, "hub")] if base_model else []), *hub_parents(stages)]
    try:
        found = look_up({parent.name: parent for parent in parents}.values())
    except UptrainError as error:
        if not dry:
            raise
        notes.append(f"{error.message} So its licence and gate are not checked.")
        return []
    for each in found:
        if not each.visible and each.name == base_model:
            raise UsageError(f"--base-model {base_model} is not on the Hub, or not for you.", "Check the spelling.")
        if not each.visible:
            notes.append(f"{each.name}, which this was made from, is not on the Hub, or not for you.")
    return found


def _private_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _private_paths(each)
    elif isinstance(value, str) and Path(value).is_absolute():
        yield value


def _files(directory: Path, manifest: dict[str, Any], evaluated: bool, notes: list[str]) -> dict[str, int]:
    names = [name for name in manifest["files"] if name != CARD]
    names += [MANIFEST, *([SIGNATURE] if is_signed(directory) else [])]
    names += [EVALUATION] if evaluated and EVALUATION not in names else []
    left = [
        path.relative_to(directory).as_posix()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.relative_to(directory).as_posix() not in (*names, CARD)
    ]
    if left:
        notes.append(f"Not in {MANIFEST}, so left here: {', '.join(left)}.")
    return {name: (directory / name).stat().st_size for name in sorted(names)}
