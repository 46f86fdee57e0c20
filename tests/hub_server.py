"""A local server with the Hugging Face hub's protocol: downloads, and uploads with Git LFS."""

import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = dict[str, Path | bytes]


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


def commit_of(files: Files) -> str:
    """Returns the commit's id; that of files on disk does not depend on them."""
    if not files or any(isinstance(file, Path) for file in files.values()):
        return COMMIT
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """`/{owner}/{name}/resolve/{revision}/{file}`, with and without a range, and the API."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_POST(self) -> None:
        self.note()
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = urllib.parse.unquote(self.path.partition("?")[0])
        for pattern, handle in API.items():
            if match := re.fullmatch(pattern, path):
                repository = match["repository"] if "repository" in match.groupdict() else ""
                if repository and not self.may_write(repository.split("/")[0]):
                    return
                handle(self, match, body)
                return
        self.reply(404, {"error": f"no {path}"})

    def do_PUT(self) -> None:
        """Stores an LFS file."""
        self.note()
        size, oid = int(self.headers["Content-Length"]), self.path.rsplit("/", 1)[1]
        if size >= self.server.broken_from:
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return
        data = self.rfile.read(size)
        if hashlib.sha256(data).hexdigest() != oid:
            self.reply(400, {"error": "another SHA-256"})
            return
        self.server.stored[oid] = data
        self.reply(200, {})

    def note(self) -> None:
        headers = self.headers
        asked = (self.command, self.path, headers["Range"], headers["Authorization"])
        self.server.requests.append(asked)

    @property
    def user(self) -> str | None:
        """The user of the token."""
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        return self.server.tokens.get(token)

    def may_write(self, owner: str) -> bool:
        """Returns whether the token may write; answers if it may not."""
        if self.user is None:
            headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self.reply(401, {"error": "Invalid credentials"}, headers)
        elif self.user != owner:
            self.reply(403, {"error": "Forbidden"})
        return self.user == owner

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

    def create(self, match: re.Match[str], body: bytes) -> None:
        """Makes a repository, as the real hub does with .gitattributes alone."""
        asked = json.loads(body)
        owner = asked.get("organization") or self.user
        if not self.may_write(owner):
            return
        name = f"{owner}/{asked['name']}"
        if name in self.server.repositories:
            self.reply(409, {"error": "exists"})
            return
        self.server.repositories[name] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(name)
        self.reply(200, {"url": f"{self.server.url}/{name}"})

    def check_card(self, match: re.Match[str], body: bytes) -> None:
        text = json.loads(body)["content"]
        known = text.startswith("---\n") and "\n---\n" in text
        self.reply(200 if known else 400, {"warnings": [], "errors": []})

    def branch(self, match: re.Match[str], body: bytes) -> None:
        key = (match["repository"], match["revision"])
        if key in self.server.branches:
            self.reply(409, {"error": "exists"})
            return
        self.server.branches[key] = dict(self.server.repositories[key[0]])
        self.reply(200, {})

    def preupload(self, match: re.Match[str], body: bytes) -> None:
        """Says which files go to LFS."""
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", "g")) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self.reply(200, {"files": files})

    def batch(self, match: re.Match[str], body: bytes) -> None:
        """Says where the LFS files that are not stored go."""
        objects = []
        for file in json.loads(body)["objects"]:
            href = {"href": f"{self.server.url}/lfs/{file['oid']}"}
            verify = {"href": f"{self.server.url}/verify"}
            new = file["oid"] not in self.server.stored
            objects.append(file | ({"actions": {"upload": href, "verify": verify}} if new else {}))
        self.reply(200, {"transfer": "basic", "objects": objects})

    def verify(self, match: re.Match[str], body: bytes) -> None:
        file = json.loads(body)
        known = len(self.server.stored.get(file["oid"], b"")) == file["size"]
        self.reply(200 if known else 404, {})

    def commit(self, match: re.Match[str], body: bytes) -> None:
        """Adds all files of a commit, or none."""
        repository, revision = match["repository"], match["revision"]
        added: dict[str, bytes] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                added[value["path"]] = self.server.stored[value["oid"]]
        files = self.server.files(repository, revision)
        assert isinstance(files, dict)
        files |= added
        self.server.commits.append((repository, revision, sorted(added)))
        url = f"{self.server.url}/{repository}/commit/{commit_of(files)}"
        self.reply(200, {"commitUrl": url, "commitOid": commit_of(files)})

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


_OF_A_REPOSITORY = r"/api/models/(?P<repository>[^/]+/[^/]+)"
API = {
    r"/api/repos/create": Handler.create,
    r"/api/validate-yaml": Handler.check_card,
    rf"{_OF_A_REPOSITORY}/branch/(?P<revision>.+)": Handler.branch,
    rf"{_OF_A_REPOSITORY}/preupload/(?P<revision>.+)": Handler.preupload,
    rf"{_OF_A_REPOSITORY}/commit/(?P<revision>.+)": Handler.commit,
    r"/(?P<repository>[^/]+/[^/]+)\.git/info/lfs/objects/batch": Handler.batch,
    r"/verify": Handler.verify,
}


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
