"""The wish of the machine that a run end: SIGTERM, which is also what Cloud's notice arrives as.

Of several processes the one that is asked tells the others: jax's preemption service names a step
that all of them reach.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
    """Yields a function that tells, after each step, whether to save and end there.

    Every process must call it with every step. Further signals change nothing.
    """
    if jax.process_count() > 1:  # the service of jax listens for SIGTERM
        yield multihost_utils.reached_preemption_sync_point
        return
    noticed = threading.Event()

    def notice(number: int, frame: FrameType | None) -> None:
        noticed.set()

    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, notice)
    try:
        yield lambda step: noticed.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
