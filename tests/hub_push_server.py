"""A loopback Hub in memory: repositories, commits, LFS objects and tokens, behind the real client's endpoints."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import yaml

TOKEN = "hf_right"
OWNER = "me"


@dataclass
class Repository:
    """Branches and commits, each a mapping of path to bytes; `gated` and `private` as the Hub has them."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {branch}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """All repositories, what was asked, and which requests are to fail: (method, path pattern, status, message)."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    failures: list[tuple[str, str, int, str]] = field(default_factory=list)
    storage_open: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.storage_open.set()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.find(revision) or ""]

    def add(self, name: str, files: dict[str, bytes], **flags: bool) -> None:
        self.repositories[name] = Repository(**flags)
        self.repositories[name].commit("main", files)

    def writes(self) -> list[tuple[str, str]]:
        return [(method, path) for method, path in self.requests if method not in ("GET", "HEAD")]


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", message: str = "", body: Any = None) -> None:
        super().__init__(message)
        self.status, self.body = status, body if body is not None else {"error": message}
        self.headers = {key: value for key, value in (("X-Error-Code", code), ("X-Error-Message", message)) if value}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        url = urlparse(self.path)
        body = self.body()
        path = unquote(url.path)
        self.hub.requests.append((self.command, path))
        try:
            for failure in self.hub.failures:
                if self.command == failure[0] and re.search(failure[1], path):
                    raise Refused(failure[2], message=failure[3])
            status, (data, headers) = 200, self.route(path, parse_qs(url.query), body)
        except Refused as refused:
            status, data, headers = refused.status, json.dumps(refused.body).encode(), refused.headers
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[bytes, dict[str, str]]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            raise Refused(401, message="Invalid credentials in Authorization header")
        if self.command in ("GET", "HEAD"):
            return self.read(path, token)
        if self.command == "PUT":
            self.hub.storage_open.wait(60)
            oid = path.rsplit("/", 1)[1]
            if hashlib.sha256(body).hexdigest() != oid:
                raise Refused(400, message="wrong bytes")
            self.hub.objects[oid] = body
            return b"", {}
        if path == "/api/validate-yaml":
            return self.json(validated(json.loads(body)["content"]))
        if not token:
            raise Refused(401, message="Invalid username or password.")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git/info/lfs/objects)?/(\w+)(?:/(.+))?", path)
        assert found, path
        if not found[1].startswith(f"{OWNER}/") and "create_pr" not in query and found[2] in ("commit", "branch"):
            raise Refused(403, message="You have no write access")
        repository = self.repository(found[1], token)
        return getattr(self, f"post_{found[2]}")(repository, found[1], found[3], query, body)  # type: ignore[no-any-return]

    def json(self, value: Any) -> tuple[bytes, dict[str, str]]:
        return json.dumps(value).encode(), {}

    def repository(self, name: str, token: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not token):
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        return repository

    def create(self, asked: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != OWNER:
            raise Refused(403, message=f"You don't have the rights to create a model under {asked['organization']}")
        url = {"url": f"{self.origin()}/{name}"}
        if name in self.hub.repositories:
            raise Refused(409, message="You already created this model repo", body={**url, "error": "exists"})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return self.json(url)

    def origin(self) -> str:
        return f"http://{self.headers['Host']}"

    def post_preupload(self, repository: Repository, name: str, revision: str, query: Any, body: bytes) -> Any:
        sha = repository.find(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        there, out = repository.commits[sha], []
        for file in json.loads(body)["files"]:
            lfs, old = _is_lfs(file["path"]), there.get(file["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if lfs else git_oid(old)
            mode = "lfs" if lfs else "regular"
            out.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.json({"files": out})

    def post_batch(self, repository: Repository, name: str, rest: str, query: Any, body: bytes) -> Any:
        objects = []
        for each in json.loads(body)["objects"]:
            upload = {"href": f"{self.origin()}/storage/{each['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.origin()}/{name}.git/info/lfs/objects/verify"}}
            objects.append({**each, **({} if each["oid"] in self.hub.objects else {"actions": actions})})
        return self.json({"transfer": "basic", "objects": objects})

    def post_verify(self, repository: Repository, name: str, rest: str, query: Any, body: bytes) -> Any:
        asked = json.loads(body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, message="no such object")
        return self.json({})

    def post_branch(self, repository: Repository, name: str, branch: str, query: Any, body: bytes) -> Any:
        if branch in repository.branches:
            raise Refused(409, message="Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return self.json({})

    def post_commit(self, repository: Repository, name: str, revision: str, query: Any, body: bytes) -> Any:
        sha = repository.find(revision)
        assert sha is not None
        files = dict(repository.commits[sha])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        number = sum(branch.startswith("refs/pr/") for branch in repository.branches) + 1
        branch = f"refs/pr/{number}" if "create_pr" in query else revision
        sha = repository.commit(branch, files)
        out = {"commitUrl": f"{self.origin()}/{name}/commit/{sha}", "commitOid": sha, "commitMessage": ""}
        return self.json({**out, "pullRequestUrl": f"{self.origin()}/{name}/discussions/{number}"})

    def read(self, path: str, token: str) -> tuple[bytes, dict[str, str]]:
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository, sha = self.commit(found[1], found[2], token)
            if repository.gated:
                raise Refused(403, "GatedRepo", f"Access to model {found[1]} is restricted")
            if found[3] not in repository.commits[sha]:
                raise Refused(404, "EntryNotFound", "Entry not found")
            return self.file(repository.commits[sha][found[3]], sha)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path)
        if not found:
            raise Refused(404, message="no such page")
        repository, sha = self.commit(found[1], found[3] or "main", token)
        files = repository.commits[sha]
        if found[2] == "tree":
            listed = [{"type": "file", "path": name, "oid": git_oid(data), "size": len(data)}
                      for name, data in sorted(files.items())]  # fmt: skip
            return self.json(listed)
        info = {"id": found[1], "sha": sha, "private": repository.private, "tags": [],
                "gated": "manual" if repository.gated else False,
                "siblings": [{"rfilename": name} for name in files],
                "cardData": front_matter(files.get("README.md", b"").decode())}  # fmt: skip
        return self.json(info)

    def commit(self, name: str, revision: str, token: str) -> tuple[Repository, str]:
        repository = self.repository(name, token)
        sha = repository.find(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        return repository, sha

    def file(self, data: bytes, sha: str) -> tuple[bytes, dict[str, str]]:
        return data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": sha}


def front_matter(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    out: dict[str, Any] = yaml.safe_load(found[1]) if found else {}
    return out


def validated(text: str) -> dict[str, Any]:
    """Check what the Hub's own validator is strict about."""
    data, errors = front_matter(text), []
    if not isinstance(data.get("license"), str):
        errors.append('"license" must be a string')
    if data.get("base_model_relation", "finetune") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append('"base_model_relation" must be one of adapter, finetune, merge, quantized')
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                errors.append("model-index needs task and dataset")
            if not all(isinstance(metric["value"], int | float) for metric in result["metrics"]):
                errors.append("metrics must be numbers")
    if errors:
        raise Refused(400, body={"errors": [{"message": message} for message in errors], "warnings": []})
    return {"errors": [], "warnings": []}


@contextmanager
def serve_hub() -> Iterator[tuple[str, Hub]]:
    """Serve an empty Hub; yield its endpoint and its state."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
