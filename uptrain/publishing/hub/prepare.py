"""Check that a checkpoint may and can be published, and write its card, before anything is uploaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uptrain.checkpoint.folder_digest import weights_digest
from uptrain.checkpoint.manifest import EVALUATION, MANIFEST, SIGNATURE, read_manifest
from uptrain.checkpoint.reader import read_config
from uptrain.checkpoint.sidecars import reading_code_of
from uptrain.checkpoint.signature import is_signed, signed_by
from uptrain.errors import CheckpointError, UptrainError, UsageError
from uptrain.publishing.hub.card import build_card
from uptrain.publishing.hub.card_metrics import CardMetrics, read_metrics
from uptrain.publishing.hub.checks import check_folder
from uptrain.publishing.hub.errors import push_errors
from uptrain.publishing.hub.history import Parent, Stage, hub_parents
from uptrain.publishing.hub.licence import Ancestor, Licence, find_licence, look_up, read_card, refuse_gated
from uptrain.publishing.hub.subject import CardSubject
from uptrain.publishing.hub.upload import CARD, Prepared


@dataclass(frozen=True, kw_only=True)
class PushSettings:
    """How a checkpoint is published.

    - `private`: create a private repository; a public one is refused.
    - `revision`: the branch to push to; created if it does not exist. None: main.
    - `create_pr`: open a pull request instead of committing to main.
    - `license`: the Hub's identifier of the licence. None: the licence of the source.
    - `base_model`: the Hub id of the source, where the history names a folder.
    - `allow_gated_base`: publish although the source is gated.
    - `dry_run`: a Hub that can't be reached is a note, not an error.
    """

    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    license: str | None = None
    base_model: str | None = None
    allow_gated_base: bool = False
    dry_run: bool = False


def prepare(
    directory: Path, repo: str, settings: PushSettings, on_bytes: Callable[[int], None] = lambda count: None
) -> Prepared:
    """Check everything that must hold before `directory` is published, and build its card. Uploads nothing.

    - `directory`: a checkpoint that uptrain wrote.
    - `repo`: the repository, OWNER/NAME.
    - `settings`: how it is published.
    - `on_bytes`: called with the number of bytes of weights that were just checked.

    Raises:
        VerificationError: a file does not match the manifest, or the manifest does not match its signature.
        CheckpointError: the folder can't be published as it is.
        UsageError: no licence, a gated source, options that contradict each other, or `repo` is not OWNER/NAME.
        UptrainError: the Hub can't be asked about the sources.
    """
    _check_names(repo, settings)
    manifest = _read_manifest(directory)
    stages = manifest["stages"]
    notes: list[str] = []
    # Terms first: reading all weights can take minutes.
    ancestors = _ancestors(stages, settings, notes)
    if not settings.private and not settings.allow_gated_base:
        refuse_gated(ancestors)
    own = read_card(directory)
    licence = find_licence(directory, _with_base(stages, settings), ancestors, settings.license, own[0])
    metrics = _metrics(directory, manifest["files"], notes)
    parents = hub_parents(stages)
    subject = CardSubject(
        repo=repo,
        stages=stages,
        config=_config(directory),
        base=settings.base_model or (parents[0].name if parents else None),
        revision=None if settings.create_pr else settings.revision,
    )
    card = _card(directory, subject, licence, metrics, own)
    if paths := dict.fromkeys(_private_paths(stages)):
        notes.append(f"{MANIFEST} names paths of this machine, which become public: {', '.join(paths)}.")
    _, manifest = check_folder(directory, on_bytes, notes.append)
    files = _files(directory, manifest, metrics is not None, notes)
    return Prepared(
        directory=directory,
        repo=repo,
        private=settings.private,
        revision=settings.revision,
        create_pr=settings.create_pr,
        card=card,
        files={CARD: len(card.encode()), **files},
        notes=tuple(notes),
    )


def _read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest, unverified except for its signature."""
    manifest = read_manifest(directory) if directory.is_dir() else None
    if manifest is None:
        check_folder(directory)  # raises the error that names what is missing
        raise AssertionError
    if is_signed(directory):
        signed_by(directory)
    return manifest


def _with_base(stages: list[Stage], settings: PushSettings) -> list[Stage]:
    if settings.base_model is None:
        return stages
    return [{"source": {"name": settings.base_model, "origin": "hub"}}, *stages]


def _metrics(directory: Path, files: Mapping[str, Any], notes: list[str]) -> CardMetrics | None:
    """Return the metrics of eval.json, unless they belong to other weights."""
    # An eval.json that the manifest lists existed before the folder was written, so it belongs to earlier weights.
    metrics = read_metrics(directory) if EVALUATION not in files else None
    if metrics is not None and metrics.weights not in ("", weights_digest(directory, files)):
        notes.append(f"{EVALUATION} measured other weights than these, so it is not uploaded and not in the card.")
        return None
    return metrics


def _card(
    directory: Path,
    subject: CardSubject,
    licence: Licence,
    metrics: CardMetrics | None,
    own: tuple[dict[str, Any], str],
) -> str:
    try:
        return str(build_card(subject, licence, metrics, own))
    except ValueError as error:
        raise UsageError(
            f"{directory / CARD} has metadata that the Hub does not accept: {error}.", "Correct its first lines."
        ) from None
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{directory / MANIFEST} has a history with parts missing.", "Convert again.") from None


def _config(directory: Path) -> dict[str, Any]:
    """Return config.json, with the code for reading input that any config names: the card must mention it."""
    config = read_config(directory)
    reading = reading_code_of(directory)
    return {**config, "auto_map": {**config.get("auto_map", {}), **reading}} if reading else config


def _check_names(repo: str, settings: PushSettings) -> None:
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    for name in filter(None, (repo, settings.base_model)):
        with push_errors(name):
            validate_repo_id(name)
        if name.count("/") != 1:
            raise UsageError(f"{name} has no owner.", f"Write OWNER/{name}.")
    if settings.create_pr and settings.revision not in (None, "main"):
        raise UsageError(
            f"--create-pr proposes a change to main, not to {settings.revision}.", "Leave one of them out."
        )


def _ancestors(stages: list[Stage], settings: PushSettings, notes: list[str]) -> list[Ancestor]:
    base_model = settings.base_model
    parents = [*([Parent(base_model, "hub")] if base_model else []), *hub_parents(stages)]
    try:
        found = look_up({parent.name: parent for parent in parents}.values())
    except UptrainError as error:
        if not settings.dry_run:
            raise
        notes.append(f"{error.message} So its licence and its gate are not checked.")
        return []
    for each in found:
        if not each.visible and each.name == base_model:
            raise UsageError(
                f"--base-model {base_model} is not on the Hub, or you have no access.", "Check the spelling."
            )
        if not each.visible:
            notes.append(f"{each.name}, which this was made from, is not on the Hub, or you have no access.")
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
        notes.append(f"Not in {MANIFEST}, so not uploaded: {', '.join(left)}.")
    return {name: (directory / name).stat().st_size for name in sorted(names)}
