"""Which picture stands where, and the making of it: what the threads and workers run."""

import dataclasses
import functools

import grain
import numpy as np

from mambaout_jax.data import augment, prefetch, preprocess, sources
from mambaout_jax.data.decoding import BadImageError
from mambaout_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Order:
    """Which picture stands where in the endless stream of training.

    An epoch is a fresh shuffle in which each picture stands `repeats` times in a row, cut down to
    whole batches.
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
        """Returns the number of the picture that stands at a position of the stream."""
        epoch, offset = divmod(position, self.steps_per_epoch * self.batch_size)
        return int(_shuffled(self.num_examples, self.seed, epoch)[offset // self.repeats])


@functools.lru_cache(maxsize=2)  # threads work on two epochs at most
def _shuffled(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(np.arange(num_examples, dtype=np.int32))


class MakeTrainingPicture:
    """Makes training pictures; one that cannot be decoded is replaced by the data set's next."""

    def __init__(
        self, source: sources.Source, order: Order, transform: augment.TrainTransform, max_bad: int
    ):
        self._source = source
        self._order = order
        self._transform = transform
        self._max_bad = max_bad

    def __call__(self, position: int, rng: np.random.Generator) -> dict:
        """Makes the picture that stands at a position of the stream, out of its generator."""
        index = self._order.index(position)
        start = rng.bit_generator.state
        damages: list[tuple[str, str]] = []
        while True:
            record = self._source[index]
            try:
                image = self._transform(record["image"], rng, record["name"])
            except BadImageError as error:
                damages.append((record["name"], str(error)))
                if len(damages) > self._max_bad:
                    raise UserError(too_many(damages, self._max_bad)) from error
                index = (index + 1) % len(self._source)
                rng.bit_generator.state = start  # however far the attempt came
            else:
                return {"image": image, "label": record["label"], "damages": damages}


class MakeTrainingChunk:
    """Makes chunks of this process's training batches."""

    def __init__(self, pictures: grain.MapDataset, global_batch: int, local_batch: int, first: int):
        self._pictures = pictures
        self._global_batch = global_batch
        self.local_batch = local_batch
        self._first = first  # this process's first place in a global batch
        self.per_batch = prefetch.per_batch(local_batch)

    def __call__(self, chunk: int) -> dict:
        """Makes the chunk of that number."""
        step, part = divmod(chunk, self.per_batch)
        start = step * self._global_batch + self._first + part * prefetch.CHUNK
        length = min(prefetch.CHUNK, self.local_batch - part * prefetch.CHUNK)
        rows = [self._pictures[start + row] for row in range(length)]
        return {
            "image": np.stack([row["image"] for row in rows]),
            "label": np.array([row["label"] for row in rows], np.int32),
            "replaced": np.array([bool(row["damages"]) for row in rows]),
            "damages": [damage for row in rows for damage in row["damages"]],
        }


class MakeEvaluationChunk:
    """Makes chunks of this process's evaluation batches; places after the last are padding."""

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
        label = np.zeros(length, np.int32)
        mask = np.arange(start, start + length) < len(self._source)
        for row in np.flatnonzero(mask):
            record = self._source[int(start + row)]
            image[row] = preprocess.preprocess_image(
                record["image"], self._preprocessing, record["name"]
            )
            label[row] = record["label"]
        return {"image": image, "label": label, "mask": mask, "damages": []}


def too_many(damages: list[tuple[str, str]], allowed: int) -> str:
    """Returns what to say when more than `allowed` pictures, of (name, message), are damaged."""
    names = ", ".join(sorted(name for name, _ in damages)[:5])
    return (
        f"More than {allowed} training pictures cannot be decoded ({names}); mend the data, or "
        f"raise augment.max_bad_fraction."
    )
