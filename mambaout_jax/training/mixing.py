"""Mixup and CutMix, and the part of the augmentation that runs inside the jitted step.

The order is the reference's: groups of images are mixed as uint8, then normalised, then erased;
`augment_batch` does all three. Every draw is a function of the key and of the position in the
global batch, so that results do not depend on how many devices share it.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mambaout_jax.data.preprocess import normalize
from mambaout_jax.errors import UserError
from mambaout_jax.training.erasing import random_erasing

_CANDIDATES = 16  # of a gamma draw; fewer than one draw in 1e20 accepts none


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How a batch is mixed.

    Attributes:
      num_classes: length of a target.
      smoothing: of the labels; spread evenly over all classes.
      mixup_alpha: of mixup's Beta(alpha, alpha); 0: no mixup.
      cutmix_alpha: of CutMix's Beta(alpha, alpha); 0: no CutMix.
      prob: that a group is mixed at all.
      switch_prob: that it is CutMix where both are on.
      group: images that share one draw; it divides the batch. 0, or more than the batch has: the
        whole batch.
      repeats: copies of an image that stand in a row in the batch.
    """

    num_classes: int
    smoothing: float
    mixup_alpha: float
    cutmix_alpha: float
    prob: float
    switch_prob: float
    group: int
    repeats: int

    @property
    def on(self) -> bool:
        """Whether anything is mixed."""
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def groups(self, count: int) -> int:
        """Returns the number of groups in `count` images; 0: they are not divided."""
        return count // self.group if self.group else 0


class Draw(NamedTuple):
    """What mixup or CutMix does to a group, or, with a leading axis, to each of many images.

    `lam` is the image's weight and 1 - lam its partner's. The box, of CutMix, is the rows and
    columns from `low` up to but without `high`.
    """

    apply: jax.Array
    cutmix: jax.Array
    lam: jax.Array
    low: jax.Array
    high: jax.Array


def mixup_cutmix(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    mixing: Mixing,
    *,
    enabled: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each image of a batch with a partner of its group.

    A group is `mixing.group` consecutive images. Each draws whether it is mixed, by mixup or by
    CutMix, the weight and the box, from the key and its number in the batch alone. CutMix's weight
    is the area of its box after the image's border has clipped it. uint8 images are rounded to
    uint8 again. `partners` says who mixes with whom.

    The reference, timm's batch mode, makes one draw for each batch of a process's loader: groups
    of 128 in the paper's recipe.

    Args:
      key: source of every draw.
      images: [N, H, W, C].
      labels: integers [N].
      mixing: how.
      enabled: False leaves images as they are and smooths the labels alone.

    Returns:
      Images of the shape and dtype given, and targets float32 [N, num_classes].
    """
    count, height, width, _ = images.shape
    targets = jax.nn.one_hot(labels, mixing.num_classes) * (1 - mixing.smoothing)
    targets += mixing.smoothing / mixing.num_classes
    if not mixing.on:
        return images, targets
    keys, groups = key[None], mixing.groups(count)
    if groups:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(groups))
    draws = jax.vmap(functools.partial(draw_mixing, mixing=mixing, size=(height, width)))(keys)
    if not jax.sharding.get_abstract_mesh().empty:
        # Every device makes all draws: they are few, and sharded draws would have to be sent.
        draws = jax.lax.with_sharding_constraint(draws, PartitionSpec())
    draw = jax.tree.map(lambda leaf: jnp.repeat(leaf, count // len(keys), axis=0), draws)
    apply = draw.apply & jnp.asarray(enabled)
    lam = jnp.where(apply, draw.lam, 1.0)

    others, weight = partners(images, mixing), lam[:, None, None, None]
    blend = images.astype(jnp.float32) * weight + others.astype(jnp.float32) * (1 - weight)
    if jnp.issubdtype(images.dtype, jnp.integer):
        blend = jnp.round(blend)
    cut = jnp.where(_inside(draw.low, draw.high, height, width), others, images)
    mixed = jnp.where(draw.cutmix[:, None, None, None], cut, blend.astype(images.dtype))
    images = jnp.where(apply[:, None, None, None], mixed, images)
    return images, targets * lam[:, None] + partners(targets, mixing) * (1 - lam[:, None])


def partners(array: jax.Array, mixing: Mixing) -> jax.Array:
    """Returns each example's partner, in the example's place.

    In groups, neighbours are partners: the first and the second, the third and the fourth. With
    repeated augmentation, where neighbours are copies of one image, those are partners that stand
    the next power of two from `repeats` on apart. A batch is in random order, so that these pairs
    are distributed as those of the reference, which reverses a group. Unlike those, they lie on
    one device wherever a device's share holds whole pairs, even if it holds part of a group: no
    image is sent between devices.

    A batch that is not divided is reversed, and its images are sent.

    Args:
      array: [N, ...].
      mixing: `group` and `repeats` are used.

    Returns:
      The shape and dtype of `array`.
    """
    if not mixing.groups(len(array)):
        return array[::-1]
    apart = pair_block(mixing.repeats) // 2
    return array.reshape(-1, 2, apart, *array.shape[1:])[:, ::-1].reshape(array.shape)


def pair_block(repeats: int) -> int:
    """Returns how many consecutive images the pairs of a group are made within: 2 without repeats.

    A group is a multiple of it.
    """
    return 2 << (repeats - 1).bit_length()


def check_group(group: int, repeats: int, batch_size: int) -> None:
    """Checks that a batch divides into groups, and a group into pairs.

    A batch smaller than the group is one group, as it is in the reference.

    Raises:
      UserError: when it does not.
    """
    block = pair_block(repeats)
    if group < 0 or group % block:
        copies = f" with config.augment.repeats {repeats}" if repeats > 1 else ""
        raise UserError(
            f"config.augment.mixup_group is {group}: expected a multiple of {block}{copies}, or 0 "
            "for the whole batch"
        )
    if group and batch_size > group and batch_size % group:
        raise UserError(
            f"config.batch_size {batch_size} does not divide into groups of "
            f"config.augment.mixup_group {group}: choose a multiple of {group}, such as "
            f"{batch_size // group * group}, or --config.augment.mixup_group=0 for one group"
        )


def draw_mixing(key: jax.Array, *, mixing: Mixing, size: tuple[int, int]) -> Draw:
    """Draws what is done to one group of images of (height, width)."""
    key_apply, key_switch, key_mixup, key_cutmix, key_box = jax.random.split(key, 5)
    apply = jax.random.uniform(key_apply) < mixing.prob
    cutmix = jax.random.uniform(key_switch) < mixing.switch_prob
    cutmix = (cutmix | (mixing.mixup_alpha == 0)) & (mixing.cutmix_alpha > 0)
    mixup_lam, cutmix_lam = jnp.float32(1), jnp.float32(1)
    if mixing.mixup_alpha > 0:
        mixup_lam = _symmetric_beta(key_mixup, mixing.mixup_alpha)
    if mixing.cutmix_alpha > 0:
        cutmix_lam = _symmetric_beta(key_cutmix, mixing.cutmix_alpha)
    low, high = _cutmix_box(key_box, cutmix_lam, size)
    box_lam = 1 - jnp.prod((high - low).astype(jnp.float32)) / (size[0] * size[1])
    return Draw(apply, cutmix, jnp.where(cutmix, box_lam, mixup_lam), low, high)


def _symmetric_beta(key: jax.Array, alpha: float) -> jax.Array:
    """Draws from Beta(alpha, alpha), as x / (x + y) of two draws from Gamma(alpha).

    Gamma(alpha) is Gamma(alpha + 1) times a uniform number to the power of 1 / alpha, and
    Gamma(alpha + 1) is drawn by the rejection sampling of Marsaglia and Tsang, "A simple method for
    generating gamma variables" (2000). It accepts more than 95% of the candidates, and the first
    accepted one of 16 is taken. jax.random.beta draws candidates in a loop. On a GPU the host
    waits for each iteration of a loop, so it could not dispatch steps ahead.
    """
    if alpha == 1:
        return jax.random.uniform(key)
    key_normal, key_accept, key_power = jax.random.split(key, 3)
    positive = jnp.finfo(jnp.float32).tiny
    d = alpha + 2 / 3
    x = jax.random.normal(key_normal, (2, _CANDIDATES))
    v = (1 + x / math.sqrt(9 * d)) ** 3
    log_v = jnp.log(jnp.maximum(v, positive))
    log_u = jnp.log(jax.random.uniform(key_accept, x.shape, minval=positive))
    accepted = (v > 0) & (log_u < x**2 / 2 + d * (1 - v + log_v))
    first = jnp.argmax(accepted, axis=1, keepdims=True)
    log_power = jnp.log(jax.random.uniform(key_power, (2,), minval=positive)) / alpha
    log_gamma = jnp.take_along_axis(log_v, first, axis=1)[:, 0] + log_power  # without log(d)
    return jax.nn.sigmoid(log_gamma[0] - log_gamma[1])


def _cutmix_box(
    key: jax.Array, lam: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Returns the corners (row, column) of a box of 1 - lam of the area, clipped by the border."""
    sides = jnp.array(size)
    cut = (sides * jnp.sqrt(1 - lam)).astype(jnp.int32)
    middle = jax.random.randint(key, (2,), 0, sides)
    return jnp.clip(middle - cut // 2, 0, sides), jnp.clip(middle + (cut + 1) // 2, 0, sides)


def _inside(low: jax.Array, high: jax.Array, height: int, width: int) -> jax.Array:
    """Returns the masks [N, H, W, 1] of boxes with the corners [N, 2]."""
    rows, columns = jnp.arange(height)[None], jnp.arange(width)[None]
    in_rows = (rows >= low[:, :1]) & (rows < high[:, :1])
    in_columns = (columns >= low[:, 1:]) & (columns < high[:, 1:])
    return (in_rows[:, :, None] & in_columns[:, None, :])[..., None]


def augment_batch(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    mixing: Mixing,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    erasing: float,
    enabled: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Mixes, normalises and erases a global batch, in the reference's order.

    Args:
      key: source of every draw; fold the step in beforehand.
      images: uint8 [N, H, W, 3].
      labels: integers [N].
      mixing: as in `mixup_cutmix`.
      mean: as in `normalize`.
      std: as in `normalize`.
      erasing: probability of random erasing.
      enabled: False switches the mixing off, and nothing else.

    Returns:
      float32 [N, H, W, 3] and targets float32 [N, num_classes].
    """
    key_mix, key_erase = jax.random.split(key)
    images, targets = mixup_cutmix(key_mix, images, labels, mixing, enabled=enabled)
    return random_erasing(key_erase, normalize(images, mean, std), erasing), targets
