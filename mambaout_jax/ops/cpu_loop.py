"""A network on a CPU, a few images at a time.

The maps of a whole batch do not fit in a CPU's caches, and writing and reading them takes a quarter
of the time of a small network. Here a loop computes one image for each core at a time.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mambaout_jax.ops.lowering import Target, call_for_target
from mambaout_jax.ops.sharded import on_one_device


def few_images(network: Callable, params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
    """Returns network(params, images); for one CPU as a loop over a few images at a time.

    Derivatives are the network's own, computed for the whole batch. Reverse-mode differentiation
    only.

    Args:
        network: returns a tuple of arrays, the batch on axis 0, and computes each image apart from
            the others. Equal networks compare equal.
        params: arrays, in dicts.
        images: [N, ...].
    """
    loops = isinstance(images.shape[0], int) and images.shape[0] > 1 and on_one_device(images)
    return _few_images(network, params, images) if loops else network(params, images)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _few_images(network: Callable, params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
    leaves, tree = jax.tree.flatten(params)
    whole = _Whole(network, tree)
    results = call_for_target(_Choice(whole), whole, images, *leaves)
    return results if isinstance(results, tuple) else (results,)


def _forward(network: Callable, params: Any, images: jax.Array):
    return jax.vjp(network, params, images)


def _backward(network: Callable, pull: Callable, gradients: tuple[jax.Array, ...]):
    return pull(gradients)


_few_images.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Whole:
    """The network on all images at once."""

    network: Callable
    tree: Any

    def __call__(self, images: jax.Array, *leaves: jax.Array) -> tuple[jax.Array, ...]:
        return self.network(jax.tree.unflatten(self.tree, leaves), images)


@dataclasses.dataclass(frozen=True)
class _Looped:
    """The network in a loop, over as many images at a time as there are cores."""

    whole: _Whole

    def __call__(self, images: jax.Array, *leaves: jax.Array) -> tuple[jax.Array, ...]:
        batch = images.shape[0]
        count = images_at_a_time(batch, _cores())
        if count == batch:
            return self.whole(images, *leaves)
        parts = images.reshape(batch // count, count, *images.shape[1:])
        results = lax.map(lambda part: self.whole(part, *leaves), parts)
        return tuple(jnp.reshape(result, (batch, *result.shape[2:])) for result in results)


@dataclasses.dataclass(frozen=True)
class _Choice:
    whole: _Whole

    def __call__(self, target: Target) -> Callable:
        loops = target.platform == "cpu" and target.devices == 1 and not target.symbolic
        return _Looped(self.whole) if loops else self.whole


def images_at_a_time(batch: int, cores: int) -> int:
    """Returns the largest divisor of the batch that is at most `cores`.

    It is the whole batch where that would leave more than half of the cores without an image.
    """
    count = max(size for size in range(1, cores + 1) if batch % size == 0)
    return count if 2 * count >= cores else batch


def _cores() -> int:
    """Returns how many threads XLA computes with."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
