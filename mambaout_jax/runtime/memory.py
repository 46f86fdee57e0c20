"""The memory of the devices: how an allocation that failed is recognised and reported."""

import contextlib
import re
from collections.abc import Callable, Iterator

import jax

from mambaout_jax.errors import UserError, first_line

# XLA's messages of all platforms. Most begin with RESOURCE_EXHAUSTED; what is found when a program
# is dispatched may begin with INTERNAL.
_EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED.*(memory|allocat)|out.of.memory", re.I | re.DOTALL)
# The memory inside a core, which a kernel exceeds with any batch.
_IN_CORE = re.compile(r"shared memory|\b[sv]mem\b", re.IGNORECASE)


class DeviceMemoryError(UserError):
    """The memory of the devices does not suffice."""


def is_exhausted(error: BaseException) -> bool:
    """Returns whether an error is of jax, and says that a device has too little memory."""
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    return bool(_EXHAUSTED.search(str(error))) and not _IN_CORE.search(str(error))


@contextlib.contextmanager
def memory_for(message: Callable[[str], str]) -> Iterator[None]:
    """Reports memory of the devices that is exhausted as one sentence.

    Args:
        message: XLA's own reason, of one line, to the sentence: what does not fit, and what to do.

    Raises:
        DeviceMemoryError: with the message.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        raise DeviceMemoryError(message(first_line(error).rstrip("."))) from error
