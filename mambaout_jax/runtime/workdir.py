"""A workdir belongs to one run, and to one command at a time."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import jax
from etils import epath

from mambaout_jax.errors import UserError
from mambaout_jax.files import write_json
from mambaout_jax.runtime.processes import all_or_none

logger = logging.getLogger(__name__)

LOCK, RECORD = "lock", "config.json"


@contextlib.contextmanager
def hold_workdir(
    workdir: epath.Path, record: Mapping[str, Any], free: Sequence[str]
) -> Iterator[None]:
    """Holds the workdir for this run; a workdir that is new vanishes when nothing came of it.

    The first of several processes holds it for all. The lock is the kernel's: it ends with the
    process, however that ends. A bucket knows no such lock.

    Raises:
        UserError: when the workdir is held, of another run, cannot be written, or is not the same
            folder on every host.
    """
    lock, new, primary = None, False, jax.process_index() == 0
    try:
        with all_or_none():
            if primary:
                try:
                    check_workdir(workdir, record, free)
                except ImportError as error:  # of what reads buckets
                    raise UserError(f"cannot use {workdir}: {error}") from None
                lock = lock_workdir(workdir)
                # Another command may have begun and ended a run here since.
                new = check_workdir(workdir, record, free)
                write_record(workdir, record)
        with all_or_none():
            if not (workdir / RECORD).exists():
                raise UserError(
                    f"{workdir} of process 0 is not seen here: choose a --workdir that all hosts "
                    "share, on a network file system or in a bucket"
                )
        yield
    except UserError:
        worth = ("metrics.csv", "checkpoints/[0-9]*")
        if new and not any(path for pattern in worth for path in workdir.glob(pattern)):
            workdir.rmtree(missing_ok=True)
        raise
    finally:
        if lock:
            lock.close()


def lock_workdir(workdir: epath.Path) -> IO[str] | None:
    """Returns the open file that holds the workdir, None for a bucket.

    Raises:
        UserError: when another process holds it: names it.
    """
    if "://" in os.fspath(workdir):
        return None
    path = workdir / LOCK
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
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
        logger.warning("%s cannot be locked (%s): see to it that one run uses it", path, error)
    file.truncate(0)
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    file.write(f"process {os.getpid()} of {socket.gethostname()} since {now}\n")
    file.flush()
    return file


def check_workdir(workdir: epath.Path, record: Mapping[str, Any], free: Sequence[str]) -> bool:
    """Checks that the workdir is free, or holds this run; writes nothing.

    Args:
        workdir: of the run.
        record: the run's configuration, by dotted keys.
        free: prefixes of the keys that a resumed run may change.

    Returns:
        Whether the workdir is new.

    Raises:
        UserError: when the workdir holds a run of another configuration, or other files.
    """
    path = workdir / RECORD
    if path.exists():
        theirs = json.loads(path.read_text())
        differing = [
            f"{key} is {theirs.get(key)!r} there and {record.get(key)!r} here"
            for key in sorted(theirs.keys() | record.keys())
            if theirs.get(key) != record.get(key) and not key.startswith(tuple(free))
        ]
        if differing:
            raise UserError(
                f"{workdir} holds a run of another configuration ({'; '.join(differing)}): "
                "choose another --workdir, or the configuration that it was started with"
            )
        return False
    if workdir.exists() and (
        not workdir.is_dir() or {path.name for path in workdir.iterdir()} - {LOCK}
    ):
        raise UserError(f"{workdir} holds other files and no run: choose an empty --workdir")
    return True


def write_record(workdir: epath.Path, record: Mapping[str, Any]) -> None:
    """Makes the workdir this run's, where it is no run's yet.

    Raises:
        UserError: when it cannot be written.
    """
    if not (workdir / RECORD).exists():
        write_json(workdir / RECORD, dict(record))
