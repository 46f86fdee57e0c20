"""A linear probe: multinomial logistic regression on features, exact, on all devices."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mambaout_jax.inference.features import SPLIT, Features

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of the largest element of the gradient of the mean loss
MOST_STEPS = 1000


class Probe(struct.PyTreeNode):
    """A linear classifier of standardised features.

    Attributes:
        kernel: [C, classes].
        bias: [1, classes].
        mean: of the training features, [1, C].
        std: of the training features, [1, C]; 1 where they are constant.
    """

    kernel: jax.Array
    bias: jax.Array
    mean: jax.Array
    std: jax.Array

    def logits(self, values: jax.Array) -> jax.Array:
        """Returns the logits of features: [n, C] to [n, classes]."""
        inputs = (values - self.mean) / self.std
        return jnp.matmul(inputs, self.kernel, precision=lax.Precision.HIGHEST) + self.bias


def fit(train: Features, num_classes: int, mesh: Mesh, *, c: float) -> Probe:
    """Fits the probe by L-BFGS until the gradient vanishes.

    It is scikit-learn's `make_pipeline(StandardScaler(), LogisticRegression(C=c))`. The logits of
    one batch at a time are in memory.

    Args:
        train: features of the training images.
        num_classes: number of classes.
        mesh: of all devices.
        c: inverse strength of the L2 penalty on the kernel.
    """
    mean, std = jax.jit(moments)(train)
    width = train.values.shape[-1]
    probe = Probe(jnp.zeros((width, num_classes)), jnp.zeros((1, num_classes)), mean, std)
    optimizer = optax.lbfgs()

    def objective(weights: tuple[jax.Array, jax.Array], probe: Probe, train: Features) -> jax.Array:
        kernel, bias = weights
        probe = probe.replace(kernel=kernel, bias=bias)
        count = (train.labels >= 0).sum()
        return (total_loss(probe, train, mesh) + (kernel**2).sum() / (2 * c)) / count

    @jax.jit
    def step(weights: Any, state: Any, probe: Probe, train: Features) -> tuple[Any, Any, jax.Array]:
        loss = functools.partial(objective, probe=probe, train=train)
        value, gradient = optax.value_and_grad_from_state(loss)(weights, state=state)
        updates, state = optimizer.update(
            gradient, state, weights, value=value, grad=gradient, value_fn=loss
        )
        left = optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)  # at the new weights
        return optax.apply_updates(weights, updates), state, left

    weights = (probe.kernel, probe.bias)
    state = jax.jit(optimizer.init)(weights)
    for _ in range(MOST_STEPS):
        weights, state, left = step(weights, state, probe, train)
        if float(left) < TOLERANCE:
            break
    else:
        logger.warning(
            "the linear probe stopped after %d steps at a gradient of %.2g", MOST_STEPS, float(left)
        )
    return probe.replace(kernel=weights[0], bias=weights[1])


def probe_accuracy(probe: Probe, evaluation: Features) -> float:
    """Returns the accuracy of a probe in percent."""

    @jax.jit
    def count_hits(probe: Probe, evaluation: Features) -> jax.Array:
        def hits(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            values, labels = batch
            return ((probe.logits(values).argmax(axis=1) == labels) & (labels >= 0)).sum()

        return lax.map(hits, (evaluation.values, evaluation.labels)).sum()

    return 100 * int(count_hits(probe, evaluation)) / evaluation.count


def moments(train: Features) -> tuple[jax.Array, jax.Array]:
    """Returns mean and standard deviation of the features, [1, C]; 1 for a deviation of 0."""
    counted = (train.labels >= 0)[..., None]
    count = counted.sum()
    mean = jnp.where(counted, train.values, 0).sum(axis=(0, 1), keepdims=True) / count
    squares = jnp.where(counted, (train.values - mean) ** 2, 0)
    variance = squares.sum(axis=(0, 1), keepdims=True)[0] / count
    return mean[0], jnp.where(variance > 0, jnp.sqrt(variance), 1)


def total_loss(probe: Probe, features: Features, mesh: Mesh) -> jax.Array:
    """Returns the sum of the cross entropy over all images."""

    def loss_of_part(probe: Probe, features: Features) -> jax.Array:
        @jax.checkpoint  # the gradient computes the logits of a batch again
        def loss(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            values, labels = batch
            losses = optax.softmax_cross_entropy_with_integer_labels(
                probe.logits(values), jnp.maximum(labels, 0)
            )
            return jnp.where(labels >= 0, losses, 0).sum()

        losses = lax.map(loss, (features.values, features.labels))
        return lax.psum(losses.sum(), mesh.axis_names)

    return jax.shard_map(loss_of_part, mesh=mesh, in_specs=(P(), SPLIT), out_specs=P())(
        probe, features
    )
