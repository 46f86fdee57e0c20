"""Measures how the time of a run is divided: data, device, checkpoints, evaluation, compilation."""

import contextlib
import time
from collections.abc import Iterator

DATA, DEVICE, SAVE, EVALUATE, COMPILE = "data wait", "device", "checkpoint", "evaluation", "compile"
HOST = "host"  # the rest: the main thread prepares and dispatches steps


class Goodput:
    """Counts the seconds of the main thread since the run began.

    While the device computes, the main thread waits for it ("device"), waits for batches ("data
    wait"), or works ("host"). Steps are dispatched ahead, so "host" and "data wait" are time that
    the device may be computing too: a run is starved when "data wait" is high and "device" is near
    0. Compilation is measured by jax, and subtracted from the part that it happened in.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds = dict.fromkeys((DATA, DEVICE, SAVE, EVALUATE, COMPILE), 0.0)

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Counts the time inside as `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def elapsed(self) -> dict[str, float]:
        """Returns the seconds of each part since the beginning; HOST is the rest."""
        total = time.perf_counter() - self.began
        return self.seconds | {HOST: total - sum(self.seconds.values())}

    def shares(self) -> dict[str, float]:
        """Returns the parts of the time since the beginning, which sum to 1."""
        elapsed = self.elapsed()
        total = max(sum(elapsed.values()), 1e-9)
        return {part: seconds / total for part, seconds in elapsed.items()}

    def line(self) -> str:
        """Returns the parts as one line of text."""
        parts = ", ".join(f"{part} {share:.1%}" for part, share in self.shares().items())
        return f"time of {time.perf_counter() - self.began:,.0f} s: {parts}"
