"""Reading encoded images from disks and networks."""

import os
from collections.abc import Callable
from typing import TypeVar

from mambaout_jax.data.decoding import UnreadableError
from mambaout_jax.errors import StorageError
from mambaout_jax.runtime.storage import cause, reading

T = TypeVar("T")


def repeat(read: Callable[[], T], name: str) -> T:
    """Returns what `read` returns, after further attempts where storage fails for a while.

    Raises:
      StorageError: storage still fails at the last attempt.
      Exception: any other error of `read`.
    """
    try:
        return read()
    except Exception:  # only now: `reading` takes longer than a read from memory
        return reading(read, name)


def unreadable(name: str, error: StorageError) -> UnreadableError:
    """Returns what to raise for one image whose storage failed at each attempt."""
    return UnreadableError(f"{name} cannot be read: {cause(error.__cause__ or error)}")


def read_file(path: str) -> bytes:
    """Returns the content of a file. A FIFO is empty: the read does not wait for a writer."""
    with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
        return file.readall()


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
