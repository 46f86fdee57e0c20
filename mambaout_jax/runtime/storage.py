"""Failing storage: retries, and the distinction between temporary faults and damage."""

import logging
import os
import re
from collections.abc import Callable
from typing import TypeVar

import tenacity

from mambaout_jax.bucket import TRANSIENT_ERRORS, failed
from mambaout_jax.errors import AccessError, StorageError, first_line

logger = logging.getLogger(__name__)

# Error numbers and words of temporary faults, in messages of the system, of TensorStore, of
# array_record and of buckets' servers. Any other error while reading a checkpoint means damage.
_ONE = "|".join(map(str, TRANSIENT_ERRORS))
TRANSIENT = re.compile(
    rf"\[Errno ({_ONE})\]|os_error_code='?({_ONE})\b"
    rf"|{'|'.join(re.escape(os.strerror(number)) for number in TRANSIENT_ERRORS)}"
    r"|UNAVAILABLE|DEADLINE_EXCEEDED|Too Many Requests|Service Unavailable"
)
READ_ATTEMPTS = 4

T = TypeVar("T")


def system_error(error: BaseException) -> BaseException:
    """Returns the system's error that a message of Orbax or TensorStore names, or else the same."""
    if number := re.search(r"\[Errno (\d+)\]|os_error_code='?(\d+)", str(error)):
        code = int(number[1] or number[2])
        return OSError(code, os.strerror(code))
    return error


def cause(error: BaseException) -> str:
    """Returns the cause in an error message of Orbax or TensorStore."""
    found = system_error(error)
    return getattr(found, "strerror", None) or first_line(found)


def reading(read: Callable[[], T], what: str) -> T:
    """Returns what `read` returns, with retries if storage fails temporarily.

    Raises:
        StorageError: when storage still fails at the last attempt.
        AccessError: when storage refuses access.
        Exception: any other error of `read`: damage.
    """

    def report(attempt: tenacity.RetryCallState) -> None:
        error = attempt.outcome and attempt.outcome.exception()
        logger.warning("reading %s failed (%s): trying again", what, error and cause(error))

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        stop=tenacity.stop_after_attempt(READ_ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=0.5),
        before_sleep=report,
        reraise=True,
    )
    try:
        return attempts(read)
    except Exception as error:
        if is_transient(error):
            raise StorageError(
                f"{what} cannot be read: {cause(error)}; nothing was changed: the same command "
                "continues when the storage can be read again"
            ) from error
        failure = failed(f"{what} cannot be read", error)
        if isinstance(failure, AccessError):
            raise failure from error
        raise


def is_transient(error: BaseException) -> bool:
    """Returns whether an error is a temporary fault of storage."""
    return bool(TRANSIENT.search(str(error))) or isinstance(failed("", error), StorageError)
