"""Which licence a result carries, and whether the models it comes from may be passed on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from uptrain.checkpoint.sidecars import names_licence
from uptrain.errors import CheckpointError, UsageError
from uptrain.publishing.hub.errors import push_errors
from uptrain.publishing.hub.history import Parent, Stage, parent_of

_DEMO_LICENCE = "apache-2.0"


@dataclass(frozen=True)
class Licence:
    """A licence by the Hub's identifier; `other` ones have a name and a link. `where` says what declares it."""

    id: str
    where: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Ancestor:
    """A Hub model in the history: is it gated, what does its card declare, and can it be seen at all."""

    name: str
    gated: bool = False
    visible: bool = True
    card: dict[str, Any] | None = None


def look_up(parents: Iterable[Parent]) -> list[Ancestor]:
    """Ask the Hub about each model of a history.

    Raises:
        UptrainError: the Hub can't be reached or answers with an error.
    """
    from huggingface_hub import model_info
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    out = []
    for parent in parents:
        with push_errors(parent.name, "looked up"):
            try:
                info = model_info(parent.name)
            except GatedRepoError:
                out.append(Ancestor(parent.name, gated=True))
                continue
            except RepositoryNotFoundError:
                # Deleted, renamed or private: its terms can't be read there, so the licence must be given.
                out.append(Ancestor(parent.name, visible=False))
                continue
            card = info.card_data.to_dict() if info.card_data else None
            out.append(Ancestor(parent.name, bool(info.gated), card=card))
    return out


def refuse_gated(ancestors: Iterable[Ancestor]) -> None:
    """Refuse to publish what comes from a gated model: the copy would have no gate.

    Raises:
        UsageError: one is gated.
    """
    for each in ancestors:
        if each.gated:
            raise UsageError(
                f"{each.name}, which this was made from, is gated: a public copy would go round its owner's gate.",
                "Add --private, or --allow-gated-base if its terms let you publish this.",
            )


def find_licence(
    directory: Path, stages: Sequence[Stage], ancestors: Sequence[Ancestor], given: str | None, card: dict[str, Any]
) -> Licence:
    """Return the licence that was given, or that DIR's own `card`, its sources or a licence text declare, in order.

    Raises:
        UsageError: nothing declares one.
    """
    texts = sorted(path.name for path in directory.iterdir() if path.is_file() and names_licence(path.name))
    text = min(texts, key=len, default=None)
    if given:
        # An `other` licence must say where it stands.
        return Licence(given.lower(), "--license", **({"link": text} if given.lower() == "other" else {}))
    known = {each.name: each for each in ancestors}
    found = _declared(card, f"{directory.name}/README.md") or next(
        filter(None, (_of_parent(parent_of(stage), known, directory) for stage in reversed(stages))), None
    )
    if found is None and text:
        return Licence("other", text, "see-licence-file", text)
    if found is None:
        raise UsageError(
            f"Nothing says under which licence {directory} may be used.",
            "Add --license with the source's one, such as apache-2.0, or put its LICENSE file into the source's folder "
            "and convert again.",
        )
    return found


def _of_parent(parent: Parent, known: dict[str, Ancestor], directory: Path) -> Licence | None:
    if parent.origin == "demo":
        return Licence(_DEMO_LICENCE, "the demo checkpoint")
    if parent.origin == "hub" and parent.name in known:
        return _declared(known[parent.name].card or {}, parent.name, _link(parent, directory))
    if parent.origin == "folder":
        return _declared(read_card(Path(parent.name))[0], f"{Path(parent.name).name}/README.md")
    return None


def _link(parent: Parent, directory: Path) -> Callable[[str], str]:
    from huggingface_hub import constants

    there = f"{constants.ENDPOINT}/{parent.name}/blob/{parent.revision or 'main'}"
    # A licence's text goes along with the weights.
    return lambda link: link if (directory / link).is_file() else f"{there}/{link}"


def _declared(card: dict[str, Any], where: str, link_from: Callable[[str], str] = str) -> Licence | None:
    name = card.get("license")
    if isinstance(name, list):
        name = name[0] if len(name) == 1 else None
    if not isinstance(name, str) or not name or name == "unknown":
        return None
    link = card.get("license_link")
    if isinstance(link, str) and not urlparse(link).scheme:
        link = link_from(link)
    title = card.get("license_name")
    return Licence(name, where, str(title) if title else None, str(link) if link else None)


def read_card(directory: Path) -> tuple[dict[str, Any], str]:
    """Return metadata and text of a folder's README.md; both are empty where it has none.

    Raises:
        CheckpointError: its metadata is not YAML.
    """
    path = directory / "README.md"
    if not path.is_file():
        return {}, ""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} can't be read: {' '.join(str(error).split())}.", "Mend its first lines."
        ) from None
    return card.data.to_dict(), card.text
