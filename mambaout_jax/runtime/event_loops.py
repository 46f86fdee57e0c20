"""Hides the tracebacks of Orbax's pending reads and writes after one of them failed."""

import sys


class _Hook:
    """Drops errors of callbacks that come after their event loop is closed; passes on all others.

    When one array of a checkpoint cannot be read or written, Orbax raises at once and closes its
    event loop. The other arrays' callbacks, in threads of TensorStore, then fail one by one.
    """

    def __init__(self) -> None:
        self.previous = sys.unraisablehook

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Handles an exception that cannot be raised."""
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self.previous(unraisable)


def ignore_closed_event_loops() -> None:
    """Hides these tracebacks from now on. The error that Orbax raised is reported elsewhere."""
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook()
