"""What a worker process of the loader runs."""

import contextlib
import ctypes
import os
import pickle
import queue
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

import jax

from mambaout_jax.data.buffers import BatchBuffers, SharedMemory
from mambaout_jax.data.chunks import Chunk, Filler
from mambaout_jax.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# Sent to all processes of a run: the main process decides when its workers end.
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def work(
    pipe: Connection,
    memory: SharedMemory,
    buffers: BatchBuffers,
    threads: int,
    cores: int,
) -> None:
    """Fills chunks until the parent closes the pipe or dies. Runs in the worker process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _keep_freed_memory()
    jax.config.update("jax_platforms", "cpu")  # the accelerators belong to the main process
    chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
    fill = Filler(pickle.loads(memory.bytes), buffers, cores)
    sending = threading.Lock()

    def fill_chunks() -> None:
        while True:
            chunk = chunks.get()
            filled = error = None
            try:
                filled = fill(chunk)
            except Exception as caught:
                error = _portable(caught)
            with sending, contextlib.suppress(OSError):  # the parent is gone
                pipe.send((chunk, filled, error))

    for _ in range(threads):
        threading.Thread(target=fill_chunks, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            chunks.put(pipe.recv())
    os._exit(0)  # without waiting for chunks that nobody needs


def _keep_freed_memory() -> None:
    """Lets glibc keep freed memory: the next image needs as much, and page faults take time."""
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def _portable(error: Exception) -> Exception:
    """Returns an error, or its text, as it can be sent to the parent, with its traceback."""
    if not isinstance(error, UserError):  # its message is enough
        lines = traceback.format_exception(error)
        error.add_note("In a loader worker:\n" + "".join(lines).rstrip())
    error.__cause__ = error.__context__ = None
    try:
        copy: Any = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    if type(copy) is type(error):
        return error
    return RuntimeError(repr(error), *getattr(error, "__notes__", ()))
