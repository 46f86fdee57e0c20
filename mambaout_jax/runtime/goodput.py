"""Where the time of a run goes."""

import contextlib
import time
from collections.abc import Iterator

import jax

WAIT, SAVE, EVALUATE, COMPILE, STEP = "input wait", "checkpoint", "evaluation", "compile", "step"


class Goodput:
    """Counts the seconds of a process since it began; what is not counted elsewhere is the step's.

    Compiling is counted by jax itself, and taken off what it happened within. As the device works
    while the host goes on, "step" holds all that the host waits for the device.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds = dict.fromkeys((WAIT, SAVE, EVALUATE, COMPILE), 0.0)
        self._within: str | None = None
        jax.monitoring.register_event_duration_secs_listener(self._compiled)

    def _compiled(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds[COMPILE] += duration_secs
            if self._within:
                self.seconds[self._within] -= duration_secs

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Counts the time inside as `what`."""
        start, self._within = time.perf_counter(), what
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start
            self._within = None

    def shares(self) -> dict[str, float]:
        """Returns the parts of the time since the beginning, which sum to 1."""
        total = max(time.perf_counter() - self.began, 1e-9)
        parts = {what: seconds / total for what, seconds in self.seconds.items()}
        return {STEP: 1 - sum(parts.values())} | parts

    def line(self) -> str:
        """Returns the parts as one line of text."""
        parts = ", ".join(f"{what} {share:.1%}" for what, share in self.shares().items())
        return f"time since the start, {time.perf_counter() - self.began:,.0f} s: {parts}"

    def close(self) -> None:
        """Counts no more."""
        jax.monitoring.unregister_event_duration_listener(self._compiled)
