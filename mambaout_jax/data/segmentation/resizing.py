"""The size of a resized image, and padding, in training and in evaluation."""

import numpy as np

from mambaout_jax.data import image_ops


def resized_size(size: tuple[int, int], scale: tuple[int, int]) -> tuple[int, int]:
    """Returns the largest size of the same aspect ratio that fits a scale.

    Source: mmcv's `imrescale` with a tuple, as mmsegmentation resizes images.

    Args:
      size: (width, height) of the image.
      scale: pixels that the long side and the short side may have at most, in any order.

    Returns:
      (width, height), at least one pixel each.
    """
    factor = min(max(scale) / max(size), min(scale) / min(size))
    width, height = (max(int(side * factor + 0.5), 1) for side in size)
    return width, height


def write_padded(pixels: np.ndarray, out: np.ndarray, fill: int | tuple[int, ...]) -> None:
    """Writes an image [h, w, ...] to the top left of `out` [H, W, ...]; the rest is `fill`."""
    height, width = pixels.shape[:2]
    out[:height, :width] = pixels
    out[height:] = fill
    out[:height, width:] = fill


# What is nearest to 0 after normalisation: mmsegmentation pads normalised images with 0.
IMAGE_FILL = image_ops.FILL
