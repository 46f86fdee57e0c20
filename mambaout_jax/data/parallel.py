"""How many processes and threads make images, by the cores and the memory of this machine."""

import dataclasses
import logging
import math
import os
from pathlib import Path

from mambaout_jax.errors import UserError

_FEW_CORES = 4  # up to here the threads of one process keep all cores busy
_MOST_WORKERS = 64
_WORTH_A_WORKER = 1500  # images made in the seconds that a process takes to start
_WORKER_MIB = 300  # memory of a worker process
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How many processes and threads make images.

    Attributes:
      workers: worker processes; 0: none, the threads are the main process's.
      threads: threads of each process, which read files.
      cores: how many threads of a process may decode and augment at once.
    """

    workers: int
    threads: int
    cores: int

    def __str__(self) -> str:
        processes = f"{self.workers} worker processes of " if self.workers else ""
        return f"{processes}{self.threads} threads"

    @property
    def chunks_at_once(self) -> int:
        """How many chunks keep all threads busy, one more for each process."""
        return max(self.workers, 1) * (self.threads + 1)


def choose(workers: int, threads: int, images: int | None = None) -> Parallel:
    """Returns the number of processes and threads.

    Some cores are left to the main process, which drives the accelerators.

    Args:
      workers: the requested number; -1: chosen by the cores and the memory.
      threads: the requested number, per process.
      images: how many are made before the workers end; None: the stream is endless.
    """
    cores = usable_cores()
    free = max(cores - (1 if cores < 8 else 2), 1)
    fitting = free_memory() // (_WORKER_MIB << 20)
    if workers == -1:
        workers = min(free, _MOST_WORKERS, fitting) if cores > _FEW_CORES else 0
        if images is not None:
            workers = min(workers, images // _WORTH_A_WORKER)
    elif workers > fitting:
        logger.warning(
            "data.workers is %d, but the free memory is enough for %d of about %d MiB each",
            workers,
            fitting,
            _WORKER_MIB,
        )
    return Parallel(workers, threads, math.ceil(free / workers) if workers else cores)


def usable_cores() -> int:
    """Returns how many cores this process may use, in a container too."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(int(quota) // int(period), 1))
    except (OSError, ValueError):  # not Linux, or no limit ("max")
        return cores


def free_memory() -> int:
    """Returns the bytes of memory that processes may still take, in a container too."""
    free = _bytes_in("/proc/meminfo", "MemAvailable:", 1024)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # not Linux, or no limit ("max")
        return free
    cached = _bytes_in("/sys/fs/cgroup/memory.stat", "file", 1)  # given back when it is needed
    return min(free, limit - used + cached)


def _bytes_in(file: str, key: str, unit: int) -> int:
    """Returns a value of a file of lines "key value"; without it, more than any machine has."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:  # not Linux
        return 1 << 60
    values = [line.split()[1] for line in lines if line.split()[0] == key]
    return int(values[0]) * unit if values else 1 << 60


def share(batch_size: int, process_count: int, key: str) -> int:
    """Returns a process's share of a batch, or raises a UserError that names the key."""
    if batch_size % process_count:
        raise UserError(
            f"{key} is {batch_size}: expected a multiple of the {process_count} processes"
        )
    return batch_size // process_count
