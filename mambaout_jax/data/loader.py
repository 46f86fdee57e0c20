"""Batches for training and for evaluation.

The training order is a function of (seed, epoch, index) alone: position k of the endless stream
is the same image with the same augmentation for any number of threads, worker processes and
hosts. The state of a training iterator is therefore one number, its step.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator

import numpy as np

from mambaout_jax.data import examples, parallel, sources
from mambaout_jax.data.buffers import Batch
from mambaout_jax.data.chunks import Damage, Damages
from mambaout_jax.data.order import Order
from mambaout_jax.data.prefetch import BatchesAhead
from mambaout_jax.data.synthetic import SyntheticBatches, SyntheticSource
from mambaout_jax.errors import UserError

_SEED_OF_EVALUATION = 1  # of synthetic images
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """Processes and threads that make images; the pixels do not depend on them.

    Attributes:
      workers: processes that decode and augment; 0: none, -1: chosen by the number of cores.
      threads: threads of each process.
      backend: of training images, see `backends.open_backend`.
    """

    workers: int
    threads: int
    backend: str


class TrainBatches(Iterator[Batch]):
    """Endless training batches of one process.

    Each is {"image": uint8 [b, H, W, 3], "label": int32 [b], "replaced": bool [b]}, where b is the
    process's share of `batch_size`: process p has the rows p*b to (p+1)*b of the global batch.
    "replaced" marks images that replace an undecodable one. For segmentation, "label" is uint8
    [b, H, W], see `segmentation.augment`.

    Attributes:
      steps_per_epoch: whole batches in the dataset, each image taken `repeats` times.
      num_examples: images in the split.
      num_classes: classes in the split.
      class_names: their names, in the order of the labels.
      made_by: the libraries, processes and threads that make the images, in words.
    """

    def __init__(
        self,
        dataset: sources.Dataset,
        augmentation: examples.Augmentation,
        *,
        batch_size: int,
        seed: int,
        repeats: int,
        max_bad_fraction: float,
        loader: LoaderOptions,
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
    ):
        """Opens the dataset; no image is read before the first batch is requested.

        Args:
          dataset: its `train_split` is read.
          augmentation: of each image, such as `augment.Augmentation`.
          batch_size: images in a global batch.
          seed: of order and augmentation.
          repeats: of each image in an epoch; 1: none.
          max_bad_fraction: fraction of the images that may fail to decode; one always may.
          loader: processes, threads and backend.
          process_index: this process's number.
          process_count: the number of processes that share each global batch.
          start_step: batches to skip at the beginning.

        Raises:
          UserError: the dataset cannot be opened, a batch is larger than an epoch or does not
            divide over the processes, or the loader's libraries or shared memory are missing.
        """
        source = sources.open_source(dataset, dataset.train_split)
        if source.label_shape:
            raise UserError(f"{source.name} has lists of right classes: it is for evaluation alone")
        self.num_examples = len(source)
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self._damages: dict[str, Damage] = {}
        self._times = (0.0, 0.0)  # seconds of reading and of making, since they were asked for
        self._limit = examples.BadImages.of(self.num_examples, max_bad_fraction)
        local_batch = parallel.share(batch_size, process_count, "batch_size")
        order = Order(self.num_examples, repeats, batch_size, seed)
        self.steps_per_epoch = order.steps_per_epoch
        if self.steps_per_epoch == 0:
            raise UserError(
                f"batch_size is {batch_size}, but {source.name} has only {self.num_examples} "
                f"images: expected at most one epoch"
            )
        self._fingerprint = {
            "data": source.name,
            "num_examples": self.num_examples,
            "seed": seed,
            "batch_size": batch_size,
            "repeats": repeats,
        }
        share = examples.Share(batch_size, process_index * local_batch, local_batch)
        self._step = start_step
        self._ahead: BatchesAhead | SyntheticBatches | None = None
        self._open_at: Callable[[int], BatchesAhead | SyntheticBatches]
        if isinstance(source, SyntheticSource):
            self.made_by = "random images in memory"
            arrays = augmentation.arrays
            self._open_at = functools.partial(SyntheticBatches, source, arrays, share, seed)
            return
        make = augmentation.examples(source, loader.backend)
        options = parallel.choose(loader.workers, loader.threads)
        self.made_by = f"{make.made_by} in {options}"
        maker = examples.TrainingMaker(source, order, make, self._limit, share)
        self._open_at = functools.partial(BatchesAhead, maker, options)

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
          UserError: too many images cannot be decoded, or one kills each worker that makes it.
          WorkerLostError: a worker process died; the next call starts new ones at the same batch.
        """
        self.start()
        assert self._ahead is not None
        try:
            batch, damages = next(self._ahead)
            self._note_damages(damages)
            self._note_times(self._ahead)
        except BaseException:
            self.close()
            raise
        self._step += 1
        return batch

    def start(self) -> None:
        """Starts making batches ahead, as the first request for a batch does."""
        if self._ahead is None:
            self._ahead = self._open_at(self._step)

    def reading_share(self) -> float:
        """Returns the fraction of the loader's time in which files were read, since the last call.

        It is close to 1 when the storage is slower than the run needs, and close to 0 when the
        processors are.
        """
        reading, making = self._times
        self._times = (0.0, 0.0)
        return reading / (reading + making) if reading else 0.0

    @property
    def bad_images(self) -> set[str]:
        """Names of the undecodable images that this process has found so far."""
        return set(self._damages)

    def state(self) -> dict:
        """Returns what `restore` needs to continue after the last returned batch; fit for JSON."""
        return {"step": self._step} | self._fingerprint

    def restore(self, state: dict) -> None:
        """Continues where a `state` was taken, whatever the number of workers or processes then.

        Raises:
          UserError: the state belongs to another order of images.
        """
        for key, value in self._fingerprint.items():
            if state.get(key) != value:
                raise UserError(
                    f"the checkpoint's data has {key} = {state.get(key)!r}, this run {value!r}: "
                    f"resume with the same data, or start in a new workdir"
                )
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        """Ends the workers; the next requested batch starts new ones."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _note_times(self, ahead: BatchesAhead | SyntheticBatches) -> None:
        if isinstance(ahead, BatchesAhead):
            reading, making = self._times
            self._times = (reading + ahead.reading, making + ahead.making)
            ahead.reading = ahead.making = 0.0

    def _note_damages(self, damages: Damages) -> None:
        for damage in damages:
            if damage.name not in self._damages:
                self._damages[damage.name] = damage
                logger.warning(
                    "%s. The next image replaces it (%d of at most %d).",
                    damage.message,
                    len(self._damages),
                    self._limit.limit,
                )
        self._limit.check(self._damages.values())


class EvalBatches:
    """The evaluation images, each exactly once over all processes; may be iterated again.

    Each batch is {"image": uint8 [b, H, W, 3], "label": int32 [b, *label_shape], "mask": bool [b]};
    False in the mask marks padding. Every process has the same number of batches of the same
    shapes. For segmentation there are other arrays and several shapes, see `segmentation.whole`.

    Attributes:
      name: of the dataset and split.
      num_examples: images in the split.
      num_classes: classes in the split.
      class_names: their names, in the order of the labels.
    """

    def __init__(
        self,
        dataset: sources.Dataset | sources.Source,
        preprocessing: examples.Preprocessing,
        *,
        batch_size: int,
        loader: LoaderOptions,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Opens the dataset.

        Args:
          dataset: its `eval_split` is read, or the source itself.
          preprocessing: of each image, such as `preprocess.Preprocessing`.
          batch_size: images in a global batch.
          loader: processes and threads.
          process_index: this process's number.
          process_count: the number of processes that share each global batch.

        Raises:
          UserError: the dataset cannot be opened, a batch does not divide over the processes, or
            shared memory is missing; while iterating, an image cannot be decoded.
        """
        if isinstance(dataset, sources.Dataset):
            source = sources.open_source(dataset, dataset.eval_split)
        else:
            source = dataset
        self.num_examples = len(source)
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self.name = source.name
        local_batch = parallel.share(batch_size, process_count, "eval.batch_size")
        share = examples.Share(batch_size, process_index * local_batch, local_batch)
        # For each group, what opens its batches, and how many there are.
        self._groups: list[tuple[Callable[[int, int], BatchesAhead | SyntheticBatches], int]] = []
        groups = preprocessing.groups(source)
        self._source, self._largest = source, max(groups, key=lambda group: len(group.indices))
        for group in groups:
            length = -(-len(group.indices) // batch_size)
            if isinstance(source, SyntheticSource):
                arrays = group.examples.arrays
                made = functools.partial(
                    SyntheticBatches, source, arrays, share, _SEED_OF_EVALUATION
                )
                self._groups.append((made, length))
                continue
            images = len(group.indices) // process_count
            options = parallel.choose(loader.workers, loader.threads, images)
            maker = examples.EvaluationMaker(source, group, share)
            self._groups.append((functools.partial(BatchesAhead, maker, options), length))

    def __len__(self) -> int:
        return sum(length for _, length in self._groups)

    def __iter__(self) -> Iterator[Batch]:
        for open_at, length in self._groups:
            with contextlib.closing(open_at(0, length)) as ahead:
                for batch, _ in ahead:
                    yield batch

    def some(self, count: int) -> Batch | None:
        """Returns a few examples for a person to see, the same in every process.

        They are evenly spaced among those of the most frequent shape, at most `count`, in one
        batch. Synthetic data has none.

        Raises:
          UserError: an image cannot be decoded.
        """
        if isinstance(self._source, SyntheticSource):
            return None
        indices = self._largest.indices[:: -(-len(self._largest.indices) // count)]
        group = examples.EvaluationGroup(indices, self._largest.examples)
        maker = examples.EvaluationMaker(
            self._source, group, examples.Share(len(indices), 0, len(indices))
        )
        arrays = maker.layout.arrays
        batch = {name: np.zeros((len(indices), *shape), dtype) for name, shape, dtype in arrays}
        maker(0, 0, batch, contextlib.nullcontext())
        return batch
