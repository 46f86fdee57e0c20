"""Predicts masks of images with trained weights.

predictor = MaskPredictor.from_weights(*mambaout_jax.read_weights("runs/ade20k"))
for prediction in predictor.predict_files(["street.jpg"]):
    predictor.save(prediction, "masks")
"""

import collections
import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mambaout_jax.data import decoding
from mambaout_jax.data.preprocess import read_image_file
from mambaout_jax.data.segmentation import drawing
from mambaout_jax.data.segmentation.resizing import IMAGE_FILL, write_padded
from mambaout_jax.data.segmentation.whole import WholeImages
from mambaout_jax.errors import UserError
from mambaout_jax.inference.evaluate_masks import predict_step
from mambaout_jax.labels import class_names
from mambaout_jax.weights.info import WeightsInfo

_AHEAD = 2  # files that are decoded before they are needed
_MULTIPLE = 128  # of which padded sides are, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class MaskPrediction:
    """The prediction for one image.

    Attributes:
        name: of the image.
        image: its pixels, uint8 [H, W, 3]; None if it cannot be decoded.
        labels: the class of each pixel, uint8 [H, W]; None if it cannot be decoded.
        error: why it cannot be decoded, else "".
    """

    name: str
    image: np.ndarray | None
    labels: np.ndarray | None
    error: str = ""


class MaskPredictor:
    """A segmentation network with its weights, classes and preprocessing, on one device.

    Attributes:
        class_names: the classes in the order of their labels.
    """

    def __init__(
        self,
        model: Any,
        params: Mapping[str, Any],
        class_names: Sequence[str],
        options: WholeImages | None = None,
    ):
        """Copies the weights to the device.

        Args:
            model: the network: normalised images [N, H, W, 3] to logits [N, h, w, classes].
            params: its weights.
            class_names: the classes in the order of their labels.
            options: how images are resized; None: as for ADE20K. Only its first scale is used.
        """
        self.class_names = list(class_names)
        self._options = options = options or WholeImages()
        self._params = jax.device_put(params)
        step = functools.partial(predict_step, model=model, mean=options.mean, std=options.std)
        self._predict = jax.jit(step, static_argnames="shape")

    @classmethod
    def from_weights(
        cls, params: Mapping[str, Any], info: WeightsInfo, *, dtype: Any = jnp.float32
    ) -> "MaskPredictor":
        """Returns the predictor of weights, with their classes and preprocessing.

        Args:
            params: as `mambaout_jax.read_weights` returns them.
            info: their description.
            dtype: of the computation.

        Raises:
            UserError: they are not of a segmentation network.
        """
        info.check_task("segmentation", "use Predictor, or leave out --masks")
        size, pixels = info.preprocessing.shape[0], info.preprocessing
        whole = WholeImages(short_side=size, long_side=4 * size, mean=pixels.mean, std=pixels.std)
        names = class_names(info.class_names, info.num_classes)
        return cls(info.create_model(dtype=dtype), params, names, whole)

    def predict_image(self, image: Image.Image) -> np.ndarray:
        """Returns the predicted class of each pixel of an image of mode "RGB", uint8 [H, W]."""
        size = self._options.resized(image.size, self._options.scales[0])
        resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        padded = np.empty((1, *_padded(resized.shape[:2]), 3), np.uint8)
        write_padded(resized, padded[0], IMAGE_FILL)
        batch = {
            "image": padded,
            "input_size": np.array([resized.shape[:2]], np.int32),
            "label_size": np.array([[image.height, image.width]], np.int32),
        }
        shape = _padded((image.height, image.width))
        labels = self._predict(self._params, batch, shape=shape)
        return np.asarray(labels[0, : image.height, : image.width], np.uint8)

    def predict_files(self, paths: Iterable[str | os.PathLike[str]]) -> Iterator[MaskPrediction]:
        """Predicts the masks of files in order; the next file is decoded while one is computed.

        The prediction of an image that cannot be read or decoded has an `error`.
        """
        names = [os.fspath(path) for path in paths]
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            ahead = collections.deque(reader.submit(_open, name) for name in names[:_AHEAD])
            for number, name in enumerate(names):
                opened = ahead.popleft()
                ahead.extend(reader.submit(_open, later) for later in names[number + _AHEAD :][:1])
                try:
                    image = opened.result()
                except decoding.BadImageError as error:
                    yield MaskPrediction(name, None, None, str(error))
                else:
                    yield MaskPrediction(name, np.asarray(image), self.predict_image(image))

    def save(self, prediction: MaskPrediction, directory: str | os.PathLike[str]) -> list[Path]:
        """Writes NAME_mask.png, labels with a palette, and NAME_overlay.png, them over the image.

        Returns:
            The files.

        Raises:
            UserError: they cannot be written.
        """
        assert prediction.image is not None
        assert prediction.labels is not None
        count, stem = len(self.class_names), Path(prediction.name).stem
        over = drawing.overlay(prediction.image, prediction.labels, count)
        images = {
            Path(directory) / f"{stem}_mask.png": drawing.palette_image(prediction.labels, count),
            Path(directory) / f"{stem}_overlay.png": Image.fromarray(over),
        }
        for path, image in images.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}") from error
        return list(images)


def _open(path: str) -> Image.Image:
    return decoding.decode(read_image_file(path), path)


def _padded(shape: tuple[int, ...]) -> tuple[int, int]:
    height, width = (-(-side // _MULTIPLE) * _MULTIPLE for side in shape)
    return height, width
