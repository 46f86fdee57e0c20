"""A workdir belongs to one run, and to one command at a time."""

import contextlib
import fcntl
import functools
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import jax
from etils import epath

from mambaout_jax.bucket import children, failed, io_errors, is_bucket
from mambaout_jax.errors import AccessError, StorageError, UserError
from mambaout_jax.files import check_file, read_text, write_json
from mambaout_jax.runtime.lease import Lease, take_lease
from mambaout_jax.runtime.processes import FAILED, all_or_none, end
from mambaout_jax.runtime.storage import reading

logger = logging.getLogger(__name__)

LOCK, RECORD = "lock", "config.json"


@contextlib.contextmanager
def hold_workdir(
    workdir: epath.Path,
    record: Mapping[str, Any],
    free: Sequence[str],
    added: Mapping[str, Any],
) -> Iterator[None]:
    """Holds the workdir for this run; removes a new workdir when the run fails before a step.

    The first of several processes holds it for all. The lock is the kernel's: it ends with the
    process, however that ends.

    Args:
        workdir: of the run.
        record: the run's config, by dotted keys.
        free: prefixes of the keys that a resumed run may change.
        added: keys that older runs lack, and the value that they ran with.

    Raises:
        UserError: when the workdir is in use, holds another run, cannot be written, or is not the
            same folder on every host.
    """
    lock, new, primary = None, False, jax.process_index() == 0
    try:
        with all_or_none():
            if primary:
                check_workdir(workdir, record, free, added)
                lock = lock_workdir(workdir)
                # Another command may have started and ended a run here since.
                new = check_workdir(workdir, record, free, added)
                keep_record(workdir, record)
        with all_or_none():
            if not (workdir / RECORD).exists():
                raise UserError(
                    f"{workdir} of process 0 is not visible here: choose a --workdir that all "
                    "hosts share, on a network file system or in a bucket"
                )
        yield
    except (StorageError, AccessError):
        raise
    except UserError:
        # Where the workdir cannot be written any more, the first error says so.
        with contextlib.suppress(*io_errors(workdir, OSError)):
            if new and not has_results(workdir):
                workdir.rmtree(missing_ok=True)
        raise
    finally:
        if lock:
            lock.close()


def has_results(workdir: epath.Path) -> bool:
    """Returns whether a workdir holds more than the files that a run starts with."""
    names = {path.name for path in children(workdir)} - {LOCK, RECORD, "checkpoints"}
    return bool(names) or bool(children(workdir / "checkpoints"))


def lock_workdir(workdir: epath.Path) -> IO[str] | Lease:
    """Returns what holds the workdir until it is closed: an open file, or a lease in a bucket.

    Raises:
        UserError: when another process holds it; it is named.
    """
    path = workdir / LOCK
    if is_bucket(workdir):
        return take_lease(path, functools.partial(end, code=FAILED))
    check_file(path)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115
    except OSError as error:
        raise failed(f"cannot write {path}", error) from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"{workdir} is in use by {owner}: wait for it or stop it, or choose another --workdir"
        ) from None
    except OSError as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s): make sure that one run uses it", path, error)
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()} since {now}\n")
        file.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            file.close()
        raise failed(f"cannot write {path}", error) from None
    return file


def check_workdir(
    workdir: epath.Path,
    record: Mapping[str, Any],
    free: Sequence[str] = (),
    added: Mapping[str, Any] | None = None,
) -> bool:
    """Checks that the workdir is unused, or holds this run; arguments as in `hold_workdir`.

    Returns:
        Whether the workdir is new.

    Raises:
        UserError: when the workdir holds a run of another config, or other files.
    """
    if (workdir / RECORD).exists():
        theirs = dict(added or {}) | read_record(workdir)
        differing = [
            f"{key} is {theirs.get(key)!r} there and {record.get(key)!r} here"
            for key in sorted(theirs.keys() | record.keys())
            if theirs.get(key) != record.get(key) and not key.startswith(tuple(free))
        ]
        if differing:
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(differing)}): "
                "choose another --workdir, or the config that it was started with"
            )
        return False
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file: choose a new or empty folder as --workdir")
    # A command that was killed while it started leaves a lock and a half-written record.
    started = (LOCK, f".{RECORD}.")
    if any(not path.name.startswith(started) for path in children(workdir)):
        raise UserError(f"{workdir} holds other files and no run: choose an empty --workdir")
    return True


def read_record(workdir: epath.Path) -> dict[str, Any]:
    """Returns the config of the run that a workdir holds, by dotted keys.

    Raises:
        UserError: when it cannot be read or is damaged.
    """
    path = workdir / RECORD
    try:
        record = json.loads(reading(functools.partial(read_text, path), os.fspath(path)))
    except UserError:
        raise
    except (ValueError, RecursionError):  # brackets that go too deep
        record = None
    except io_errors(path, OSError) as error:
        raise failed(f"cannot read {path}", error) from None
    if not isinstance(record, dict):
        raise UserError(
            f"{path} is damaged: restore it from a copy; or remove it and move the other files "
            "back after the same command has written it again in an empty workdir"
        )
    return record


def keep_record(workdir: epath.Path, record: Mapping[str, Any]) -> None:
    """Writes the run's config into the workdir where it is missing.

    Raises:
        UserError: when it cannot be written.
    """
    if jax.process_index() == 0 and not (workdir / RECORD).exists():
        write_json(workdir / RECORD, dict(record))
