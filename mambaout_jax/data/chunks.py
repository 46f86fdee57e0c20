"""Chunks of a batch, made ahead of time in threads or worker processes, and joined to batches."""

import grain
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from mambaout_jax.errors import UserError

CHUNK = 16  # pictures that a thread makes at a time, and that travel between processes at once
_BATCHES_AHEAD = 2


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
    dataset = dataset.batch(per_batch, batch_fn=_join_chunks)
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1)


def _keep_off_accelerators(worker_index: int, worker_count: int) -> None:
    del worker_index, worker_count
    jax.config.update("jax_platforms", "cpu")


def worker_options(data: ConfigDict) -> tuple[int, int]:
    """Returns the numbers of worker processes and of threads, once they make sense."""
    if data.workers < 0 or data.threads < 1:
        raise UserError(
            f"data.workers is {data.workers} and data.threads {data.threads}; "
            f"they are at least 0 and 1."
        )
    return data.workers, data.threads


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
