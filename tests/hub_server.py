"""A local server with the Hugging Face hub's protocol for files; hub_uploads.py takes uploads."""

import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hub_uploads import COMMIT, Files, Uploads, commit_of


class HubServer(ThreadingHTTPServer):
    """Serves `repositories`: a repository's name to its files on "main", or to an HTTP status.

    The first `cuts` transfers of a file break off in the middle. `requests` lists what was asked:
    method, path, and the headers Range and Authorization.

    `tokens` maps a token to the user that may write with it. `branches` holds the files of other
    branches, `private` the repositories that need a token, `stored` the content of LFS files by
    SHA-256, and `commits` the repository, the branch and the files of each commit. A PUT of a file
    of at least `broken_from` bytes breaks off.
    """

    daemon_threads = True

    def __init__(
        self,
        repositories: dict[str, Files | int],
        cuts: int = 0,
        tokens: dict[str, str] | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.cuts = cuts
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        self.tokens = tokens or {}
        self.branches: dict[tuple[str, str], Files] = {}
        self.private: set[str] = set()
        self.stored: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, list[str]]] = []
        self.broken_from = float("inf")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str, revision: str) -> Files | int | None:
        """Returns a revision's files, or an HTTP status; None: there is no such revision."""
        main = self.repositories.get(repository, 404)
        if isinstance(main, int) or revision in ("main", commit_of(main)):
            return main
        branch = self.branches.get((repository, revision))
        found = [f for (name, _), f in self.branches.items() if name == repository]
        return branch or next((f for f in found if commit_of(f) == revision), None)


def content(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


class Handler(Uploads, BaseHTTPRequestHandler):
    """`/{owner}/{name}/resolve/{revision}/{file}`, with and without a range, and `/api/models`."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def note(self) -> None:
        headers = self.headers
        asked = (self.command, self.path, headers["Range"], headers["Authorization"])
        self.server.requests.append(asked)

    def answer(self, body: bool) -> None:
        self.note()
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision/.+|refs))?", path):
            self.describe(match[1], match[2] or "revision/main")
            return
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        files = self.server.files(match[1], match[2]) if match else 404
        if match and match[1] in self.server.private and self.user is None:
            files = 401
        if not isinstance(files, dict):
            code = {401: "GatedRepo", 404: "RepoNotFound", None: "RevisionNotFound"}.get(files)
            self.head(files or 404, {"X-Error-Code": code} if code else {}, 0)
            return
        if match[3] not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit_of(files)}
            self.head(404, headers, 0)
            return
        data = content(files[match[3]])
        etag = hashlib.sha256(data).hexdigest()
        answer = {"ETag": f'"{etag}"', "X-Repo-Commit": commit_of(files), "Accept-Ranges": "bytes"}
        answer |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        start = 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            start = int(found[1])
            answer["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.head(206 if start else 200, answer, len(data) - start)
        if body and self.server.cuts:
            self.server.cuts -= 1
            self.wfile.write(data[start : (start + len(data)) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(data[start:])

    def describe(self, repository: str, what: str) -> None:
        """Answers what a repository is, or which branches it has."""
        files = self.server.files(repository, "main")
        if not isinstance(files, dict) or (repository in self.server.private and not self.user):
            self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        if what == "refs":
            names = ["main", *(b for name, b in self.server.branches if name == repository)]
            refs = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": COMMIT} for b in names]
            self.reply(200, {"branches": refs, "tags": [], "converts": []})
            return
        record = {"id": repository, "sha": commit_of(files), "tags": []}
        record |= {"private": repository in self.server.private}
        self.reply(200, record | {"siblings": [{"rfilename": name} for name in files]})

    def reply(self, status: int, answer: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(answer).encode()
        self.head(status, {"Content-Type": "application/json", **(headers or {})}, len(data))
        self.wfile.write(data)

    def head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(server: HubServer) -> Iterator[HubServer]:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
