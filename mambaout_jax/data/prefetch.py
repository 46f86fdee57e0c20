"""Makes batches ahead of time, in threads or in worker processes."""

import collections
import concurrent.futures
import math
import time
import weakref
from collections.abc import Iterator

from mambaout_jax.data.buffers import Batch, BatchBuffers
from mambaout_jax.data.chunks import Chunk, Damages, Filled, Filler, Maker
from mambaout_jax.data.parallel import Parallel
from mambaout_jax.data.workers import WorkerLostError, WorkerPool
from mambaout_jax.errors import UserError

CHUNK = 16  # images that a thread makes at a time

_LEAST_AHEAD = 2  # batches
_SPARE = 3  # batches that the caller may keep, such as those on the way to a device
_REPEAT_SECONDS = 20.0  # in which the work of a dead worker is repeated


class BatchesAhead(Iterator[tuple[Batch, Damages]]):
    """Batches, with the images that could not be decoded, from a maker that runs ahead.

    The arrays of a batch are used again for a later one when none of them exists any more.
    """

    def __init__(self, maker: Maker, parallel: Parallel, first: int, stop: int | None = None):
        """Starts threads or processes, and begins to make batches.

        Args:
          maker: of the batches.
          parallel: how many threads and processes.
          first: number of the first batch.
          stop: number after the last batch; None: endless.
        """
        self._maker = maker
        self._stop = stop
        self._next = first
        chunks = math.ceil(maker.layout.rows / CHUNK)
        self._ahead = max(_LEAST_AHEAD, math.ceil(parallel.chunks_at_once / chunks))
        self._buffers = BatchBuffers(maker.layout, self._ahead + _SPARE)
        self._pool = _open_pool(maker, self._buffers, parallel)
        self._pending: collections.deque[_Pending] = collections.deque()
        self.reading = self.making = 0.0  # seconds of all threads, see `Filled`
        self.close = weakref.finalize(self, self._pool.close)
        self._fill()

    def __next__(self) -> tuple[Batch, Damages]:
        if not self._pending:
            self.close()
            raise StopIteration
        slot, futures = self._pending.popleft()
        damages: Damages = []
        try:
            for future in futures:
                filled = future.result()
                damages += filled.damages
                self.reading += filled.reading
                self.making += filled.making
        except WorkerLostError as lost:
            self.close()
            raise cause_of_loss(lost, self._maker, self._buffers) from None
        except BaseException:
            self.close()
            raise
        batch = self._buffers.hand_out(slot)
        self._fill()
        return batch, damages

    def _fill(self) -> None:
        """Submits batches until enough are under way."""
        rows = self._maker.layout.rows
        while len(self._pending) < self._ahead and self._next != self._stop:
            slot = self._buffers.take()
            assert slot is not None, "hand_out leaves one"
            chunks = [
                Chunk(self._next, start, min(start + CHUNK, rows), slot)
                for start in range(0, rows, CHUNK)
            ]
            self._pending.append((slot, [self._pool.submit(chunk) for chunk in chunks]))
            self._next += 1


_Pending = tuple[int, list["concurrent.futures.Future[Filled]"]]


class ThreadPool:
    """Threads of this process that fill chunks."""

    def __init__(self, maker: Maker, buffers: BatchBuffers, threads: int, cores: int):
        self._fill = Filler(maker, buffers, cores)
        self._threads = concurrent.futures.ThreadPoolExecutor(threads, "loader")

    def submit(self, chunk: Chunk) -> "concurrent.futures.Future[Filled]":
        """Lets a thread fill a chunk."""
        return self._threads.submit(self._fill, chunk)

    def close(self) -> None:
        """Ends the threads after their current chunks.

        Does not wait for them: the garbage collector may call this in one of them.
        """
        self._threads.shutdown(wait=False, cancel_futures=True)


def _open_pool(maker: Maker, buffers: BatchBuffers, parallel: Parallel) -> ThreadPool | WorkerPool:
    if parallel.workers:
        return WorkerPool(maker, buffers, parallel.workers, parallel.threads, parallel.cores)
    return ThreadPool(maker, buffers, parallel.threads, parallel.cores)


def cause_of_loss(lost: WorkerLostError, maker: Maker, buffers: BatchBuffers) -> Exception:
    """Repeats what a dead worker had not finished, one image at a time in a new process.

    A run that resumes would repeat it too, and be lost again at an image that kills workers.

    Returns:
      A UserError that names the image if that process dies twice at the same image, or cannot
      start. Otherwise `lost`, also when the time for repeating it is up.
    """
    end = time.monotonic() + _REPEAT_SECONDS
    none = [Chunk(chunk.step, 0, 0, chunk.slot) for chunk in lost.chunks[:1]]
    rows = [row for chunk in lost.chunks for row in chunk.rows()]
    try:
        if _first_fatal(none + rows, maker, buffers, end) is None:
            return lost
        fatal = _first_fatal(none + rows, maker, buffers, end)
    except TimeoutError:
        return lost
    if fatal is None:
        return lost
    how = f"are killed by {lost.signal}" if lost.signal else f"end with status {lost.status}"
    if fatal in none:
        return UserError(f"loader workers {how} when they start: see their messages above")
    memory = ", or give the run more memory" if lost.signal == "SIGKILL" else ""
    return UserError(
        f"loader workers {how} each time they make {maker.name(fatal.step, fatal.start)}: repair "
        f"or remove it{memory}"
    )


def _first_fatal(
    chunks: list[Chunk], maker: Maker, buffers: BatchBuffers, end: float
) -> Chunk | None:
    """Returns the first chunk that kills a worker process, None if none does.

    Raises:
      TimeoutError: the time is up.
    """
    pool = WorkerPool(maker, buffers, workers=1, threads=1, cores=1)
    try:
        for chunk in chunks:
            try:
                pool.submit(chunk).result(end - time.monotonic())
            except WorkerLostError:
                return chunk
            except UserError:
                continue  # such as a damaged image: it kills nothing
    finally:
        pool.close()
    return None
