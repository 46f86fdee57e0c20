"""Makers of training and evaluation batches: what the loader's threads and workers run."""

import contextlib
import dataclasses
from collections.abc import Iterable

from mambaout_jax.data import augment, order, preprocess
from mambaout_jax.data.buffers import Batch, Layout
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


class TrainingMaker:
    """Makes a process's training batches. See `chunks.Maker`.

    An image that cannot be decoded is replaced by the dataset's next one.
    """

    def __init__(
        self,
        source: Source,
        order_: order.Order,
        transform: augment.TrainTransform,
        bad_images: BadImages,
        share: Share,
    ):
        self._source = source
        self._order = order_
        self._generators = order.Generators(order_.seed)
        self._transform = transform
        self._bad_images = bad_images
        self._share = share
        image = ("image", transform.shape, "uint8")
        others = (("label", (), "int32"), ("replaced", (), "bool"))
        self.layout = Layout(share.rows, (image, *others))

    def name(self, step: int, row: int) -> str:
        """See `chunks.Maker`."""
        return self._source.name_of(self._order.index(self._share.position(step, row)))

    def __call__(
        self, step: int, start: int, out: Batch, permit: contextlib.AbstractContextManager
    ) -> Damages:
        """See `chunks.Maker`."""
        first = self._share.position(step, start)
        positions = range(first, first + len(out["label"]))
        indices = [self._order.index(position) for position in positions]
        records = [self._read(index) for index in indices]
        damages: Damages = []
        with permit:
            for row, position in enumerate(positions):
                damages += self._make(position, indices[row], records[row], out, row)
        return damages

    def _read(self, index: int) -> Record | BadImageError:
        try:
            return self._source[index]
        except BadImageError as error:
            return error

    def _make(
        self, position: int, index: int, record: Record | BadImageError, out: Batch, row: int
    ) -> Damages:
        """Makes one image from its record, or else from the first good one after it."""
        damages: Damages = []
        while True:
            name = self._source.name_of(index)
            try:
                if isinstance(record, BadImageError):
                    raise record
                name = record["name"]
                self._transform(
                    record["image"], self._generators.at(position), name, out["image"][row]
                )
                out["label"][row] = record["label"]
                out["replaced"][row] = bool(damages)
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

    def __init__(self, source: Source, preprocessing: preprocess.Preprocessing, share: Share):
        self._source = source
        self._preprocessing = preprocessing
        self._share = share
        image = ("image", (*preprocessing.shape, 3), "uint8")
        label = ("label", source.label_shape, "int32")
        self.layout = Layout(share.rows, (image, label, ("mask", (), "bool")))

    def name(self, step: int, row: int) -> str:
        """See `chunks.Maker`."""
        return self._source.name_of(self._share.position(step, row))

    def __call__(
        self, step: int, start: int, out: Batch, permit: contextlib.AbstractContextManager
    ) -> Damages:
        """See `chunks.Maker`."""
        first = self._share.position(step, start)
        count = min(max(len(self._source) - first, 0), len(out["label"]))
        for array in out.values():
            array[count:] = 0
        out["mask"][:count] = True
        records = [self._source[first + row] for row in range(count)]
        with permit:
            for row, record in enumerate(records):
                out["label"][row] = record["label"]
                if (out["label"][row] >= 0).any():
                    out["image"][row] = preprocess.preprocess_image(
                        record["image"], self._preprocessing, record["name"]
                    )
                else:  # the image has no right class and is not counted
                    out["image"][row] = 0
        return []
