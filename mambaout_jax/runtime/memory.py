"""Errors that say that a device or the host ran out of memory, as sentences."""

import contextlib
import re
from collections.abc import Callable, Iterator

import jax

from mambaout_jax.errors import UserError, first_line

# XLA's messages of all platforms. Most begin with RESOURCE_EXHAUSTED; what is found when a program
# is dispatched may begin with INTERNAL.
_EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED.*(memory|allocat)|out.of.memory", re.I | re.DOTALL)
# A kernel that needs more than the memory of a core does so with any batch.
_IN_CORE = re.compile(r"shared memory|\b[sv]mem\b", re.IGNORECASE)


class DeviceMemoryError(UserError):
    """A device ran out of memory."""


def is_exhausted(error: BaseException) -> bool:
    """Returns whether JAX reports that a device ran out of memory."""
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    return bool(_EXHAUSTED.search(str(error))) and not _IN_CORE.search(str(error))


@contextlib.contextmanager
def memory_for(message: Callable[[str], str]) -> Iterator[None]:
    """Turns an error of JAX about the memory of a device into one sentence.

    Args:
        message: returns the sentence, of what does not fit and what to do, for XLA's own reason,
            which is one line.

    Raises:
        DeviceMemoryError: with the message.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        raise DeviceMemoryError(message(first_line(error).rstrip("."))) from error


@contextlib.contextmanager
def host_memory_for(message: Callable[[str], str]) -> Iterator[None]:
    """Turns Python's MemoryError into one sentence, as `memory_for` does with JAX's error.

    Raises:
        UserError: with the message.
    """
    try:
        yield
    except MemoryError as error:
        raise UserError(message(first_line(error).rstrip("."))) from error
