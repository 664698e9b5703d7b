"""A loopback server that speaks the Hub's download endpoints for one model, so that the real client can be used."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

SHA = hashlib.sha1(b"the only commit").hexdigest()


@contextmanager
def serve(folder: Path, repository: str) -> Iterator[tuple[str, list[tuple[str, str, int]]]]:
    """Serve `folder` as `repository`; yield the endpoint and a growing list of (method, path, bytes sent)."""
    log: list[tuple[str, str, int]] = []

    def names() -> list[str]:
        return sorted(item.relative_to(folder).as_posix() for item in folder.rglob("*") if item.is_file())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            headers.setdefault("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
            log.append((self.command, self.path, len(body) if self.command == "GET" else 0))

        def missing(self, code: str) -> None:
            self.answer(404, b"{}", {"X-Error-Code": code, "X-Repo-Commit": SHA})

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            if path.startswith(f"/{repository}/resolve/"):
                self.file(path.split("/", 5)[5])
            elif path.startswith(f"/api/models/{repository}/tree/"):
                files = [
                    {"type": "file", "path": name, "oid": name, "size": (folder / name).stat().st_size}
                    for name in names()
                ]
                self.answer(200, json.dumps(files).encode(), {"Content-Type": "application/json"})
            elif path == f"/api/models/{repository}" or path.startswith(f"/api/models/{repository}/revision/"):
                if path.endswith("/nowhere"):
                    self.missing("RevisionNotFound")
                    return
                siblings = [{"rfilename": name} for name in names()]
                info = {"id": repository, "sha": SHA, "siblings": siblings, "private": False, "tags": []}
                self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            else:
                self.missing("RepoNotFound")

        do_HEAD = do_GET

        def file(self, name: str) -> None:
            if not (folder / name).is_file():
                self.missing("EntryNotFound")
                return
            body = (folder / name).read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
            wanted = self.headers.get("Range")
            if wanted and wanted.startswith("bytes="):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                part = body[int(first or 0) : (int(last) + 1 if last else None)]
                headers["Content-Range"] = f"bytes {first or 0}-{int(first or 0) + len(part) - 1}/{len(body)}"
                self.answer(206, part, headers)
            else:
                self.answer(200, body, headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
