"""Batches for training and for evaluation, on Grain.

The order of training is a function of (seed, epoch, index) alone: position k of the endless
stream of pictures is the same picture with the same augmentation whatever the number of threads,
worker processes and hosts. A training iterator's state is therefore one number, its step.
"""

import sys
from collections.abc import Iterator

import grain
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mambaout_jax.data import augment, examples, prefetch, preprocess, sources
from mambaout_jax.errors import UserError

Batch = dict[str, np.ndarray]


class TrainBatches(Iterator[Batch]):
    """Endless training batches of one process.

    Each is {"image": uint8 [b, H, W, 3], "label": int32 [b], "replaced": bool [b]}, b being the
    process's share of `config.batch_size`: process p has the rows p*b to (p+1)*b of the global
    batch. "replaced" marks pictures that stand in for an undecodable one.

    Attributes:
      steps_per_epoch: whole batches in the data set, each picture taken `augment.repeats` times.
      num_examples: pictures in the split.
      num_classes: classes in the split.
      class_names: their names, in the order of the labels.
      made_by: what makes the pictures, in words.
      bad_pictures: names of the undecodable pictures met so far by this process.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
    ):
        """Opens the data set; no picture is read before the first batch is asked for.

        Args:
          config: the whole configuration.
          process_index: this process's number.
          process_count: the number of processes that share each global batch.
          start_step: batches to leave out at the beginning.

        Raises:
          UserError: the data set or an option is not as it must be.
        """
        source = sources.open_source(config.data, config.data.train_split)
        self.num_examples = len(source)
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self.bad_pictures: set[str] = set()
        self._max_bad = int(config.augment.max_bad_fraction * self.num_examples)
        self._workers = prefetch.worker_options(config.data)
        local_batch = prefetch.share(config.batch_size, process_count, "batch_size")
        order = examples.Order(
            self.num_examples, config.augment.repeats, config.batch_size, config.seed
        )
        if config.augment.repeats < 1:
            raise UserError(f"augment.repeats is {config.augment.repeats}; it is 1 or more.")
        if not 0 <= config.seed < 2**32:
            raise UserError(f"seed is {config.seed}; it lies between 0 and 2**32 - 1.")
        self.steps_per_epoch = order.steps_per_epoch
        if self.steps_per_epoch == 0:
            raise UserError(
                f"batch_size is {config.batch_size}, but {source.name} has only "
                f"{self.num_examples} pictures; a batch must fit into an epoch."
            )
        self._fingerprint = {
            "data": source.name,
            "num_examples": self.num_examples,
            "seed": config.seed,
            "batch_size": config.batch_size,
            "repeats": config.augment.repeats,
        }
        transform = augment.TrainTransform(config)
        workers, threads = self._workers
        processes = f"{workers} worker processes of " if workers else ""
        self.made_by = f"{transform.backend_name} in {processes}{threads} threads"
        make_picture = examples.MakeTrainingPicture(source, order, transform, self._max_bad)
        self._make_chunk = examples.MakeTrainingChunk(
            grain.MapDataset.range(sys.maxsize).seed(config.seed).random_map(make_picture),
            config.batch_size,
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
        """Returns what `restore` needs to go on after the last batch handed out; fit for JSON."""
        return {"step": self._step} | self._fingerprint

    def restore(self, state: dict) -> None:
        """Goes to where a `state` was taken, whatever the number of workers or processes then.

        Raises:
          UserError: the state belongs to another order of pictures.
        """
        for key, value in self._fingerprint.items():
            if state.get(key) != value:
                raise UserError(
                    f"The checkpoint's data has {key} = {state.get(key)!r}, this run {value!r}; "
                    f"resume with the same, or start in a new workdir."
                )
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        """Ends the workers; the next batch asked for starts new ones."""
        if self._iterator is not None:
            self._iterator.close()  # type: ignore[attr-defined]
            self._iterator = None

    def _note_damages(self, damages: list[tuple[str, str]]) -> None:
        for name, message in damages:
            if name not in self.bad_pictures:
                self.bad_pictures.add(name)
                logging.warning(
                    "%s The next picture takes its place (%d of at most %d).",
                    message,
                    len(self.bad_pictures),
                    self._max_bad,
                )
        if len(self.bad_pictures) > self._max_bad:
            raise UserError(
                examples.too_many([(name, "") for name in self.bad_pictures], self._max_bad)
            )


class EvalBatches:
    """The held-out pictures, each exactly once over all processes; may be iterated again.

    Each batch is {"image": uint8 [b, H, W, 3], "label": int32 [b], "mask": bool [b]}; False in
    the mask marks padding. Every process has the same number of batches of the same shape.

    Attributes:
      name: what the data set and split are called.
      num_examples: pictures in the split.
      num_classes: classes in the split.
      class_names: their names, in the order of the labels.
    """

    def __init__(self, config: ConfigDict, *, process_index: int = 0, process_count: int = 1):
        """Opens the data set.

        Args:
          config: the whole configuration.
          process_index: this process's number.
          process_count: the number of processes that share each global batch.

        Raises:
          UserError: the data set or an option is not as it must be; while iterating, a picture
            cannot be decoded.
        """
        source = sources.open_source(config.data, config.data.eval_split)
        self.num_examples = len(source)
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self.name = source.name
        self._length = -(-self.num_examples // config.eval.batch_size)
        self._workers = prefetch.worker_options(config.data, self.num_examples // process_count)
        self._make_chunk = examples.MakeEvaluationChunk(
            source,
            preprocess.Preprocessing(
                size=config.data.image_size,
                crop_pct=config.eval.crop_pct,
                crop_mode=config.eval.crop_mode,
            ),
            prefetch.share(config.eval.batch_size, process_count, "eval.batch_size"),
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
