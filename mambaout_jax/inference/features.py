"""Pooled features of a split, computed once and kept on the devices."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mambaout_jax.data.loader import EvalBatches
from mambaout_jax.data.preprocess import Preprocessing, normalize
from mambaout_jax.models.mambaout import MambaOut, on_device
from mambaout_jax.runtime.compilation import compiler_options
from mambaout_jax.runtime.sharding import BATCH, global_batch, over_mesh

SPLIT = P(None, *BATCH)  # features are split over the devices as the batches that they come from


class Features(struct.PyTreeNode):
    """Features of a split's images and their classes, over all devices.

    Attributes:
        values: float32 [batches, N, C].
        labels: int32 [batches, N]; -1: padding.
    """

    values: jax.Array
    labels: jax.Array

    @property
    def count(self) -> int:
        """The number of images."""
        return int((self.labels >= 0).sum())


def feature_step(
    features: Features,
    params: Any,
    batch: dict[str, jax.Array],
    index: jax.Array,
    *,
    model: MambaOut,
    preprocessing: Preprocessing,
) -> Features:
    """Returns the features with those of a batch, as `EvalBatches` gives it, at an index."""
    images = normalize(batch["image"], preprocessing.mean, preprocessing.std)
    pooled = model.apply({"params": params}, images, method="pooled")
    labels = jnp.where(batch["mask"], batch["label"], -1)
    return Features(features.values.at[index].set(pooled), features.labels.at[index].set(labels))


def extract(
    model: MambaOut,
    params: Mapping[str, Any],
    batches: EvalBatches,
    batch_size: int,
    preprocessing: Preprocessing,
    mesh: Mesh,
) -> Features:
    """Returns the pooled features of all images; see the model's method `pooled`.

    Each step writes its features into the same arrays. The images of at most two batches are on the
    devices: they compute one while the next is sent.

    Args:
        model: the network.
        params: its parameters, the same in every process.
        batches: this process's part of each batch.
        batch_size: images in a batch of all processes.
        preprocessing: of the network.
        mesh: of all devices.

    Raises:
        UserError: an image cannot be decoded.
    """
    device = mesh.devices.flat[0]
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, SPLIT)
    step = jax.jit(
        over_mesh(feature_step, mesh, model=on_device(model, device), preprocessing=preprocessing),
        in_shardings=(split, replicated, NamedSharding(mesh, BATCH), None),
        out_shardings=split,
        donate_argnums=0,
        compiler_options=compiler_options(device.platform, inference=True),
    )
    image = jax.ShapeDtypeStruct((1, *preprocessing.shape, 3), jnp.float32)
    apply = functools.partial(model.apply, method="pooled")
    width = jax.eval_shape(apply, {"params": params}, image).shape[-1]
    shape = (len(batches), batch_size)
    features = jax.jit(
        lambda: Features(jnp.zeros((*shape, width)), jnp.full(shape, -1, jnp.int32)),
        out_shardings=split,
    )()
    placed = jax.device_put(params, replicated)
    for index, batch in enumerate(batches):
        inputs = global_batch(batch, mesh)
        jax.block_until_ready(features)  # else batches would queue on the devices
        features = step(features, placed, inputs, np.int32(index))
    return features
