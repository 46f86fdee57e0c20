"""Epoch order and per-example augmentation: what the loader's threads and workers run."""

import dataclasses
import functools

import grain
import numpy as np

from mambaout_jax.data import augment, prefetch, preprocess, sources
from mambaout_jax.data.decoding import BadImageError
from mambaout_jax.errors import UserError


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

    def check(self, names: set[str]) -> None:
        """Checks the images that failed so far.

        Raises:
          UserError: there are more than `limit`, or no image is left.
        """
        if len(names) == self.num_examples:
            raise UserError(f"none of the {len(names)} training images could be decoded")
        if len(names) > self.limit:
            raise UserError(
                f"{len(names)} of {self.num_examples} training images could not be decoded; the "
                f"limit is {self.limit}: repair {', '.join(sorted(names)[:5])}, or raise "
                f"augment.max_bad_fraction"
            )


class MakeTrainingImage:
    """Makes training images; one that cannot be decoded is replaced by the dataset's next one."""

    def __init__(
        self,
        source: sources.Source,
        order: Order,
        transform: augment.TrainTransform,
        bad_images: BadImages,
    ):
        self._source = source
        self._order = order
        self._transform = transform
        self._bad_images = bad_images

    def __call__(self, position: int, rng: np.random.Generator) -> dict:
        """Makes the image at a position of the stream, with its own random generator."""
        index = self._order.index(position)
        start = rng.bit_generator.state
        damages: list[tuple[str, str]] = []
        while True:
            record = self._source[index]
            try:
                image = self._transform(record["image"], rng, record["name"])
            except BadImageError as error:
                damages.append((record["name"], str(error)))
                self._bad_images.check({name for name, _ in damages})
                index = (index + 1) % len(self._source)
                rng.bit_generator.state = start  # as if the bad image had drawn nothing
            else:
                return {"image": image, "label": record["label"], "damages": damages}


class MakeTrainingChunk:
    """Makes chunks of this process's training batches."""

    def __init__(self, images: grain.MapDataset, global_batch: int, local_batch: int, first: int):
        self._images = images
        self._global_batch = global_batch
        self.local_batch = local_batch
        self._first = first  # this process's first row in a global batch
        self.per_batch = prefetch.per_batch(local_batch)

    def __call__(self, chunk: int) -> dict:
        """Makes the chunk of that number."""
        step, part = divmod(chunk, self.per_batch)
        start = step * self._global_batch + self._first + part * prefetch.CHUNK
        length = min(prefetch.CHUNK, self.local_batch - part * prefetch.CHUNK)
        rows = [self._images[start + row] for row in range(length)]
        return {
            "image": np.stack([row["image"] for row in rows]),
            "label": np.array([row["label"] for row in rows], np.int32),
            "replaced": np.array([bool(row["damages"]) for row in rows]),
            "damages": [damage for row in rows for damage in row["damages"]],
        }


class MakeEvaluationChunk:
    """Makes chunks of this process's evaluation batches; rows after the last image are padding."""

    def __init__(
        self,
        source: sources.Source,
        preprocessing: preprocess.Preprocessing,
        local_batch: int,
        process_index: int,
        process_count: int,
    ):
        self._source = source
        self._preprocessing = preprocessing
        self.local_batch = local_batch
        self._process_index = process_index
        self._process_count = process_count
        self.per_batch = prefetch.per_batch(local_batch)

    def __call__(self, chunk: int) -> dict:
        """Makes the chunk of that number."""
        step, part = divmod(chunk, self.per_batch)
        start = (step * self._process_count + self._process_index) * self.local_batch
        start += part * prefetch.CHUNK
        length = min(prefetch.CHUNK, self.local_batch - part * prefetch.CHUNK)
        image = np.zeros((length, *self._preprocessing.shape, 3), np.uint8)
        label = np.zeros((length, *self._source.label_shape), np.int32)
        mask = np.arange(start, start + length) < len(self._source)
        for row in np.flatnonzero(mask):
            record = self._source[int(start + row)]
            label[row] = record["label"]
            if (label[row] >= 0).any():  # else the image has no right class and is not counted
                image[row] = preprocess.preprocess_image(
                    record["image"], self._preprocessing, record["name"]
                )
        return {"image": image, "label": label, "mask": mask, "damages": []}
