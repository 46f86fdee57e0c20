"""Buckets of Cloud Storage as folders: paths, access, and what their clients' errors mean.

Four clients reach a bucket: gcsfs (behind epath), google-cloud-storage, TensorStore (arrays) and
array_record (data). Each retries what is transient itself.
"""

import errno
import functools
import logging
import os
import re
from pathlib import Path
from typing import Any

from etils import epath

from mambaout_jax.errors import AccessError, FullError, StorageError, UserError, first_line

SCHEME = "gs://"
LOG_IN = (
    "log in with `gcloud auth application-default login`, or give this machine a service account"
)
# Classes of errors for a server that cannot be reached, and the packages that have them.
_UNREACHABLE = (
    "ClientConnectionError",
    "ConnectionError",
    "RetryError",
    "Timeout",
    "TransportError",
)
_CLIENTS = (
    "aiohttp.client_exceptions",
    "google.api_core.exceptions",
    "google.auth.exceptions",
    "requests.exceptions",
)
# Error numbers of temporary faults of a disk or a network.
TRANSIENT_ERRORS = (5, 11, 16, 70, 103, 104, 110, 111, 113, 116, 121)
# What to do about the errors of a disk.
REMEDIES = {
    errno.EIO: "check the disk: dmesg may say more",
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or ask for a larger quota",
    errno.EROFS: "mount it for writing",
}
FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
GRANT = "grant it roles/storage.objectUser and roles/storage.legacyBucketReader on the bucket"


def is_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path is in a bucket, such as gs://bucket/run."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path of a folder of arrays. To be called before a path is used.

    Raises:
        UserError: when it is in a bucket that cannot be used, TensorStore cannot use its name, or a
            link of it leads nowhere.
    """
    check_path(os.fspath(path))
    path = epath.Path(path)
    if is_bucket(path):
        open_bucket(path)
        return path
    path = path.expanduser().resolve()
    try:
        os.fspath(path).encode()
        os.stat(path)
    except UnicodeEncodeError:
        raise UserError(
            f"{path} is not UTF-8, so TensorStore cannot write to it: choose another name"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise UserError(
                f"{path} is a link to nothing: remove it, or make that folder"
            ) from None
    except OSError as error:  # such as a loop of links, or a name that is too long
        raise failed(f"cannot use {path}", error) from None
    return path


def check_path(path: str) -> None:
    """Checks that a path that looks like a bucket's is one.

    Raises:
        UserError: when it names another kind of storage, or no bucket.
    """
    if re.match(r"gs:/(?!/)", path):
        raise UserError(f"{path} is no path: expected gs://BUCKET/FOLDER, with two slashes")
    if is_bucket(path) and not re.fullmatch(r"gs://[^/]+(/.*)?", path):
        raise UserError(f"{path} is no path: expected a local folder or gs://BUCKET/FOLDER")


def children(folder: epath.Path) -> list[epath.Path]:
    """Returns what is in a folder, sorted; nothing where there is no such folder.

    A bucket has no empty folders.
    """
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def split(path: epath.PathLike) -> tuple[str, str]:
    """Returns the bucket's name and the object's name of gs://BUCKET/OBJECT."""
    name, _, key = os.fspath(path).removeprefix(SCHEME).partition("/")
    return name, key


def open_bucket(path: epath.PathLike) -> Any:
    """Returns the `google.cloud.storage.Bucket` of a path, after a check that it can be read.

    Raises:
        UserError: when a package is missing, the credentials are not accepted, or there is no such
            bucket.
    """
    try:
        return _readable_bucket(split(path)[0])
    except ImportError as error:
        raise UserError(
            f"cannot use {path}: {error.name} is not installed: pip install 'mambaout_jax[gcs]'"
        ) from None
    except Exception as error:
        raise failed(f"cannot use {path}", error) from error


@functools.cache
def _readable_bucket(name: str) -> Any:
    """Returns the bucket of a name once gcsfs is set up, and it was read from."""
    set_up_gcsfs()
    bucket = storage_client().bucket(name)
    next(iter(bucket.list_blobs(max_results=1)), None)
    return bucket


@functools.cache
def storage_client() -> Any:
    """Returns the client of google-cloud-storage; without credentials it reads public buckets."""
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    try:
        return storage.Client()
    except DefaultCredentialsError:
        return storage.Client.create_anonymous_client()


@functools.cache
def set_up_gcsfs() -> None:
    """Makes epath see what other processes write, and keeps failed attempts out of the log."""
    import fsspec.config
    import gcsfs  # noqa: F401

    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    # It logs a traceback for an error that is raised as well.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def upload(folder: Path, target: epath.Path) -> None:
    """Copies the files of a local folder into a folder of a bucket."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (target / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())


def io_errors(path: epath.PathLike, *local: type[Exception]) -> tuple[type[Exception], ...]:
    """Returns what reading and writing a path may raise: `local` on a disk.

    The errors of the clients of a bucket have no class in common.
    """
    return (Exception,) if is_bucket(path) else local


def http_status(error: BaseException) -> int:
    """Returns the HTTP status of an error of one of the clients, 0 for none.

    A server that cannot be reached counts as one that is unavailable, 503.
    """
    kinds = type(error).__mro__
    if any(kind.__name__ in _UNREACHABLE and kind.__module__ in _CLIENTS for kind in kinds):
        return 503
    if any(kind.__module__ == "google.auth.exceptions" for kind in kinds):
        return 401
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):  # gcsfs
        return 403
    # TensorStore, array_record
    if match := re.search(r"http_response_code='(\d+)'|\"code\": (\d+)", str(error)):
        return int(match[1] or match[2])
    code = str(getattr(error, "code", ""))  # gcsfs, google-cloud-storage
    return int(code) if code.isdigit() else 0


def reason(error: BaseException) -> str:
    """Returns what an error of reading or writing means, and what to do about it."""
    status = http_status(error)
    if status == 401:
        return f"the credentials are missing, expired or not accepted: {LOG_IN}"
    if status == 403:
        return f"this account may not do that: {GRANT}"
    if status == 404:
        return "there is no such bucket, or this account may not see it"
    words = getattr(error, "strerror", None) or first_line(error)
    remedy = REMEDIES.get(getattr(error, "errno", None) or 0)
    return f"{words} ({remedy})" if remedy else words


def failed(what: str, error: BaseException) -> UserError:
    """Returns the error to raise for an access that failed after all retries.

    Returns:
        A StorageError where a later attempt may succeed, a FullError where space is missing, an
        AccessError where access is refused, a UserError for any other reason.
    """
    status = http_status(error)
    refused, unavailable = status in (401, 403), status in (408, 429) or status >= 500
    number = getattr(error, "errno", None)
    kind: type[UserError] = UserError
    if refused:
        kind = AccessError
    elif unavailable or number in TRANSIENT_ERRORS:
        kind = StorageError
    elif number in FULL_ERRORS:
        kind = FullError
    return kind(f"{what}: {reason(error)}")
