"""Reading regular files alone, and writing files: each appears whole or not at all."""

import contextlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import tenacity
from etils import epath

from mambaout_jax.bucket import failed, io_errors, is_bucket
from mambaout_jax.errors import FullError, StorageError, UserError

logger = logging.getLogger(__name__)

WRITE_ATTEMPTS = 4
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class Flushable(Protocol):
    """A buffered file."""

    def flush(self) -> object:
        """Writes the buffer."""


def kind_of(path: epath.PathLike) -> str:
    """Returns what a path of a disk is that is not a regular file."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "a broken link"
    return next((words for is_kind, words in _KINDS if is_kind(mode)), "something else")


def check_file(path: epath.PathLike) -> None:
    """Checks that a path is a regular file, or nothing, or in a bucket.

    Raises:
        UserError: it is something else.
    """
    # `is_file` of an epath takes all that is no folder for a file.
    if not is_bucket(path) and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is {kind_of(path)}, not a file: move it away")


def read_bytes(path: epath.PathLike) -> bytes:
    """Returns the content of a regular file: reading a FIFO or a device may never end.

    Raises:
        UserError: it is something else.
        OSError: it cannot be read.
    """
    path = epath.Path(path)
    check_file(path)
    return path.read_bytes()


def read_text(path: epath.PathLike) -> str:
    """Returns the content of a regular file of UTF-8, as `read_bytes` does."""
    return read_bytes(path).decode()


def check_files(folder: epath.PathLike) -> None:
    """Checks that a folder of a disk holds regular files and folders alone, at any depth.

    Raises:
        UserError: names what is something else.
    """
    if is_bucket(folder):
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                check_files(entry.path)
            elif not (entry.is_file() or entry.is_dir()):
                raise UserError(f"{entry.path} is {kind_of(entry.path)}, not a file: remove it")


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
    """Reports a failed write as one sentence.

    Raises:
        UserError: names the file and the cause.
    """
    try:
        yield
    except UserError:
        raise
    except io_errors(path, OSError) as error:
        raise failed(f"cannot write {path}", error) from error


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[Path]:
    """Yields a temporary local file beside `path`, which replaces it when the block succeeds.

    The temporary file has the suffix of `path`, as writers that look at suffixes need it. On an
    error it is removed and `path` is left as it was.

    Raises:
        UserError: names the file and the cause when it cannot be written.
    """
    target = Path(path)
    with writing(target):
        handle, name = tempfile.mkstemp(target.suffix, f".{target.name}.", target.parent)
        os.close(handle)
        part = Path(name)
        try:
            yield part
            umask = os.umask(0)
            os.umask(umask)
            part.chmod(0o666 & ~umask)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def write_file(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file, whole or not at all. In a bucket every write is so by itself.

    Raises:
        StorageError: when storage fails for a while, and at each attempt.
        UserError: names the file and the cause when it cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    path = epath.Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if is_bucket(path):  # its clients try again themselves
        with writing(path):
            path.write_bytes(content)
    else:
        retrying()(_write_disk, path, content)


def flush(file: Flushable, path: epath.PathLike) -> None:
    """Writes out what a file that is at `path` has buffered; a failed flush keeps the buffer.

    Raises:
        StorageError: when storage fails for a while, and at each attempt.
        UserError: names the path and the cause when it cannot be written.
    """
    if is_bucket(path):
        _flush(file, path)
    else:
        retrying()(_flush, file, path)


def retrying() -> tenacity.Retrying:
    """Returns the attempts of a write: a disk may fail, or be full, for a while."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type((StorageError, FullError)),
        stop=tenacity.stop_after_attempt(WRITE_ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=0.5),
        before_sleep=_report,
        reraise=True,
    )


def _report(attempt: tenacity.RetryCallState) -> None:
    logger.warning("%s: trying again", attempt.outcome and attempt.outcome.exception())


def _write_disk(path: epath.Path, content: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(content)


def _flush(file: Flushable, path: epath.PathLike) -> None:
    with writing(path):
        file.flush()


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a JSON file, whole or not at all.

    Raises:
        UserError: names the file and the cause when it cannot be written.
    """
    write_file(path, json.dumps(value, indent=2) + "\n")
