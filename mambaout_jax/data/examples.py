"""Makers of training and evaluation batches: what the loader's threads and workers run."""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from mambaout_jax.data import order
from mambaout_jax.data.buffers import Arrays, Batch, Layout
from mambaout_jax.data.chunks import Damage, Damages
from mambaout_jax.data.decoding import BadImageError, UnreadableError
from mambaout_jax.data.records import Record, Source
from mambaout_jax.errors import StorageError, UserError


@dataclasses.dataclass(frozen=True)
class BadImages:
    """How many training images may fail to decode.

    Attributes:
      num_examples: images in the split.
      limit: how many of them may fail: `max_bad_fraction` of them, and always at least one.
    """

    num_examples: int
    limit: int

    @classmethod
    def of(cls, num_examples: int, max_bad_fraction: float) -> "BadImages":
        """Returns the limit for a split."""
        return cls(num_examples, max(1, int(max_bad_fraction * num_examples)))

    def check(self, damages: Iterable[Damage]) -> None:
        """Checks the images that failed so far.

        Raises:
          UserError: there are more than `limit`, or no image is left. It is a StorageError if some
            could not be read.
        """
        unread = {damage.name: damage.unread for damage in damages}
        kind = StorageError if any(unread.values()) else UserError
        verb = "read" if any(unread.values()) else "decoded"
        if len(unread) == self.num_examples:
            raise kind(f"none of the {len(unread)} training images could be {verb}")
        if len(unread) > self.limit:
            raise kind(
                f"{len(unread)} of {self.num_examples} training images could not be {verb}; the "
                f"limit is {self.limit}: repair {', '.join(sorted(unread)[:5])}, or raise "
                f"augment.max_bad_fraction"
            )


@dataclasses.dataclass(frozen=True)
class Share:
    """A process's share of each global batch.

    Attributes:
      global_batch: rows of the batch of all processes.
      first: the first row of this process.
      rows: rows of this process.
    """

    global_batch: int
    first: int
    rows: int

    def position(self, step: int, row: int) -> int:
        """Returns the position in the stream of a row of this process."""
        return step * self.global_batch + self.first + row


class TrainingExamples(Protocol):
    """Makes a task's training examples. It can be pickled, and threads may share it.

    Attributes:
      arrays: of an example.
      made_by: the libraries that it uses, in words.
    """

    arrays: Arrays
    made_by: str

    def __call__(self, record: Record, rng: np.random.Generator, out: Batch) -> None:
        """Decodes and augments an example.

        Args:
          record: of the source.
          rng: the source of every random number.
          out: where its arrays are written.

        Raises:
          BadImageError: a file is not an image, or a damaged one.
        """


class EvaluationExamples(Protocol):
    """Makes a task's evaluation examples. It can be pickled, and threads may share it.

    Attributes:
      arrays: of an example.
    """

    arrays: Arrays

    def __call__(self, record: Record, out: Batch) -> None:
        """Decodes an example of the source and writes its arrays.

        Raises:
          BadImageError: a file is not an image, or a damaged one.
        """


@dataclasses.dataclass(frozen=True)
class EvaluationGroup:
    """Evaluation examples of the same shapes.

    Attributes:
      indices: of its examples in the source.
      examples: makes them.
    """

    indices: Sequence[int]
    examples: EvaluationExamples


class Augmentation(Protocol):
    """A task's options for training examples."""

    @property
    def arrays(self) -> Arrays:
        """The arrays of an example."""

    def examples(self, source: Source, backend: str) -> TrainingExamples:
        """Returns what makes the examples of a source.

        Args:
          source: of the task's records.
          backend: see `backends.open_backend`.

        Raises:
          UserError: the backend cannot be used, or an option is wrong.
        """


class Preprocessing(Protocol):
    """A task's options for evaluation examples."""

    def groups(self, source: Source) -> list[EvaluationGroup]:
        """Returns the examples of a source, in groups of the same shapes.

        Every process must return the same groups.
        """


class TrainingMaker:
    """Makes a process's training batches. See `chunks.Maker`.

    An image that cannot be decoded is replaced by the dataset's next one.
    """

    def __init__(
        self,
        source: Source,
        order_: order.Order,
        make: TrainingExamples,
        bad_images: BadImages,
        share: Share,
    ):
        self._source = source
        self._order = order_
        self._generators = order.Generators(order_.seed)
        self._make = make
        self._bad_images = bad_images
        self._share = share
        self.layout = Layout(share.rows, (*make.arrays, ("replaced", (), "bool")))

    def name(self, step: int, row: int) -> str:
        """See `chunks.Maker`."""
        return self._source.name_of(self._order.index(self._share.position(step, row)))

    def __call__(
        self, step: int, start: int, out: Batch, permit: contextlib.AbstractContextManager
    ) -> Damages:
        """See `chunks.Maker`."""
        first = self._share.position(step, start)
        positions = range(first, first + len(out["replaced"]))
        indices = [self._order.index(position) for position in positions]
        records = [self._read(index) for index in indices]
        damages: Damages = []
        with permit:
            for row, position in enumerate(positions):
                example = {name: array[row, ...] for name, array in out.items()}
                damages += self._fill(position, indices[row], records[row], example)
        return damages

    def _read(self, index: int) -> Record | BadImageError:
        try:
            return self._source[index]
        except BadImageError as error:
            return error

    def _fill(
        self, position: int, index: int, record: Record | BadImageError, out: Batch
    ) -> Damages:
        """Makes one example from its record, or else from the first good one after it."""
        damages: Damages = []
        while True:
            name = self._source.name_of(index)
            try:
                if isinstance(record, BadImageError):
                    raise record
                name = record["name"]
                self._make(record, self._generators.at(position), out)
                out["replaced"][...] = bool(damages)
                return damages
            except BadImageError as error:
                damages.append(Damage(name, str(error), isinstance(error, UnreadableError)))
            self._bad_images.check(damages)
            index = (index + 1) % len(self._source)
            record = self._read(index)


class EvaluationMaker:
    """Makes a process's evaluation batches. See `chunks.Maker`.

    Rows after the last image are padding.
    """

    def __init__(self, source: Source, group: EvaluationGroup, share: Share):
        self._source = source
        self._indices = group.indices
        self._make = group.examples
        self._share = share
        self.layout = Layout(share.rows, (*self._make.arrays, ("mask", (), "bool")))

    def name(self, step: int, row: int) -> str:
        """See `chunks.Maker`."""
        return self._source.name_of(self._indices[self._share.position(step, row)])

    def __call__(
        self, step: int, start: int, out: Batch, permit: contextlib.AbstractContextManager
    ) -> Damages:
        """See `chunks.Maker`."""
        first = self._share.position(step, start)
        count = min(max(len(self._indices) - first, 0), len(out["mask"]))
        for array in out.values():
            array[count:] = 0
        out["mask"][:count] = True
        records = [self._source[self._indices[first + row]] for row in range(count)]
        with permit:
            for row, record in enumerate(records):
                self._make(record, {name: array[row, ...] for name, array in out.items()})
        return []
