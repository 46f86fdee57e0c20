"""Requests to stop: SIGTERM (a cluster's notice), SIGINT (Ctrl-C) and SIGHUP (a closed terminal).

A run that is asked to stop saves and exits with status 75. Before there is anything to save it
exits at once; a second Ctrl-C always does.
"""

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
from types import FrameType, TracebackType

import jax
from orbax.checkpoint import multihost

logger = logging.getLogger(__name__)

# Exit codes: RESUME is EX_TEMPFAIL of sysexits.h, INTERRUPTED what a shell reports of Ctrl-C.
RESUME, INTERRUPTED = 75, 130
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Seconds that processes with nothing to save wait for a common point to stop at.
GRACE_SECONDS = 45


class StopRequest:
    """Notices signals from its creation to `close`.

    A thread reads the signals' numbers as they arrive, since Python runs signal handlers only
    between instructions of the main thread, which may be compiling for minutes.

    Attributes:
        received: name of the first signal, or another reason to stop; None before it.
        saves: whether the run has something to save when it stops; set by the training loop.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.saves = False
        self._points = self._interrupts = 0
        self._jax_handler: int | None = None
        self._numbers, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(
            self._wakeup.fileno(), warn_on_full_buffer=False
        )
        # A process that was started to ignore a signal, as by nohup, goes on ignoring it.
        ignored = [n for n in SIGNALS if signal.getsignal(n) is signal.SIG_IGN]
        self._previous = {n: signal.signal(n, _noticed) for n in SIGNALS if n not in ignored}
        threading.Thread(target=self._watch, daemon=True, name="signals").start()

    def join_service(self) -> None:
        """Connects with jax's preemption service, after `jax.distributed.initialize`.

        The service's handler of SIGTERM replaced ours. It is kept, to inform the other processes
        of any of the signals.
        """
        if jax.process_count() == 1 or signal.SIGTERM not in self._previous:
            return
        self._jax_handler = _default_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, _noticed)

    def reached(self) -> bool:
        """Returns whether to stop here; every process must call it at the same points."""
        if jax.process_count() == 1:  # jax has no preemption service there
            return self.received is not None
        self._points += 1
        return multihost.reached_preemption(self._points)

    def _watch(self) -> None:
        while numbers := self._numbers.recv(64):
            for number in numbers:
                if number in self._previous:
                    self._notice(number)

    def _notice(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                _exit(f"stopped by a second {name}: the last checkpoint is kept", INTERRUPTED)
        if self.received:
            return
        self.request(name)
        if self._jax_handler is None:
            self._exit_unsaved()
        else:
            timer = threading.Timer(GRACE_SECONDS, self._exit_unsaved)
            timer.daemon = True
            timer.start()
        if self.saves:
            logger.info("received %s: saving and stopping", name)

    def request(self, reason: str) -> None:
        """Asks this process, and through jax's service all others, to stop."""
        self.received = reason
        if self._jax_handler is not None:
            # Called as a function: a signal might arrive only after its handler has changed again.
            ctypes.CFUNCTYPE(None, ctypes.c_int)(self._jax_handler)(signal.SIGTERM)

    def _exit_unsaved(self) -> None:
        if not self.saves:
            _exit(f"stopped by {self.received}: the same command starts or resumes the run", RESUME)

    def close(self) -> None:
        """Restores the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        self._wakeup.close()

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _noticed(number: int, frame: FrameType | None) -> None:
    """Handles a signal in Python's main thread: the thread of `StopRequest` acts on it."""


def _default_handler(number: int) -> int | None:
    """Sets a signal's default handler; returns the address of the handler before it."""
    libc_signal = ctypes.CDLL(None).signal
    libc_signal.restype = ctypes.c_void_p
    libc_signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    return libc_signal(number, None)


def _exit(message: str, code: int) -> None:
    """Ends the process now, whatever its threads do."""
    print(message, file=sys.stderr, flush=True)
    os._exit(code)
