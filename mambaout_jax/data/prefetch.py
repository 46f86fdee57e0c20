"""Makes chunks of a batch ahead of time in threads or worker processes, and joins them."""

import multiprocessing
import os
import shutil
import sys
import threading
from pathlib import Path

import grain
import jax
import numpy as np
from absl import flags

from mambaout_jax.errors import UserError

CHUNK = 16  # images that a thread makes at a time, and that a process sends at a time
_BATCHES_AHEAD = 2
_FEW_CORES = 4  # up to here the threads of one process keep all cores busy
_MOST_WORKERS = 64  # one process can still join the chunks of so many
_WORTH_A_WORKER = 1500  # images made in the seconds that a process takes to start
_CHUNKS_SHARED = 8  # chunks of a worker in shared memory: four of training, four of evaluation
_SHARED_MEMORY = Path("/dev/shm")


def per_batch(rows: int) -> int:
    """Returns the number of chunks in a batch of `rows` images."""
    return -(-rows // CHUNK)


def join_ahead(chunks: grain.MapDataset, rows: int, workers: tuple[int, int]) -> grain.IterDataset:
    """Makes chunks ahead of time in threads or worker processes, and joins them to batches.

    Args:
      chunks: of `CHUNK` images; the last one of a batch may have fewer.
      rows: images in a batch.
      workers: the number of processes, and the number of threads of each.

    Returns:
      The batches.
    """
    num_workers, num_threads = workers
    ahead = _BATCHES_AHEAD * per_batch(rows)
    if num_workers:
        ahead = -(-ahead // num_workers)
    options = grain.ReadOptions(
        num_threads=min(num_threads, ahead), prefetch_buffer_size=ahead
    )  # more threads than chunks ahead would be idle
    dataset = chunks.to_iter_dataset(options)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags of its own before it starts workers
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1),
            worker_init_fn=_begin_worker,
        )
    joined = _Joined(dataset, rows)
    return grain.experimental.ThreadPrefetchIterDataset(joined, prefetch_buffer_size=1)


class _Joined(grain.IterDataset):
    """Joins chunks to batches of `rows` images."""

    def __init__(self, chunks: grain.IterDataset, rows: int):
        super().__init__(chunks)
        self._chunks = chunks
        self._rows = rows

    def __iter__(self) -> "_JoinedIterator":
        return _JoinedIterator(iter(self._chunks), self._rows)


class _JoinedIterator(grain.DatasetIterator):
    """Has no state, and does not ask its parent for one as Grain's `batch` would.

    Worker processes that are asked for a state before the first chunk start one after the other,
    which takes minutes for many. Each chunk is copied when it arrives, so few are in shared memory.
    """

    def __init__(self, chunks: grain.DatasetIterator, rows: int):
        super().__init__(chunks)
        self._chunks = chunks
        self._rows = rows

    def __next__(self) -> dict:
        batch: dict = {"damages": []}
        row = 0
        while row < self._rows:
            chunk = next(self._chunks)
            batch["damages"] += chunk.pop("damages")
            stop = row + len(chunk["label"])
            for key, part in chunk.items():
                if key not in batch:
                    batch[key] = np.empty((self._rows, *part.shape[1:]), part.dtype)
                batch[key][row:stop] = part
            row = stop
        return batch

    def get_state(self) -> dict:
        return {}

    def set_state(self, state: dict) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._chunks.close()


def _begin_worker(worker_index: int, worker_count: int) -> None:
    """Keeps a worker process off the accelerators, and ends it when its parent is killed."""
    del worker_index, worker_count
    jax.config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def worker_options(
    workers: int, threads: int, size: tuple[int, int], images: int | None = None
) -> tuple[int, int]:
    """Returns the number of worker processes, and the number of threads of each.

    Args:
      workers: the number asked for; -1: chosen by the number of cores.
      threads: the number asked for.
      size: (height, width) of an image.
      images: how many are made before the workers end; None: the stream is endless.

    Raises:
      UserError: shared memory is too small for the workers asked for.
    """
    each = _CHUNKS_SHARED * CHUNK * 3 * size[0] * size[1]  # bytes
    free = free_shared_memory()
    if workers == -1:
        cores = usable_cores()
        workers = min(cores, _MOST_WORKERS, free // each) if cores > _FEW_CORES else 0
        if images is not None:
            workers = min(workers, images // _WORTH_A_WORKER)
        return workers, threads
    if workers * each > free:
        raise UserError(
            f"data.workers is {workers}, which may need {workers * each >> 20} MiB in "
            f"{_SHARED_MEMORY}, where {free >> 20} MiB are free: lower it, or give the container "
            f"more (docker run --shm-size)"
        )
    return workers, threads


def usable_cores() -> int:
    """Returns how many cores this process may use, in a container too."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(int(quota) // int(period), 1))
    except (OSError, ValueError):  # no Linux, or no limit ("max")
        return cores


def free_shared_memory() -> int:
    """Returns the bytes that processes may still share."""
    return shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else sys.maxsize


def share(batch_size: int, process_count: int, key: str) -> int:
    """Returns a process's share of a batch, or raises a UserError that names the key."""
    if batch_size % process_count:
        raise UserError(
            f"{key} is {batch_size}: expected a multiple of the {process_count} processes"
        )
    return batch_size // process_count
