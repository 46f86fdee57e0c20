"""The stem's first convolution, norm and activation in one operation, and the stem that uses it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_gated_conv import assert_close, loss_and_gradients

from mambaout_jax.models.mambaout import Stem


def stem_and_data(**options):
    stem = Stem(16, **options)
    random = np.random.default_rng(0)
    images, target = (
        jnp.asarray(random.standard_normal(shape), jnp.float32)
        for shape in ((8, 11, 14, 3), (8, 3, 4, 16))
    )
    params = stem.init(jax.random.key(0), images)["params"]
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * random.standard_normal(leaf.shape), jnp.float32), params
    )
    return stem, params, images, target


def gradients(stem, *args):
    return loss_and_gradients(stem.apply, *args)


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_a_stem_is_the_same_with_it(act):
    stem, params, images, target = stem_and_data(act=act)
    fused = stem.clone(fused_gpu=True)
    found = jax.tree.map(jnp.shape, fused.init(jax.random.key(0), images)["params"])
    assert found == jax.tree.map(jnp.shape, params)
    expected = gradients(stem, params, images, target)
    assert_close(gradients(fused, params, images, target), expected, 1e-6)
    # Each rounds in other places.
    rounded = gradients(fused.clone(dtype=jnp.bfloat16), params, images, target)
    assert_close(rounded, expected, 3e-2)


def test_a_stem_without_its_first_norm_does_without():
    stem, params, images, target = stem_and_data(first_norm=False)
    expected = gradients(stem, params, images, target)
    assert_close(gradients(stem.clone(fused_gpu=True), params, images, target), expected, 0)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_on_a_mesh(kind):
    stem, params, images, target = stem_and_data(fused_gpu=True)
    expected = gradients(stem, params, images, target)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
    images, target = jax.device_put((images, target), NamedSharding(mesh, PartitionSpec("batch")))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    assert_close(gradients(stem, params, images, target), expected, 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_summed_over_devices_in_the_type_that_is_asked_for(dtype):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    stem, params, images, target = stem_and_data(
        fused_gpu=True, dtype=jnp.bfloat16, gradient_dtype=jnp.dtype(dtype)
    )

    def loss(params, images):
        return ((stem.apply({"params": params}, images) - target) ** 2).sum()

    images = jax.device_put(images, NamedSharding(mesh, PartitionSpec("batch")))
    text = jax.jit(jax.grad(loss)).trace(params, images).lower().as_text()
    sums = [line for line in text.splitlines() if "}) : (tensor<3x3x3x8x" in line]
    assert sums
    assert all(f"tensor<3x3x3x8x{'f32' if dtype == 'float32' else 'bf16'}>" in s for s in sums)
