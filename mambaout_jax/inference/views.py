"""What a network sees of an image in evaluation: scales, mirror images and windows."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mambaout_jax.inference.linear_resize import product, resize_matrix

Batch = Mapping[str, jax.Array]


class View(NamedTuple):
    """An image as the network sees it, which may see it at several scales and mirrored."""

    image: jax.Array  # uint8 [N, H, W, 3], padded
    input_size: jax.Array  # int32 [N, 2], (height, width) without padding
    mirrored: jax.Array | bool


def views(batch: Batch, flip: bool = False) -> list[View]:
    """Returns each image at each scale of a batch, and with `flip` its mirror image too."""
    found = []
    for name in sorted(name for name in batch if name.startswith("image")):
        image, size = batch[name], batch[name.replace("image", "input_size")]
        found.append(View(image, size, False))
        if flip:
            columns, width = jnp.arange(image.shape[2])[None], size[:, 1:]
            columns = jnp.where(columns < width, width - 1 - columns, columns)
            mirrored = jnp.take_along_axis(image, columns[:, None, :, None], axis=2)
            found.append(View(mirrored, size, True))
    return found


def slide(
    apply: Callable[[jax.Array], jax.Array], images: jax.Array, window: int, stride: int
) -> jax.Array:
    """Returns logits as the mean over overlapping windows, as mmsegmentation's slide inference.

    Args:
        apply: turns normalised images [N, window, window, 3] into logits [N, h, w, C].
        images: normalised, [N, H, W, 3]. A side that is shorter than the window is one window.
        window: side of the square windows in pixels.
        stride: pixels from a window to the next; the last one ends where the image ends.

    Returns:
        float32 [N, H, W, C].
    """
    shape = images.shape[1:3]
    sides = tuple(min(window, side) for side in shape)
    starts = [
        [min(stride * number, side - length) for number in range(-(-(side - length) // stride) + 1)]
        for side, length in zip(shape, sides, strict=True)
    ]
    corners = jnp.array(list(itertools.product(*starts)))
    one_window = images[:, : sides[0], : sides[1]]
    classes = jax.eval_shape(apply, one_window).shape[-1]

    def add(sums: tuple[jax.Array, jax.Array], corner: jax.Array) -> tuple[Any, None]:
        total, count = sums
        top, left = corner
        part = jax.lax.dynamic_slice(images, (0, top, left, 0), one_window.shape)
        logits = apply(part)
        rows, columns = (
            resize_matrix(*pair) for pair in zip(sides, logits.shape[1:3], strict=True)
        )
        logits = product("yu,nuvc->nyvc", rows, logits)
        logits = product("xv,nyvc->nyxc", columns, logits)
        places = top + jnp.arange(sides[0]), left + jnp.arange(sides[1])
        total = total.at[:, places[0][:, None], places[1][None]].add(logits)
        return (total, count.at[places[0][:, None], places[1][None]].add(1)), None

    zeros = jnp.zeros((len(images), *shape, classes)), jnp.zeros(shape)
    total, count = jax.lax.scan(add, zeros, corners)[0]
    return total / count[None, :, :, None]
