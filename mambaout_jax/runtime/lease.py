"""A lease on a workdir in a bucket: one command at a time, as a lock does on a disk.

The lease is the object WORKDIR/lock. Its holder rewrites it every RENEW_SECONDS, on the
condition that it is still as the holder left it (a generation precondition), so two processes
cannot both hold it. A lease that is not renewed while another process watches it for LEASE_SECONDS
is taken over; no clocks are compared. The lease of a process of this machine that no longer runs is
taken over at once.
"""

import contextlib
import dataclasses
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from etils import epath

from mambaout_jax.bucket import failed, open_bucket, reason, split
from mambaout_jax.errors import UserError

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60
RENEW_SECONDS = 15
WATCH_SECONDS = 2  # between two looks at another process's lease


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds a lease, as strings: the metadata of the lease's object.

    Attributes:
        token: identifies this lease.
        process: number of the process.
        started: when the process started, in its machine's own units; "" where unknown.
        host: name of the host.
        machine: identifies the machine or container that numbers the process; "" where unknown.
        since: when the lease was taken.
    """

    token: str
    process: str
    started: str
    host: str
    machine: str
    since: str

    @classmethod
    def this_process(cls) -> "Owner":
        """Returns this process as the owner of a new lease."""
        return cls(
            token=uuid.uuid4().hex,
            process=str(os.getpid()),
            started=start_of(os.getpid()),
            host=socket.gethostname(),
            machine=this_machine(),
            since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        )

    def __str__(self) -> str:
        return f"process {self.process} of {self.host} since {self.since}"

    def has_ended(self) -> bool:
        """Returns whether it is a process of this machine that no longer runs."""
        here = bool(self.machine) and self.machine == this_machine()
        return here and start_of(int(self.process)) != self.started


def this_machine() -> str:
    """Returns what identifies this boot and its process numbers, "" without Linux's /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_of(process: int) -> str:
    """Returns when a process of this machine started, "" for one that has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class Lease:
    """A lease that this process holds and renews, until `close`.

    Args:
        bucket: of google-cloud-storage.
        key: the object's name.
        owner: this process.
        generation: of the object as this process wrote it.
        on_loss: called with a message, from the thread that renews, when another process has taken
            the lease; it must not return.
    """

    def __init__(
        self,
        bucket: Any,
        key: str,
        owner: Owner,
        generation: int,
        on_loss: Callable[[str], NoReturn],
    ):
        self._bucket, self._key, self._owner = bucket, key, owner
        self._generation, self._on_loss = generation, on_loss
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_closed, daemon=True)
        self._thread.start()

    def _renew_until_closed(self) -> None:
        while not self._closed.wait(RENEW_SECONDS):
            try:
                self._renew()
            except Exception as error:  # tried again, as long as the run lasts
                path = f"gs://{self._bucket.name}/{self._key}"
                logger.warning("cannot renew %s: %s", path, reason(error))

    def _renew(self) -> None:
        generation = write(self._bucket, self._key, self._owner, self._generation)
        if generation is None:
            _, owner = read(self._bucket, self._key)
            workdir = f"gs://{self._bucket.name}/{os.path.dirname(self._key)}"
            self._on_loss(
                f"{workdir} was taken over by {owner or 'another command'}, as this process was "
                f"not heard of for {LEASE_SECONDS} s"
            )
        self._generation = generation

    def close(self) -> None:
        """Gives the lease back."""
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # it runs out by itself
            self._bucket.delete_blob(
                self._key, if_generation_match=self._generation, timeout=RENEW_SECONDS, retry=None
            )


def take_lease(path: epath.Path, on_loss: Callable[[str], NoReturn]) -> Lease:
    """Returns the lease kept in an object, once it is this process's.

    Args:
        path: of the object.
        on_loss: as of `Lease`.

    Raises:
        UserError: when another process holds and renews it, or the bucket cannot be used.
    """
    bucket, owner = open_bucket(path), Owner.this_process()
    _, key = split(path)
    try:
        while True:
            generation, holder = read(bucket, key)
            if holder and not holder.has_ended():
                watch(bucket, key, generation, holder, path)
            taken = write(bucket, key, owner, generation)
            if taken is not None:
                return Lease(bucket, key, owner, taken, on_loss)
    except UserError:
        raise
    except Exception as error:
        raise failed(f"cannot write {path}", error) from error


def watch(bucket: Any, key: str, generation: int, holder: Owner, path: epath.Path) -> None:
    """Waits until a lease is given back or not renewed for LEASE_SECONDS.

    Raises:
        UserError: when it is renewed: names its holder.
    """
    logger.info("%s is held by %s: watching whether that still runs", path, holder)
    end = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < end:
        time.sleep(WATCH_SECONDS)
        now, owner = read(bucket, key)
        if now == 0:
            return
        if now != generation:
            raise UserError(
                f"{path.parent} is in use by {owner}: wait for it or stop it, or choose another "
                "--workdir"
            )


def read(bucket: Any, key: str) -> tuple[int, Owner | None]:
    """Returns the generation and the owner of a lease.

    The generation is 0 where there is no object. The owner is None there and where the object is no
    lease, such as a lock that was copied from a disk.
    """
    blob = bucket.get_blob(key)
    if blob is None:
        return 0, None
    found = blob.metadata or {}
    if "token" not in found:
        return blob.generation, None
    names = [field.name for field in dataclasses.fields(Owner)]
    return blob.generation, Owner(**{name: found.get(name, "") for name in names})


def write(bucket: Any, key: str, owner: Owner, generation: int) -> int | None:
    """Writes a lease if it is of this generation (0: if there is none).

    Returns:
        The new generation; None when the lease was of another generation.
    """
    from google.api_core.exceptions import PreconditionFailed
    from google.cloud.storage.retry import DEFAULT_RETRY

    blob = bucket.blob(key)
    blob.metadata = dataclasses.asdict(owner)
    try:
        blob.upload_from_string(
            f"{owner}\n",
            if_generation_match=generation,
            retry=DEFAULT_RETRY.with_timeout(RENEW_SECONDS),
        )
    except PreconditionFailed:
        # The answer to this very write may have been lost, and the write been tried again.
        now, found = read(bucket, key)
        return now if found == owner and now != generation else None
    return blob.generation
