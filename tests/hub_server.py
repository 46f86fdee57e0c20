"""A local server with the Hugging Face hub's protocol for files."""

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves `repositories`: a repository's name to its files, or to an HTTP status.

    The first `cuts` transfers of a file break off in the middle. `requests` lists what was asked:
    method, path, and the headers Range and Authorization.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, Path] | int], cuts: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.cuts = cuts
        self.requests: list[tuple[str, str, str | None, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """`/{owner}/{name}/resolve/{revision}/{file}`, with and without a range."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        headers = self.headers
        asked = (self.command, self.path, headers["Range"], headers["Authorization"])
        self.server.requests.append(asked)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        files = self.server.repositories.get(match[1], 404) if match else 404
        if isinstance(files, int):
            code = {401: "GatedRepo", 404: "RepoNotFound"}.get(files)
            self.head(files, {"X-Error-Code": code} if code else {}, 0)
            return
        if match[3] not in files:
            self.head(404, {"X-Error-Code": "EntryNotFound"}, 0)
            return
        data = files[match[3]].read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        answer = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        answer |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        start = 0
        if found := re.fullmatch(r"bytes=(\d+)-", headers["Range"] or ""):
            start = int(found[1])
            answer["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.head(206 if start else 200, answer, len(data) - start)
        if body and self.server.cuts:
            self.server.cuts -= 1
            self.wfile.write(data[start : (start + len(data)) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(data[start:])

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
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
