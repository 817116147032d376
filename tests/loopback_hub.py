"""A hub on the loopback: repositories in memory, with the parts of its API that are used here."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_of_nobody"
Files = dict[str, bytes]


class LoopbackHub:
    """Serves repositories, and takes commits by whoever knows the token.

    Attributes
    ----------
    repositories
        By id, their commits in order, each with all of its files.
    fails
        Status to answer instead, by the end of a request's path.
    asked
        Method and path of every request.
    tokens
        What GET and HEAD were authorized by.
    created
        What repositories were asked for, as JSON.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, list[tuple[str, Files]]] = {}
        self.fails: dict[str, int] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.created: list[dict[str, Any]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                if "/models/" in self.path or "/resolve/" in self.path:  # of repositories
                    hub.tokens.add(self.headers["Authorization"])
                path = unquote(urlsplit(self.path).path)
                status = next((s for end, s in hub.fails.items() if path.endswith(end)), None)
                if status is not None:
                    self.answer(status, b'{"error": "not now"}')
                elif path.startswith("/api/models/"):
                    self.model(*hub.split(path.removeprefix("/api/models/"), "revision"))
                else:
                    self.file(*hub.split(path.removeprefix("/"), "resolve"))

            do_HEAD = do_GET  # noqa: N815

            def do_POST(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                path = urlsplit(self.path).path
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                status = next((s for end, s in hub.fails.items() if end in path), None)
                if status is None and self.headers["Authorization"] != f"Bearer {TOKEN}":
                    status = 401
                if status is not None:
                    self.answer(
                        status, b'{"error": "not for you", "errors": [{"message": "no licence"}]}'
                    )
                elif path.endswith("/create"):
                    asked = json.loads(body)
                    repo = f"{asked['organization']}/{asked['name']}"
                    hub.created.append(asked)
                    hub.put(repo, {".gitattributes": b""})
                    self.answer(200, json.dumps({"url": f"{hub.address}/{repo}"}).encode())
                elif path.endswith("/validate-yaml"):
                    self.answer(200, b'{"errors": [], "warnings": []}')
                elif "/preupload/" in path:
                    names = [file["path"] for file in json.loads(body)["files"]]
                    modes = [
                        {"path": name, "uploadMode": "regular", "shouldIgnore": False}
                        for name in names
                    ]
                    self.answer(200, json.dumps({"files": modes}).encode())
                else:
                    self.commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)

            def commit(self, repo: str, body: bytes) -> None:
                lines = [json.loads(line) for line in body.splitlines()]
                parent = lines[0]["value"].get("parentCommit")
                if parent not in (None, hub.repositories[repo][-1][0]):
                    self.answer(412, b'{"error": "a commit happened since"}')
                    return
                files = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                gone = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
                oid = hub.put(repo, files, gone)
                about = {"commitUrl": f"{hub.address}/{repo}/commit/{oid}", "commitOid": oid}
                self.answer(200, json.dumps(about).encode())

            def model(self, repo: str, revision: str, _: str) -> None:
                found = hub.at(repo, revision)
                if found is None:
                    kind = "RevisionNotFound" if repo in hub.repositories else "RepoNotFound"
                    self.answer(404, b"{}", **{"X-Error-Code": kind})
                    return
                oid, files = found
                siblings = [
                    {"rfilename": name, "blobId": digest(content), "size": len(content)}
                    for name, content in files.items()
                ]
                about = {"id": repo, "sha": oid, "siblings": siblings, "private": False}
                self.answer(200, json.dumps(about).encode())

            def file(self, repo: str, revision: str, name: str) -> None:
                found = hub.at(repo, revision)
                if found is None:
                    self.answer(404, b"", **{"X-Error-Code": "RepoNotFound"})
                elif name not in found[1]:
                    code = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[0]}
                    self.answer(404, b"", **code)
                else:
                    content = found[1][name]
                    tags = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": found[0]}
                    self.answer(200, content, **tags)

            def answer(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        serve: Any = self.server.serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put(self, repo: str, files: Files, gone: Sequence[str] = ()) -> str:
        """Add a commit; returns its id."""
        commits = self.repositories.setdefault(repo, [])
        files = {**(commits[-1][1] if commits else {}), **files}
        for name in gone:
            del files[name]
        oid = hashlib.sha1(repr((repo, len(commits))).encode()).hexdigest()
        commits.append((oid, files))
        return oid

    def files(self, repo: str) -> dict[str, str]:
        """Text of a repository's newest files."""
        return {name: content.decode() for name, content in self.repositories[repo][-1][1].items()}

    def at(self, repo: str, revision: str) -> tuple[str, Files] | None:
        commits = self.repositories.get(repo, [])
        if revision == "main" and commits:
            return commits[-1]
        return next((commit for commit in commits if commit[0] == revision), None)

    @staticmethod
    def split(path: str, word: str) -> tuple[str, str, str]:
        """Repository, revision and file of a path like owner/name/<word>/<revision>/<file>."""
        owner, name, *rest = path.split("/")
        revision = rest[1] if rest[:1] == [word] else "main"
        return f"{owner}/{name}", revision, "/".join(rest[2:])


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def connect(hub: LoopbackHub, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub's client of this process talk to it, with a cache of its own."""
    patch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # of its retries
