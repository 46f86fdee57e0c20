"""Batches for training and for evaluation, on Grain.

The training order is a function of (seed, epoch, index) alone: position k of the endless stream
is the same image with the same augmentation for any number of threads, worker processes and
hosts. The state of a training iterator is therefore one number, its step.
"""

import dataclasses
import logging
import sys
from collections.abc import Iterator

import grain
import numpy as np

from mambaout_jax.data import augment, examples, prefetch, preprocess, sources
from mambaout_jax.errors import UserError

Batch = dict[str, np.ndarray]
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """How fast images are made; the pixels do not depend on it.

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
    "replaced" marks images that replace an undecodable one.

    Attributes:
      steps_per_epoch: whole batches in the dataset, each image taken `repeats` times.
      num_examples: images in the split.
      num_classes: classes in the split.
      class_names: their names, in the order of the labels.
      made_by: the libraries, processes and threads that make the images, in words.
      bad_images: names of the undecodable images that this process has found so far.
    """

    def __init__(
        self,
        dataset: sources.Dataset,
        augmentation: augment.Augmentation,
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
          augmentation: of each image.
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
        self.num_examples = len(source)
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self.bad_images: set[str] = set()
        self._limit = examples.BadImages.of(self.num_examples, max_bad_fraction)
        size = (augmentation.image_size, augmentation.image_size)
        self._workers = prefetch.worker_options(loader.workers, loader.threads, size)
        local_batch = prefetch.share(batch_size, process_count, "batch_size")
        order = examples.Order(self.num_examples, repeats, batch_size, seed)
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
        transform = augment.TrainTransform(augmentation, loader.backend)
        workers, threads = self._workers
        processes = f"{workers} worker processes of " if workers else ""
        self.made_by = f"{transform.made_by} in {processes}{threads} threads"
        make_image = examples.MakeTrainingImage(source, order, transform, self._limit)
        self._make_chunk = examples.MakeTrainingChunk(
            grain.MapDataset.range(sys.maxsize).seed(seed).random_map(make_image),
            batch_size,
            local_batch,
            process_index * local_batch,
        )
        self._step = start_step
        self._iterator: Iterator[dict] | None = None

    def __next__(self) -> Batch:
        if self._iterator is None:
            first = self._step * self._make_chunk.per_batch
            parts = grain.MapDataset.range(first, sys.maxsize).map(self._make_chunk)
            self._iterator = iter(
                prefetch.join_ahead(parts, self._make_chunk.local_batch, self._workers)
            )
        batch = next(self._iterator)
        self._note_damages(batch.pop("damages"))
        self._step += 1
        return batch

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
        if self._iterator is not None:
            self._iterator.close()  # type: ignore[attr-defined]
            self._iterator = None

    def _note_damages(self, damages: list[tuple[str, str]]) -> None:
        for name, message in damages:
            if name not in self.bad_images:
                self.bad_images.add(name)
                logger.warning(
                    "%s. The next image replaces it (%d of at most %d).",
                    message,
                    len(self.bad_images),
                    self._limit.limit,
                )
        self._limit.check(self.bad_images)


class EvalBatches:
    """The evaluation images, each exactly once over all processes; may be iterated again.

    Each batch is {"image": uint8 [b, H, W, 3], "label": int32 [b, *label_shape], "mask": bool [b]};
    False in the mask marks padding. Every process has the same number of batches of the same shape.

    Attributes:
      name: of the dataset and split.
      num_examples: images in the split.
      num_classes: classes in the split.
      class_names: their names, in the order of the labels.
    """

    def __init__(
        self,
        dataset: sources.Dataset | sources.Source,
        preprocessing: preprocess.Preprocessing,
        *,
        batch_size: int,
        loader: LoaderOptions,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Opens the dataset.

        Args:
          dataset: its `eval_split` is read, or the source itself.
          preprocessing: of each image.
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
        self._length = -(-self.num_examples // batch_size)
        self._workers = prefetch.worker_options(
            loader.workers,
            loader.threads,
            preprocessing.shape,
            images=self.num_examples // process_count,
        )
        self._make_chunk = examples.MakeEvaluationChunk(
            source,
            preprocessing,
            prefetch.share(batch_size, process_count, "eval.batch_size"),
            process_index,
            process_count,
        )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        length = self._length * self._make_chunk.per_batch
        parts = grain.MapDataset.range(length).map(self._make_chunk)
        iterator = iter(prefetch.join_ahead(parts, self._make_chunk.local_batch, self._workers))
        try:
            for batch in iterator:
                del batch["damages"]
                yield batch
        finally:
            iterator.close()
