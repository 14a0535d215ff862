"""A server on this machine that speaks the protocol of Hugging Face's hub."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v2", COMMIT)
ASKED = re.compile(r"(?:/api/models)?/(\w+/\w+)/(revision|tree|resolve)/(\w[^/]*)/?(.*)")
Seen = list[tuple[str, str, str | None]]  # method, path, authorisation


class Repositories(BaseHTTPRequestHandler):
    """Folders as repositories of one commit; those named secret ask for the token `good`."""

    folders: Mapping[str, Path]
    seen: Seen

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, token = self.path.split("?")[0], self.headers.get("Authorization")
        self.seen.append((self.command, path, token))
        found = re.fullmatch(
            r"(?:/api/models)?/(\w+/\w+)/(revision|tree|resolve)/(\w[^/]*)/?(.*)", path
        )
        name, kind, revision, rest = found.groups() if found else ("", "", "", "")
        if name.endswith("/secret") and token != "Bearer good":
            self._answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif name not in self.folders:
            self._answer(404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in REVISIONS:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif kind == "resolve":
            content = (self.folders[name] / rest).read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            self._answer(200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, content)
        else:
            files = sorted(path for path in self.folders[name].iterdir() if path.is_file())
            listed = _information(name, files) if kind == "revision" else _tree(files)
            content = json.dumps(listed).encode()
            self._answer(200, {"Content-Type": "application/json"}, content)

    def _answer(self, status: int, headers: Mapping[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass


def _information(name: str, files: list[Path]) -> dict[str, object]:
    return {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path.name} for path in files]}


def _tree(files: list[Path]) -> list[dict[str, object]]:
    return [
        {
            "type": "file",
            "path": path.name,
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]


@contextmanager
def hub_server(folders: Mapping[str, Path]) -> Iterator[tuple[str, Seen]]:
    """Its address, and all that it is asked for as it comes."""
    handler = type("Handler", (Repositories,), {"folders": folders, "seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}", handler.seen
        finally:
            listening.shutdown()
            thread.join()


def hub_environment(endpoint: str, home: Path) -> dict[str, str]:
    """The variables that point Hugging Face's package to a server, with a cache of its own."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
