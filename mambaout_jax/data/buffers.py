"""Memory for batches, shared with worker processes and used again for later batches."""

import collections
import dataclasses
import math
import mmap
import os
import tempfile
import weakref
from multiprocessing import reduction

import numpy as np

from mambaout_jax.errors import UserError

Batch = dict[str, np.ndarray]
Arrays = tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape and dtype of each

_PAGE = mmap.PAGESIZE


@dataclasses.dataclass(frozen=True)
class Layout:
    """The arrays of a batch.

    Attributes:
      rows: length of each array's first axis.
      arrays: name, shape of a row, and dtype of each array.
    """

    rows: int
    arrays: Arrays

    def offsets(self) -> tuple[list[int], int]:
        """Returns where each array starts, and the size of all of them, in bytes."""
        starts, end = [], 0
        for _, shape, dtype in self.arrays:
            starts.append(end)
            size = self.rows * math.prod(shape) * np.dtype(dtype).itemsize
            end += -(-size // _PAGE) * _PAGE
        return starts, end


class SharedMemory:
    """Anonymous memory that a spawned process receives when it is started with this object.

    The standard library's shared memory is a file in /dev/shm, which containers limit to 64 MiB by
    default, and which stays behind when all processes are killed. This has neither problem.
    """

    def __init__(self, size: int):
        """Reserves memory.

        Raises:
          UserError: the limits of this process forbid so much.
        """
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("mambaout_jax")
        else:
            with tempfile.TemporaryFile() as file:
                self._file = os.dup(file.fileno())
        try:
            os.ftruncate(self._file, size)
            self.bytes = mmap.mmap(self._file, size)
        except OSError as error:
            raise UserError(
                f"cannot reserve {size:,} bytes of shared memory for batches ({error.strerror}): "
                "raise the limits of memory and of file sizes (ulimit -v, ulimit -f)"
            ) from None
        weakref.finalize(self, os.close, self._file).atexit = False

    def __getstate__(self) -> tuple:
        return reduction.DupFd(self._file), len(self.bytes)

    def __setstate__(self, state: tuple) -> None:
        file, size = state
        self._file = file.detach()
        self.bytes = mmap.mmap(self._file, size)


class BatchBuffers:
    """Room for several batches, each in a slot.

    A slot is free again when no array of its batch exists any more. New memory for each batch would
    have to be mapped and cleared by the kernel each time.
    """

    def __init__(self, layout: Layout, slots: int):
        self._layout = layout
        self._starts, self._size = layout.offsets()
        self._memory = SharedMemory(slots * self._size)
        self._free = collections.deque(range(slots))

    def __getstate__(self) -> tuple:
        return self._layout, self._memory

    def __setstate__(self, state: tuple) -> None:
        self._layout, self._memory = state
        self._starts, self._size = self._layout.offsets()

    def take(self) -> int | None:
        """Returns a free slot, None if there is none."""
        try:
            return self._free.pop()  # the last one that was used: its memory is in the caches
        except IndexError:
            return None

    def release(self, slot: int) -> None:
        """Makes a slot free. Called by the garbage collector too: it must take no lock."""
        self._free.append(slot)

    def arrays(self, slot: int) -> Batch:
        """Returns the arrays of a slot, for writing."""
        return self._arrays(self._slot_bytes(slot))

    def hand_out(self, slot: int) -> Batch:
        """Returns the arrays of a slot, which becomes free when the last of them is deleted.

        Where no other slot is free, returns a copy, and the slot is free at once: a caller that
        keeps all batches never waits for itself.
        """
        if not self._free:
            batch = {name: array.copy() for name, array in self.arrays(slot).items()}
            self.release(slot)
            return batch
        owner = self._slot_bytes(slot)  # each view of it, such as jax's, keeps it alive
        weakref.finalize(owner, self.release, slot).atexit = False
        return self._arrays(owner)

    def _slot_bytes(self, slot: int) -> np.ndarray:
        return np.frombuffer(self._memory.bytes, np.uint8, self._size, slot * self._size)

    def _arrays(self, owner: np.ndarray) -> Batch:
        batch = {}
        for (name, shape, dtype), start in zip(self._layout.arrays, self._starts, strict=True):
            count = self._layout.rows * math.prod(shape)
            array = owner[start : start + count * np.dtype(dtype).itemsize].view(dtype)
            batch[name] = array.reshape(self._layout.rows, *shape)
        return batch
