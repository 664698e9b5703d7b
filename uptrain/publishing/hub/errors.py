"""Turn errors of huggingface_hub into errors that say what to do and never show the token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from urllib.parse import urlparse

from uptrain.errors import Interrupted, UptrainError, UsageError

_AGAIN = "Run the same command again: files that arrived are not sent again."


def hide_token(text: str) -> str:
    """Return `text` on one line, with the token replaced by ***."""
    from huggingface_hub import get_token

    token = get_token()
    plain = " ".join(text.split())
    return plain.replace(token, "***") if token else plain


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error, or None."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


@contextmanager
def push_errors(repo: str, what: str = "pushed", revision: str | None = None) -> Iterator[None]:
    """Turn any error of the block into one that names `repo`, the server and what to do.

    - `repo`: the repository.
    - `what`: what was being done to it, as a participle.
    - `revision`: the branch; None for main.

    Raises:
        UsageError: `repo` is no Hub id.
        UptrainError: no token or a wrong one, no right to write, no such repository, no connection, or a server
            error.
        Interrupted: stopped by Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("Interrupted.", _AGAIN) from None
    except Exception as error:
        cause = _cause(error)
        raise _refusal(cause, repo, what, revision) or cause from None


def _cause(error: Exception) -> BaseException:
    """Return what the network or the disk raised, where the client has wrapped it in a RuntimeError."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HTTPError | OSError):
        return error.__cause__
    return error


def _refusal(error: BaseException, repo: str, what: str, revision: str | None) -> UptrainError | None:
    """Return the error to raise instead of `error`; None if the Hub did not cause it."""
    from huggingface_hub import constants

    # HTTPError is the class of the HTTP library in use, which differs between versions of huggingface_hub.
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    server = urlparse(constants.ENDPOINT).netloc
    for kind, refusal in _refusals(repo, what, revision, server):
        if isinstance(error, kind):
            return refusal
    if isinstance(error, HfHubHTTPError):
        return UptrainError(*_of_status(error, repo, what, server))
    if isinstance(error, OSError) and error.filename:
        return None
    if isinstance(error, HTTPError | OSError):
        reason = hide_token(str(error)).rstrip(".") or type(error).__name__
        return UptrainError(
            f"{repo} can't be {what}: {server} can't be reached ({reason}).",
            f"Check the network or HF_ENDPOINT. {_AGAIN}",
        )
    if isinstance(error, ValueError):
        return UptrainError(f"{repo} can't be {what}: {hide_token(str(error)).rstrip('.')}.")
    return None


def _refusals(
    repo: str, what: str, revision: str | None, server: str
) -> tuple[tuple[type[BaseException], UptrainError], ...]:
    """Return the classes of errors that need no further look, each with the error to raise instead."""
    from huggingface_hub.errors import (
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    return (
        (HFValidationError, UsageError(f"{repo!r} is not a Hub id.", "Write OWNER/NAME.")),
        (OfflineModeIsEnabled, UptrainError(f"{repo} can't be {what}: HF_HUB_OFFLINE is set.", "Unset it.")),
        (LocalTokenNotFoundError, UptrainError(f"{repo} can't be {what}: there is no token.", _LOG_IN)),
        (
            RevisionNotFoundError,
            UptrainError(f"{repo} on {server} has no revision {revision or 'main'}.", "Check --revision."),
        ),
        # The Hub gives the same answer for repositories that don't exist and for private ones of others.
        (
            RepositoryNotFoundError,
            UptrainError(
                f"{server} has no {repo}, or not for this token.",
                f"Check the spelling, and that you have access. {_LOG_IN}",
            ),
        ),
        (
            JSONDecodeError,
            UptrainError(f"{repo} can't be {what}: {server} does not answer as a Hub does.", "Check HF_ENDPOINT."),
        ),
    )


_LOG_IN = "Run `hf auth login`, or set HF_TOKEN to a token with write access."


def _of_status(error: BaseException, repo: str, what: str, server: str) -> tuple[str, str]:
    status = status_of(error)
    said = hide_token(str(getattr(error, "server_message", None) or "")).rstrip(".")
    because = f" ({said})" if said else ""
    if status == 401:
        from huggingface_hub import get_token

        if get_token() is None:
            return f"{repo} can't be {what}: {server} wants a token, and there is none.", _LOG_IN
        return f"{repo} can't be {what}: {server} does not accept the token{because}.", _LOG_IN
    if status == 403:
        return (
            f"{repo} can't be {what}: the token may not write there{because}.",
            "Use a token with write access, name a repository of your own, or add --create-pr.",
        )
    if status == 429:
        return f"{server} accepts no more requests for now{because}.", f"Wait a few minutes. {_AGAIN}"
    if status is not None and status >= 500:
        return f"{repo} can't be {what}: {server} failed with {status}{because}.", f"Try later. {_AGAIN}"
    return f"{repo} can't be {what}: {server} refused it with {status}{because}.", _AGAIN
