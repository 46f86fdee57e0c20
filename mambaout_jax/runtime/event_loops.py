"""Hides the tracebacks of Orbax's other reads and writes after one of them failed.

When one array of a checkpoint cannot be read or written, Orbax raises at once and closes its event
loop. The errors of the other arrays reach nobody: callbacks in threads of TensorStore fail, and
asyncio logs what was not retrieved.
"""

import logging
import sys


class _Hook:
    """Drops errors of callbacks after their event loop is closed; passes on all others."""

    def __init__(self) -> None:
        self.previous = sys.unraisablehook

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Handles an exception that cannot be raised."""
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self.previous(unraisable)


def _is_of_others(record: logging.LogRecord) -> bool:
    """Returns whether a record of asyncio is about something else than Orbax's tasks."""
    text = logging.Formatter().format(record)  # with the traceback
    return not ("never retrieved" in text and ("tensorstore" in text or "orbax" in text))


def hide_later_errors() -> None:
    """Hides these errors from now on. The first one, which Orbax raises, is reported elsewhere."""
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook()
    logging.getLogger("asyncio").addFilter(_is_of_others)  # once: it is the same function
