"""A hub of models and datasets on loopback, as far as its client asks: real HTTP."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url` what `hub.push(kind, name, files)` gives it.

    `kind` is `models` or `datasets`. A push is a commit, and moves the branch `main` to it.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._branches: dict[str, str] = {}
        self._commits: dict[str, Files] = {}

    def push(self, kind: str, name: str, files: Files) -> str:
        """The hash of the new commit."""
        commit = hashlib.sha1(b"".join([name.encode(), *files.values()])).hexdigest()
        self._commits[commit] = files
        self._branches[f"{kind}/{name}"] = commit
        return commit

    def __enter__(self) -> Self:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length).decode()
                hub.requests.append(f"{self.command} {self.path}")
                status, headers, content = hub._answer(unquote(urlsplit(self.path).path), body)
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What leads the client here, and no proxy between."""
        return {
            "HF_ENDPOINT": self.url,
            "NO_PROXY": "*",
            "no_proxy": "*",
            "HF_HUB_DISABLE_XET": "1",
        }

    def _answer(self, path: str, body: str) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            return self._facts("/".join(parts[1:4]), parts[4:], body)
        if parts[0] != "datasets":
            parts = ["models", *parts]
        commit = self._commit("/".join(parts[:3]), parts[4]) if len(parts) > 5 else None
        content = self._commits[commit].get("/".join(parts[5:])) if commit else None
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        etag = hashlib.sha1(content).hexdigest()
        return 200, {"X-Repo-Commit": commit or "", "ETag": f'"{etag}"'}, content

    def _commit(self, repository: str, revision: str) -> str | None:
        head = self._branches.get(repository)
        return head if revision == "main" else revision if revision in self._commits else None

    def _facts(
        self, repository: str, what: list[str], body: str
    ) -> tuple[int, dict[str, str], bytes]:
        if repository not in self._branches:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self._commit(repository, what[1] if len(what) > 1 else "main")
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self._commits[commit]
        entries = [
            {"type": "file", "path": name, "size": len(content),
             "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]  # fmt: skip
        answer: Any = entries
        if not what or what[0] == "revision":
            name = repository.partition("/")[2]
            siblings = [{"rfilename": file} for file in files]
            answer = {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False}
        elif what[0] == "paths-info":
            answer = [entry for entry in entries if f'"{entry["path"]}"' in body]
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
