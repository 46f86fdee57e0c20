"""Measures how the time of a run is divided: data, device, checkpoints, evaluation, compilation."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator

import jax

DATA, DEVICE, SAVE, EVALUATE, COMPILE = "data wait", "device", "checkpoint", "evaluation", "compile"
HOST = "host"  # the rest: the devices wait for the main thread to prepare and dispatch a step


class Goodput:
    """Divides the time since the run began, by what the devices do or wait for.

    "device" is the time in which they compute training steps. At other times they wait for a batch
    ("data wait") or for the main thread ("host"), or the run evaluates, saves or compiles. Steps
    are dispatched ahead, so what the main thread does while the devices compute is not counted. A
    thread waits for the result of each step and records when it ended.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds = dict.fromkeys((DATA, DEVICE, SAVE, EVALUATE, COMPILE), 0.0)
        self._waited = (self.began, self.began)  # for the next step's batch: from, to
        self._ended = self.began  # the last step
        self._steps: queue.Queue[tuple[float, tuple[float, float], jax.Array] | None]
        self._steps = queue.Queue()
        threading.Thread(target=self._watch, name="goodput", daemon=True).start()

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Counts the time inside as `part`, which is SAVE, EVALUATE or COMPILE."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting_for_batch(self) -> Iterator[None]:
        """Records when the main thread waits for the batch of the next step."""
        start = time.perf_counter()
        yield
        self._waited = (start, time.perf_counter())

    def dispatched(self, start: float, result: jax.Array) -> None:
        """Records a step.

        Args:
            start: when its dispatch began, by `time.perf_counter`.
            result: one of its results.
        """
        self._steps.put((start, self._waited, result))

    def elapsed(self) -> dict[str, float]:
        """Returns the seconds of each part since the beginning; waits for the dispatched steps."""
        self._steps.join()
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

    def close(self) -> None:
        """Ends the thread after the dispatched steps, without waiting for it."""
        self._steps.put(None)

    def _watch(self) -> None:
        while (step := self._steps.get()) is not None:
            start, waited, result = step
            with contextlib.suppress(Exception):  # the main thread raises the step's error, too
                result.block_until_ready()
            end = time.perf_counter()
            starved, busy = divide(self._ended, waited, start, end)
            self.seconds[DATA] += starved
            self.seconds[DEVICE] += busy
            self._ended = end
            self._steps.task_done()


def divide(
    before: float, waited: tuple[float, float], start: float, end: float
) -> tuple[float, float]:
    """Returns the seconds in which the devices had no batch, and those in which they computed.

    Args:
        before: when the step before this one ended.
        waited: when the main thread began and ended to wait for the batch.
        start: when the dispatch of the step began.
        end: when the step ended.
    """
    starved = max(0.0, waited[1] - max(waited[0], before))
    return starved, end - max(start, before)
