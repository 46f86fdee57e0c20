"""Chunks of a batch, made ahead of time in threads or worker processes, and joined to batches."""

import os

import grain
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from mambaout_jax.errors import UserError

CHUNK = 16  # pictures that a thread makes at a time, and that travel between processes at once
_BATCHES_AHEAD = 2
_FEW_CORES = 4  # that threads of one process keep busy, before they wait for Python's lock
_MOST_WORKERS = 64  # whose chunks one process still joins
_WORTH_A_WORKER = 1500  # pictures made in the seconds that a process takes to start


def join_ahead(
    chunks: grain.MapDataset, per_batch: int, workers: tuple[int, int]
) -> grain.IterDataset:
    """Makes chunks ahead of time in threads or worker processes, and joins them to batches."""
    num_workers, num_threads = workers
    ahead = _BATCHES_AHEAD * per_batch
    if num_workers:
        ahead = -(-ahead // num_workers)
    options = grain.ReadOptions(
        num_threads=min(num_threads, ahead), prefetch_buffer_size=ahead
    )  # more threads than chunks ahead would have nothing to do
    dataset = chunks.to_iter_dataset(options)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags of its own before it starts workers
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1),
            worker_init_fn=_keep_off_accelerators,
        )
    joined = _Joined(dataset, per_batch)
    return grain.experimental.ThreadPrefetchIterDataset(joined, prefetch_buffer_size=1)


class _Joined(grain.IterDataset):
    """Joins chunks to batches."""

    def __init__(self, chunks: grain.IterDataset, per_batch: int):
        super().__init__(chunks)
        self._chunks = chunks
        self._per_batch = per_batch

    def __iter__(self) -> "_JoinedIterator":
        return _JoinedIterator(iter(self._chunks), self._per_batch)


class _JoinedIterator(grain.DatasetIterator):
    """Has no state of its own, nor asks its parent for one, as Grain's `batch` would.

    Worker processes that are asked for a state before the first chunk start one after the other:
    minutes for many.
    """

    def __init__(self, chunks: grain.DatasetIterator, per_batch: int):
        super().__init__(chunks)
        self._chunks = chunks
        self._per_batch = per_batch

    def __next__(self) -> dict:
        return _join_chunks([next(self._chunks) for _ in range(self._per_batch)])

    def get_state(self) -> dict:
        return {}

    def set_state(self, state: dict) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._chunks.close()


def _keep_off_accelerators(worker_index: int, worker_count: int) -> None:
    del worker_index, worker_count
    jax.config.update("jax_platforms", "cpu")


def worker_options(data: ConfigDict, pictures: int | None = None) -> tuple[int, int]:
    """Returns the numbers of worker processes and of the threads of each.

    Args:
      data: the `data` part of the configuration.
      pictures: how many are made before the workers end; None: no end is in sight.

    Raises:
      UserError: they make no sense.
    """
    if data.workers < -1 or data.threads < 1:
        raise UserError(
            f"data.workers is {data.workers} and data.threads {data.threads}; "
            f"they are at least -1 (as many as there are cores) and 1."
        )
    workers = data.workers
    if workers == -1:
        cores = usable_cores()
        workers = min(cores, _MOST_WORKERS) if cores > _FEW_CORES else 0
        if pictures is not None:
            workers = min(workers, pictures // _WORTH_A_WORKER)
    return workers, data.threads


def usable_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share(batch_size: int, process_count: int, key: str) -> int:
    """Returns a process's share of a batch, or raises a UserError that names the key."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"{key} is {batch_size}; it must divide over {process_count} processes.")
    return batch_size // process_count


def _join_chunks(chunks: list[dict]) -> dict:
    """Concatenates chunks to a batch."""
    arrays = {
        key: np.concatenate([chunk[key] for chunk in chunks])
        for key in chunks[0]
        if key != "damages"
    }
    return arrays | {"damages": [damage for chunk in chunks for damage in chunk["damages"]]}
