"""The part of the augmentation that runs inside the jitted step: mixing, normalising, erasing.

The order is the reference's: whole batches are mixed as uint8, then normalised, then erased;
`augment_batch` does all three. Every draw is a function of the key and of the place in the batch,
so that results do not depend on how many devices share it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mambaout_jax.data.preprocess import normalize

_ERASE_AREA = (0.02, 1 / 3)  # of the picture
_ERASE_ASPECT = (0.3, 1 / 0.3)  # height to width
_ERASE_TRIES = 10


def random_erasing(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Fills one box of some pictures with N(0, 1) noise, each pixel and channel its own.

    The box has 2% to a third of the area and an aspect log-uniform in (0.3, 1/0.3); ten are drawn,
    and the first that is smaller than the picture on both sides is taken. Source: Zhong et al.,
    "Random Erasing Data Augmentation", as timm's mode "pixel" does it.

    Args:
      key: where every draw comes from.
      images: [N, H, W, C], normalised.
      probability: that a picture is erased.

    Returns:
      [N, H, W, C], the dtype of `images`.
    """
    if probability == 0:
        return images
    keys = jax.random.split(key, images.shape[0])
    return jax.vmap(_erase, in_axes=(0, 0, None))(keys, images, probability)


def _erase(key: jax.Array, image: jax.Array, probability: float) -> jax.Array:
    """Erases one picture [H, W, C] with the given probability."""
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


def mixup_cutmix(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    smoothing: float,
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float,
    switch_prob: float,
    enabled: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each picture of a batch with its partner in the reversed batch.

    One draw serves the whole batch: whether it is mixed, by mixup or by CutMix, and how much.
    CutMix's weight is the area of its box after the picture's border has clipped it. uint8
    pictures are rounded to uint8 again. Source: timm's batch mode.

    Args:
      key: where every draw comes from.
      images: [N, H, W, C].
      labels: integers [N].
      num_classes: length of a target.
      smoothing: of the labels; spread evenly over all classes.
      mixup_alpha: of mixup's Beta(alpha, alpha); 0: no mixup.
      cutmix_alpha: of CutMix's Beta(alpha, alpha); 0: no CutMix.
      prob: that the batch is mixed at all.
      switch_prob: that it is CutMix where both are on.
      enabled: False leaves pictures as they are and smooths the labels alone.

    Returns:
      Pictures of the shape and dtype given, and targets float32 [N, num_classes].
    """
    targets = jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
    if prob == 0 or (mixup_alpha == 0 and cutmix_alpha == 0):
        return images, targets
    key_apply, key_switch, key_mixup, key_cutmix, key_box = jax.random.split(key, 5)
    apply = jax.random.uniform(key_apply) < prob
    use_cutmix = jax.random.uniform(key_switch) < switch_prob
    use_cutmix = (use_cutmix | (mixup_alpha == 0)) & (cutmix_alpha > 0)
    mixup_lam, cutmix_lam = jnp.float32(1), jnp.float32(1)
    if mixup_alpha > 0:
        mixup_lam = _symmetric_beta(key_mixup, mixup_alpha)
    if cutmix_alpha > 0:
        cutmix_lam = _symmetric_beta(key_cutmix, cutmix_alpha)
    inside, box_lam = _cutmix_box(key_box, cutmix_lam, images.shape[1], images.shape[2])
    apply &= jnp.asarray(enabled)
    lam = jnp.where(apply, jnp.where(use_cutmix, box_lam, mixup_lam), 1.0)

    partners = images[::-1]
    blend = images.astype(jnp.float32) * lam + partners.astype(jnp.float32) * (1 - lam)
    if jnp.issubdtype(images.dtype, jnp.integer):
        blend = jnp.round(blend)
    cut = jnp.where(inside[None, :, :, None], partners, images)
    mixed = jnp.where(use_cutmix, cut, blend.astype(images.dtype))
    return jnp.where(apply, mixed, images), targets * lam + targets[::-1] * (1 - lam)


def _symmetric_beta(key: jax.Array, alpha: float) -> jax.Array:
    """Draws from Beta(alpha, alpha); Beta(1, 1) is uniform, and compiles faster so."""
    if alpha == 1:
        return jax.random.uniform(key)
    return jax.random.beta(key, alpha, alpha)


def _cutmix_box(
    key: jax.Array, lam: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the mask [H, W] of CutMix's box and the weight that is left to the picture."""
    part = jnp.sqrt(1 - lam)
    sides = jnp.array([height, width])
    cut = (sides * part).astype(jnp.int32)
    middle = jax.random.randint(key, (2,), 0, sides)
    low = jnp.clip(middle - cut // 2, 0, sides)
    high = jnp.clip(middle + (cut + 1) // 2, 0, sides)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = (rows >= low[0]) & (rows < high[0]) & (columns >= low[1]) & (columns < high[1])
    area = jnp.prod((high - low).astype(jnp.float32))
    return inside, 1 - area / (height * width)


def augment_batch(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int,
    smoothing: float,
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float,
    switch_prob: float,
    erasing: float,
    enabled: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Mixes, normalises and erases a global batch, in the reference's order.

    Args:
      key: where every draw comes from; fold the step in beforehand.
      images: uint8 [N, H, W, 3].
      labels: integers [N].
      mean: as in `normalize`.
      std: as in `normalize`.
      num_classes: as in `mixup_cutmix`, with the five that follow.
      smoothing: see there.
      mixup_alpha: see there.
      cutmix_alpha: see there.
      prob: see there.
      switch_prob: see there.
      erasing: probability of random erasing.
      enabled: False switches the mixing off, and nothing else.

    Returns:
      float32 [N, H, W, 3] and targets float32 [N, num_classes].
    """
    key_mix, key_erase = jax.random.split(key)
    images, targets = mixup_cutmix(
        key_mix,
        images,
        labels,
        num_classes=num_classes,
        smoothing=smoothing,
        mixup_alpha=mixup_alpha,
        cutmix_alpha=cutmix_alpha,
        prob=prob,
        switch_prob=switch_prob,
        enabled=enabled,
    )
    return random_erasing(key_erase, normalize(images, mean, std), erasing), targets
