"""The order of training images, and the random numbers of each position."""

import dataclasses
import functools
import threading
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of the images in the endless training stream.

    An epoch is a new shuffle in which each image appears `repeats` times in a row, cut to whole
    batches.
    """

    num_examples: int
    repeats: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.num_examples * self.repeats // self.batch_size

    def index(self, position: int) -> int:
        """Returns the index of the image at a position of the stream."""
        epoch, offset = divmod(position, self.steps_per_epoch * self.batch_size)
        return int(_shuffled(self.num_examples, self.seed, epoch)[offset // self.repeats])


@functools.lru_cache(maxsize=2)  # threads work on two epochs at most
def _shuffled(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(np.arange(num_examples, dtype=np.int32))


class Generators:
    """A random generator for each position of the stream.

    Philox is a counter-based generator: setting its counter to the position is enough, and much
    faster than seeding a new one. The key and the counter are those of Grain's `random_map`, which
    made these random numbers in earlier releases.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._of_thread = threading.local()

    def __reduce__(self) -> tuple:
        return type(self), (self._seed,)

    def at(self, position: int) -> np.random.Generator:
        """Returns the generator of a position, for use before the same thread's next call."""
        try:
            generator, state = self._of_thread.kept
        except AttributeError:
            generator, state = self._of_thread.kept = self._new()
        state["state"]["counter"][3] = position
        generator.bit_generator.state = state
        return generator

    def _new(self) -> tuple[np.random.Generator, Any]:
        key = np.random.SeedSequence([self._seed, 1]).generate_state(1)[0]
        generator = np.random.Generator(np.random.Philox(key))
        return generator, generator.bit_generator.state
