"""Errors that end a run or a command, and how their messages are made."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user: its message is one clear sentence, shown without a traceback.

    The message names the thing, says what was expected and how to fix it.
    """


class StorageError(UserError):
    """Storage that failed at every attempt: nothing is damaged, and a later attempt may succeed."""


class FullError(UserError):
    """Storage without space, or above its quota: nothing that was there is damaged."""


class AccessError(UserError):
    """Storage that refuses access, for its credentials or permissions: nothing is damaged."""


class PreemptedError(Exception):
    """The run was asked to stop: it is saved, and the same command resumes it."""


def first_line(error: BaseException, limit: int = 200) -> str:
    """Returns the first line of an error's message, or the error's type where it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:limit]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'NAME'?" for the closest known name, "" if none is close."""
    close = difflib.get_close_matches(name, list(known), 1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
