"""The upload protocol of the Hugging Face hub: repositories, branches, Git LFS, commits."""

import base64
import hashlib
import json
import re
import urllib.parse
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = dict[str, Path | bytes]


def commit_of(files: Files) -> str:
    """Returns the commit's id; that of files on disk does not depend on them."""
    if not files or any(isinstance(file, Path) for file in files.values()):
        return COMMIT
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Uploads(BaseHTTPRequestHandler):
    """What a handler of HTTP requests does with POST and PUT."""

    server: Any

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


_OF_A_REPOSITORY = r"/api/models/(?P<repository>[^/]+/[^/]+)"
API = {
    r"/api/repos/create": Uploads.create,
    r"/api/validate-yaml": Uploads.check_card,
    rf"{_OF_A_REPOSITORY}/branch/(?P<revision>.+)": Uploads.branch,
    rf"{_OF_A_REPOSITORY}/preupload/(?P<revision>.+)": Uploads.preupload,
    rf"{_OF_A_REPOSITORY}/commit/(?P<revision>.+)": Uploads.commit,
    r"/(?P<repository>[^/]+/[^/]+)\.git/info/lfs/objects/batch": Uploads.batch,
    r"/verify": Uploads.verify,
}
