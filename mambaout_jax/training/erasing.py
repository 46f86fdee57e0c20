"""Random erasing: boxes of noise on normalised images, inside the jitted step."""

import jax
import jax.numpy as jnp

_ERASE_AREA = (0.02, 1 / 3)  # of the image
_ERASE_ASPECT = (0.3, 1 / 0.3)  # height to width
_ERASE_TRIES = 10


def random_erasing(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Fills one box of some images with N(0, 1) noise, each pixel and channel its own.

    The box has 2% to a third of the area and an aspect log-uniform in (0.3, 1/0.3); ten are drawn,
    and the first that is smaller than the image on both sides is taken. Source: Zhong et al.,
    "Random Erasing Data Augmentation", as timm's mode "pixel" does it.

    Args:
      key: source of every draw.
      images: [N, H, W, C], normalised.
      probability: that an image is erased.

    Returns:
      [N, H, W, C], the dtype of `images`.
    """
    if probability == 0:
        return images
    keys = jax.random.split(key, images.shape[0])
    return jax.vmap(_erase, in_axes=(0, 0, None))(keys, images, probability)


def _erase(key: jax.Array, image: jax.Array, probability: float) -> jax.Array:
    """Erases one image [H, W, C] with the given probability."""
    height, width, _ = image.shape
    key_apply, key_area, key_aspect, key_place, key_noise = jax.random.split(key, 5)
    low, high = _ERASE_AREA
    area = jax.random.uniform(key_area, (_ERASE_TRIES,), minval=low, maxval=high) * height * width
    log_low, log_high = jnp.log(jnp.asarray(_ERASE_ASPECT))
    log_aspect = jax.random.uniform(key_aspect, (_ERASE_TRIES,), minval=log_low, maxval=log_high)
    heights = jnp.round(jnp.sqrt(area * jnp.exp(log_aspect))).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area / jnp.exp(log_aspect))).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    box_h, box_w = heights[first], widths[first]
    free = jnp.stack([height - box_h, width - box_w])
    top, left = jax.random.randint(key_place, (2,), 0, jnp.maximum(free, 0) + 1)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = (rows >= top) & (rows < top + box_h) & (columns >= left) & (columns < left + box_w)
    apply = jnp.any(fits) & (jax.random.uniform(key_apply) < probability)
    noise = jax.random.normal(key_noise, image.shape, image.dtype)
    return jnp.where((apply & inside)[:, :, None], noise, image)
