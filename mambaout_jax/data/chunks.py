"""Chunks of batches: what one thread makes at a time, and what makes them."""

import contextlib
import dataclasses
import threading
import time
from typing import NamedTuple, Protocol

from mambaout_jax.data.buffers import Batch, BatchBuffers, Layout


class Damage(NamedTuple):
    """An image that could not be decoded or read."""

    name: str
    message: str
    unread: bool  # it could not be read


Damages = list[Damage]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of a batch: the rows from `start` to `stop` of a step's batch, in a slot."""

    step: int
    start: int
    stop: int
    slot: int

    def rows(self) -> list["Chunk"]:
        """Returns its rows as chunks of one row."""
        return [
            dataclasses.replace(self, start=r, stop=r + 1) for r in range(self.start, self.stop)
        ]


class Maker(Protocol):
    """Makes a process's batches, chunk by chunk. It can be pickled, and threads may share it."""

    layout: Layout

    def __call__(
        self, step: int, start: int, out: Batch, permit: contextlib.AbstractContextManager
    ) -> Damages:
        """Fills the rows of a batch from `start` on.

        Args:
          step: number of the batch.
          start: number of the row in the batch that is the first row of `out`.
          out: the rows.
          permit: held while cores are needed, not while files are read.

        Returns:
          The images that could not be decoded.
        """

    def name(self, step: int, row: int) -> str:
        """Returns the name of the image in a row."""


class Filled(NamedTuple):
    """What is known of a chunk that was filled."""

    damages: Damages
    reading: float  # seconds in which files were read
    making: float  # seconds in which images were decoded and augmented


class _TimedPermit:
    """A permit that notes when it was asked for, given and returned."""

    def __init__(self, permits: threading.Semaphore):
        self._permits = permits
        self.asked = self.given = self.returned = time.monotonic()

    def __enter__(self) -> None:
        self.asked = time.monotonic()
        self._permits.acquire()
        self.given = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._permits.release()
        self.returned = time.monotonic()


class Filler:
    """Fills chunks with a maker, at most `cores` at once."""

    def __init__(self, maker: Maker, buffers: BatchBuffers, cores: int):
        self._maker = maker
        self._buffers = buffers
        self._permits = threading.Semaphore(cores)

    def __call__(self, chunk: Chunk) -> Filled:
        """Fills one chunk."""
        arrays = self._buffers.arrays(chunk.slot)
        out = {name: array[chunk.start : chunk.stop] for name, array in arrays.items()}
        start, permit = time.monotonic(), _TimedPermit(self._permits)
        damages = self._maker(chunk.step, chunk.start, out, permit)
        return Filled(damages, permit.asked - start, permit.returned - permit.given)
