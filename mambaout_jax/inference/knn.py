"""Weighted k-nearest-neighbour classification of features, exact, on all devices.

Source: the kNN evaluation of Caron et al., "Emerging properties in self-supervised vision
transformers" (DINO).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mambaout_jax.errors import UserError
from mambaout_jax.inference.features import SPLIT, Features


def knn_accuracy(
    train: Features,
    evaluation: Features,
    num_classes: int,
    mesh: Mesh,
    *,
    k: int,
    temperature: float,
) -> float:
    """Returns the accuracy in percent of classifying images by their nearest neighbours.

    The neighbours are the `k` training images of the largest cosine similarity s. Each votes for
    its class with weight exp(s / temperature).

    Args:
        train: features of the training images.
        evaluation: features of the images to classify.
        num_classes: number of classes.
        mesh: of all devices.
        k: neighbours of an image.
        temperature: of the votes.

    Raises:
        UserError: there are fewer than `k` training images.
    """
    if train.count < k:
        raise UserError(
            f"there are {train.count} training images: expected at least the {k} neighbours of an "
            "image"
        )
    count = jax.jit(
        functools.partial(
            count_hits, num_classes=num_classes, mesh=mesh, k=k, temperature=temperature
        )
    )
    hits = [count(train, evaluation, np.int32(index)) for index in range(len(evaluation.labels))]
    return 100 * sum(map(int, hits)) / evaluation.count


def count_hits(
    train: Features,
    evaluation: Features,
    index: jax.Array,
    *,
    num_classes: int,
    mesh: Mesh,
    k: int,
    temperature: float,
) -> jax.Array:
    """Returns how many images of a batch, the `index`-th of `evaluation`, are classified right."""
    queries, labels = evaluation.values[index], evaluation.labels[index]
    nearest = jax.shard_map(
        functools.partial(nearest_neighbours, k=k, axes=mesh.axis_names),
        mesh=mesh,
        in_specs=(SPLIT, SPLIT, P()),
        out_specs=P(),
        check_vma=False,  # all devices gather the same neighbours
    )
    similarities, classes = nearest(train.values, train.labels, queries)
    weights = jnp.exp((similarities - 1) / temperature)  # the common factor changes no order
    rows = jnp.arange(len(queries))[:, None]
    votes = jnp.zeros((len(queries), num_classes)).at[rows, classes].add(weights)
    return ((votes.argmax(axis=1) == labels) & (labels >= 0)).sum()


def nearest_neighbours(
    values: jax.Array, labels: jax.Array, queries: jax.Array, *, k: int, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """Returns the cosine similarities and the classes of the nearest neighbours, [Q, k] each.

    Each device searches its own part batch by batch, and then the best of all parts.

    Args:
        values: this device's training features, [batches, n, C].
        labels: their classes, [batches, n]; -1: padding.
        queries: features to classify, [Q, C], the same on every device.
        k: neighbours of a query.
        axes: of the mesh.
    """
    queries = unit(queries)

    def best(similarities: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
        similarities, places = lax.top_k(similarities, k)
        return similarities, jnp.take_along_axis(classes, places, axis=1)

    def search(found: tuple[jax.Array, jax.Array], batch: tuple[jax.Array, jax.Array]):
        values, labels = batch
        similarities = jnp.matmul(queries, unit(values).T, precision=lax.Precision.HIGHEST)
        similarities = jnp.where(labels[None] >= 0, similarities, -jnp.inf)
        classes = jnp.broadcast_to(labels, similarities.shape)
        return best(
            jnp.concatenate((found[0], similarities), axis=1),
            jnp.concatenate((found[1], classes), axis=1),
        ), None

    none = (jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32))
    found, _ = lax.scan(search, none, (values, labels))
    return best(*lax.all_gather(found, axes, axis=1, tiled=True))


def unit(vectors: jax.Array) -> jax.Array:
    """Returns vectors [n, C] of length 1; zero vectors stay zero."""
    lengths = jnp.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / jnp.where(lengths > 0, lengths, 1)
