"""Whatever the Hub's client raises becomes one sentence with a way out, and the token stays out of it."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from uptrain.errors import Interrupted, UptrainError, UsageError
from uptrain.publishing.hub.errors import push_errors


class Request:
    url = "https://hub/api"


class Response:
    """As much of an answer as the client's errors look at."""

    request = Request()

    def __init__(self, status: int) -> None:
        self.status_code, self.headers = status, {"x-request-id": "1"}


def http(status: int, message: str = "", kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    response: Any = Response(status)
    return kind("500 lines of text", response=response, server_message=message)


def wrapped(error: BaseException) -> RuntimeError:
    out = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    out.__cause__ = error
    return out


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (http(401), UptrainError, "hf auth login"),
        (http(403, "no write"), UptrainError, "(no write)"),
        (http(404, kind=RepositoryNotFoundError), UptrainError, "me/model"),
        (http(401, kind=RepositoryNotFoundError), UptrainError, "me/model"),
        (http(404, kind=RevisionNotFoundError), UptrainError, "revision"),
        (http(400, "a bad\nfile name", BadRequestError), UptrainError, "400 (a bad file name)"),
        (http(413, "too large"), UptrainError, "413 (too large)"),
        (http(429), UptrainError, "requests"),
        (http(503, "maintenance"), UptrainError, "503 (maintenance)"),
        (ConnectionError("no route"), UptrainError, "(no route)"),
        (TimeoutError(), UptrainError, "TimeoutError"),
        (wrapped(http(503)), UptrainError, "503"),
        (wrapped(ConnectionResetError(errno.ECONNRESET, "reset")), UptrainError, "reach"),
        (ValueError("Invalid metadata in README.md. - no licence"), UptrainError, "no licence"),
        (KeyboardInterrupt(), Interrupted, "same command"),
    ],
)
def test_each_error_is_one_sentence_and_a_way_out(
    error: BaseException, kind: type[UptrainError], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(kind) as stop, push_errors("me/model"):
        raise error
    assert says in str(stop.value) and "\n" not in str(stop.value) and "500 lines" not in str(stop.value)


@pytest.mark.parametrize("error", [http(400, "Bearer hf_secret is bad"), ConnectionError("header hf_secret"),
                                   ValueError("hf_secret")])  # fmt: skip
def test_a_token_in_a_message_is_hidden(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(UptrainError) as stop, push_errors("me/model"):
        raise error
    assert "hf_secret" not in str(stop.value) and "***" in str(stop.value)
    assert stop.value.__cause__ is None and stop.value.__suppress_context__


def test_errors_of_this_machine_and_of_our_own_pass_through() -> None:
    for error in (FileNotFoundError(errno.ENOENT, "gone", "model.safetensors"), UsageError("mine"), RuntimeError("x")):
        with pytest.raises(type(error)) as stop, push_errors("me/model"):
            raise error
        assert stop.value is error
