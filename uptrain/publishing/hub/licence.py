"""Find the licence of a result, and refuse to publish what comes from a gated model."""

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
    """A licence.

    - `id`: the Hub's identifier, `other` for one that the Hub does not know.
    - `where`: what declares it.
    - `name`, `link`: of an `other` licence.
    """

    id: str
    where: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Ancestor:
    """A Hub model of the history.

    - `name`: its Hub id.
    - `gated`: whether users must accept terms.
    - `visible`: whether the Hub shows it to this user.
    - `card`: the metadata of its card.
    """

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
                # Deleted, renamed or private: its terms can't be read, so the user must name the licence.
                out.append(Ancestor(parent.name, visible=False))
                continue
            card = info.card_data.to_dict() if info.card_data else None
            out.append(Ancestor(parent.name, bool(info.gated), card=card))
    return out


def refuse_gated(ancestors: Iterable[Ancestor]) -> None:
    """Refuse to publish a checkpoint of a gated model, because the copy would have no gate.

    Raises:
        UsageError: one of the models is gated.
    """
    for each in ancestors:
        if each.gated:
            raise UsageError(
                f"{each.name}, which this was made from, is gated, and a public copy would not be.",
                "Add --private, or --allow-gated-base if its terms allow you to publish this.",
            )


def find_licence(
    directory: Path, stages: Sequence[Stage], ancestors: Sequence[Ancestor], given: str | None, card: dict[str, Any]
) -> Licence:
    """Return the licence: `given`, else that of the folder's card, of its sources or of a licence file, in this order.

    - `directory`: the folder to publish.
    - `stages`: its history.
    - `ancestors`: the Hub models of the history.
    - `given`: the value of --license.
    - `card`: the metadata of the folder's README.md.

    Raises:
        UsageError: none of them declares a licence.
    """
    texts = sorted(path.name for path in directory.iterdir() if path.is_file() and names_licence(path.name))
    text = min(texts, key=len, default=None)
    if given:
        # An `other` licence must have a link.
        return Licence(given.lower(), "--license", **({"link": text} if given.lower() == "other" else {}))
    known = {each.name: each for each in ancestors}
    found = _declared(card, f"{directory.name}/README.md") or next(
        filter(None, (_of_parent(parent_of(stage), known, directory) for stage in reversed(stages))), None
    )
    if found is None and text:
        return Licence("other", text, "see-licence-file", text)
    if found is None:
        raise UsageError(
            f"The licence of {directory} is not declared anywhere.",
            "Add --license with that of the source, such as apache-2.0. Or put its LICENSE file into the source's "
            "folder and convert again.",
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
    # The licence's text is copied with the weights.
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
    """Return metadata and text of a folder's README.md; both are empty if there is none.

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
            f"{path} can't be read: {' '.join(str(error).split())}.", "Correct its first lines."
        ) from None
    return card.data.to_dict(), card.text
