"""Predictions with heat maps, for the demo and the notebook: which classes, and seen where."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mambaout_jax.data.preprocess import normalize, preprocess_image
from mambaout_jax.errors import UserError
from mambaout_jax.inference.heatmap import class_activation_map, overlay
from mambaout_jax.inference.predictor import Predictor
from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.weights.info import WeightsInfo
from mambaout_jax.weights.load import read_weights

_SIDE = 320  # pixels, to which smaller images are enlarged by whole factors


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The prediction for an image.

    Attributes:
        classes: the most probable classes with their probabilities, the best first.
        image: what the network sees, uint8 [H, W, 3].
        heat: the image with the heat map of the best class over it, uint8 [H, W, 3].
    """

    classes: dict[str, float]
    image: np.ndarray
    heat: np.ndarray


class Explainer:
    """A trained network that classifies one image at a time.

    Attributes:
        info: the description of its weights.
        device: what it runs on, in words.
    """

    def __init__(self, weights: str | os.PathLike[str] | tuple[dict[str, Any], WeightsInfo]):
        """Reads the weights, and copies them to the devices.

        Args:
            weights: as in `mambaout_jax.read_weights`, or what it returned.

        Raises:
            UserError: there are no such weights, or they have no heat map, as a ViT's.
        """
        read = weights if isinstance(weights, tuple) else read_weights(weights)
        self._params, self.info = read
        self._model = self.info.create_model()
        if not isinstance(self._model, MambaOut):
            raise UserError(f"{self.info.model} has no feature maps: expected a MambaOut")
        self._predictor = Predictor(self._model, self._params, self.info, batch_size=1)
        devices = jax.local_devices()
        self.device = f"{len(devices)} x {devices[0].device_kind}"

    def __call__(self, image: str | os.PathLike[str] | bytes, name: str = "") -> Explanation:
        """Classifies a file, by its path or its content.

        Args:
            image: the file.
            name: how an error names it.

        Raises:
            UserError: it is not an image, or a damaged one.
        """
        preprocessing = self.info.preprocessing
        pixels = preprocess_image(image, preprocessing, name or None)
        values, indices = self._predictor.predict_images(pixels[None])
        inputs = normalize(jnp.asarray(pixels[None]), preprocessing.mean, preprocessing.std)
        best = jnp.asarray(indices[:, 0])
        heat = class_activation_map(self._params, inputs, best, model=self._model)
        labels = [self._predictor.labels[index] for index in indices[0]]
        times = max(1, _SIDE // min(pixels.shape[:2]))
        shown = pixels.repeat(times, axis=0).repeat(times, axis=1)
        classes = dict(zip(labels, values[0].tolist(), strict=True))
        return Explanation(classes, shown, overlay(shown, np.asarray(heat[0])))
