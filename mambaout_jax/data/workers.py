"""Worker processes that fill chunks of batches, and what happens when one of them dies.

Why not a library's pool: Grain's workers copy each image twice through new shared memory, which
takes a quarter of the time of making it. `ProcessPoolExecutor` does not say which worker died, and
ends the others with SIGTERM, which these ignore.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import pickle
import selectors
import signal
import socket
import threading
from collections.abc import Iterator
from multiprocessing import connection, process, resource_tracker, util

from mambaout_jax.data.buffers import BatchBuffers, SharedMemory
from mambaout_jax.data.chunks import Chunk, Filled, Maker
from mambaout_jax.data.worker_process import SIGNALS, work

_PATIENCE = 5.0  # seconds in which an idle worker must end
_context = multiprocessing.get_context("spawn")


class WorkerLostError(Exception):
    """A worker process of the loader died. The run can be saved and resumed.

    Attributes:
      worker: number of the worker.
      pid: its process id.
      signal: name of the signal that killed it, None if none did.
      status: its exit status, negative for a signal.
      chunks: what it had not finished.
    """

    def __init__(self, worker: int, pid: int, status: int, chunks: tuple[Chunk, ...] = ()):
        self.worker, self.pid, self.status, self.chunks = worker, pid, status, chunks
        self.signal: str | None = None
        with contextlib.suppress(ValueError):
            self.signal = signal.Signals(-status).name
        super().__init__(worker, pid, status, chunks)

    def __str__(self) -> str:
        how = f"was killed by {self.signal}" if self.signal else f"ended with status {self.status}"
        where = f" while it made step {self.chunks[0].step + 1}" if self.chunks else ""
        hint = ""
        if self.signal == "SIGKILL":
            hint = "; if memory ran out (see dmesg), lower data.workers"
        return f"loader worker {self.worker} (process {self.pid}) {how}{where}{hint}"


@dataclasses.dataclass(eq=False)
class _Worker:
    """A worker process as its parent sees it."""

    process: process.BaseProcess
    pipe: connection.Connection
    chunks: dict[Chunk, concurrent.futures.Future] = dataclasses.field(default_factory=dict)


class WorkerPool:
    """Processes that fill chunks of batches in shared memory."""

    def __init__(self, maker: Maker, buffers: BatchBuffers, workers: int, threads: int, cores: int):
        """Starts the processes.

        Args:
          maker: fills the chunks.
          buffers: where they are.
          workers: number of processes.
          threads: of each process.
          cores: how many threads of a process may compute at once; the others read.
        """
        pickled = pickle.dumps(maker)
        # A large argument would let each process start only when the one before it has read it.
        memory = SharedMemory(len(pickled))
        memory.bytes[:] = pickled
        with _signals_blocked():
            self._workers = [
                _start(index, (memory, buffers, threads, cores)) for index in range(workers)
            ]
        self._most = threads + 1  # chunks of a worker: one waits, so that no thread does
        self._waiting: collections.deque[tuple[Chunk, concurrent.futures.Future]]
        self._waiting = collections.deque()
        self._lock = threading.Lock()
        self._lost: WorkerLostError | None = None
        self._wake, self._woken = socket.socketpair()
        pipes = [worker.pipe for worker in self._workers]
        # Before multiprocessing's own clean-up, which waits for processes that see no end of file.
        self._at_exit = util.Finalize(self, _close_all, (pipes,), exitpriority=10)
        self._thread = threading.Thread(target=self._receive, name="loader results", daemon=True)
        self._thread.start()

    def submit(self, chunk: Chunk) -> "concurrent.futures.Future[Filled]":
        """Lets a worker fill a chunk. The result fails with `WorkerLostError` if a worker dies."""
        future: concurrent.futures.Future[Filled] = concurrent.futures.Future()
        with self._lock:
            self._waiting.append((chunk, future))
            self._assign()
        return future

    def close(self) -> None:
        """Ends the processes."""
        self._wake.close()
        if threading.current_thread() is not self._thread:  # where the garbage collector may run
            self._thread.join()
        self._at_exit()
        for worker in self._workers:
            worker.process.join(_PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def _assign(self) -> None:
        """Gives waiting chunks to the workers with the fewest; the lock is held."""
        while self._waiting:
            if self._lost:
                self._waiting.popleft()[1].set_exception(self._lost)
                continue
            worker = min(self._workers, key=lambda worker: len(worker.chunks))
            if len(worker.chunks) == self._most:
                return
            chunk, future = self._waiting.popleft()
            worker.chunks[chunk] = future
            with contextlib.suppress(OSError):  # a dead worker: its exit status says why
                worker.pipe.send(chunk)

    def _receive(self) -> None:
        """Receives results until the pool is closed or a worker dies."""
        with self._woken, selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for worker in self._workers:
                selector.register(worker.pipe, selectors.EVENT_READ, worker)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    try:
                        result = key.data.pipe.recv()
                    except (EOFError, OSError, pickle.UnpicklingError):
                        self._lose(key.data)
                        return
                    self._finish(key.data, *result)

    def _finish(
        self, worker: _Worker, chunk: Chunk, filled: Filled | None, error: Exception | None
    ) -> None:
        with self._lock:
            future = worker.chunks.pop(chunk)
            self._assign()
        if filled is not None:
            future.set_result(filled)
        else:
            future.set_exception(error)

    def _lose(self, worker: _Worker) -> None:
        worker.process.join()
        index, pid, status = (
            self._workers.index(worker),
            worker.process.pid,
            worker.process.exitcode,
        )
        with self._lock:
            self._lost = WorkerLostError(index, pid or 0, status or 0, tuple(worker.chunks))
            for each in self._workers:
                for future in each.chunks.values():
                    future.set_exception(self._lost)
                each.chunks.clear()
            self._assign()


def _start(index: int, arguments: tuple) -> _Worker:
    ours, theirs = _context.Pipe()
    worker = _context.Process(
        target=work, args=(theirs, *arguments), name=f"loader worker {index}", daemon=True
    )
    worker.start()
    theirs.close()  # so that its end is closed when the worker dies
    return _Worker(worker, ours)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks the signals that workers ignore, until a worker that starts here ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # it unblocks them; once it runs it is left alone
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _close_all(pipes: list[connection.Connection]) -> None:
    for pipe in pipes:
        pipe.close()
