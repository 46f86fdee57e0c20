"""Random images that are made once and stay in memory, to measure a run without its input."""

import io

import numpy as np
from PIL import Image

from mambaout_jax.data.buffers import Arrays, Batch
from mambaout_jax.data.chunks import Damages
from mambaout_jax.data.examples import Share
from mambaout_jax.data.records import Record, Source
from mambaout_jax.errors import UserError

_SIZES = {"train": 1_281_167, "validation": 50_000}  # those of ImageNet
_CLASSES = 1000
_SHIFTS = 64  # rows by which batches may differ


class SyntheticSource(Source):
    """Random images with random labels.

    The split "train" has as many images as ImageNet's, and so has "validation". Any other split is
    the number of images.
    """

    def __init__(self, split: str, num_classes: int | None):
        if split not in _SIZES and not (split.isdecimal() and int(split)):
            raise UserError(
                f"synthetic data has no split {split!r}: expected {', '.join(_SIZES)} or a number "
                f"of images"
            )
        self._length = _SIZES.get(split) or int(split)
        self.name = f"synthetic/{split}"
        self.class_names = [f"class {label}" for label in range(num_classes or _CLASSES)]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        rng = np.random.default_rng(index)
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
        label = int(rng.integers(self.num_classes))
        return {"image": file.getvalue(), "label": label, "name": self.name_of(index)}


class SyntheticBatches:
    """A process's batches of random pixels. Each batch is a part of the same memory: no copy."""

    def __init__(
        self,
        source: SyntheticSource,
        arrays: Arrays,
        share: Share,
        seed: int,
        first: int,
        stop: int | None = None,
    ):
        """Makes the images.

        Args:
          source: how many images and classes there are.
          arrays: of an example: "image", "label", and for segmentation others.
          share: of the process in each batch.
          seed: of the pixels and the labels.
          first: number of the first batch.
          stop: number after the last batch, for evaluation; None: endless, for training.
        """
        rng = np.random.default_rng((seed, share.first))
        rows = share.rows + _SHIFTS
        (_, image, _), (_, label, dtype), *others = arrays
        self._arrays = {
            "image": rng.integers(0, 256, (rows, *image), np.uint8),
            "label": rng.integers(source.num_classes, size=(rows, *label), dtype=np.dtype(dtype)),
        }
        shapes = {name: shape for name, shape, _ in arrays}
        for name, shape, _ in others:
            if name.startswith("image"):  # at another scale
                self._arrays[name] = rng.integers(0, 256, (rows, *shape), np.uint8)
            else:
                size = shapes[name.replace("input_size", "image").replace("label_size", "label")]
                self._arrays[name] = np.tile(np.array(size[:2], np.int32), (rows, 1))
        self._length = len(source)
        self._share = share
        self._next = first
        self._stop = stop

    def __iter__(self) -> "SyntheticBatches":
        return self

    def __next__(self) -> tuple[Batch, Damages]:
        if self._next == self._stop:
            raise StopIteration
        step = self._next
        self._next += 1
        rows = slice(step % _SHIFTS, step % _SHIFTS + self._share.rows)
        batch = {name: array[rows] for name, array in self._arrays.items()}
        if self._stop is None:
            return batch | {"replaced": np.zeros(self._share.rows, np.bool_)}, []
        position = self._share.position(step, 0)
        return batch | {"mask": position + np.arange(self._share.rows) < self._length}, []

    def close(self) -> None:
        """Does nothing: there are no workers."""
