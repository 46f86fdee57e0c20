"""The type in which the weights' gradients are summed over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mambaout_jax
from configs import default
from mambaout_jax.build import build_model
from mambaout_jax.models.layers import Conv3x3Stride2, Dense, DepthwiseConv
from mambaout_jax.ops import dense
from mambaout_jax.runtime.sharding import BATCH, make_mesh

LAYERS = {
    "dense": lambda **types: Dense(1, **types),
    "convolution": lambda **types: Conv3x3Stride2(1, **types),
    "bias": lambda **types: DepthwiseConv(implementation="xla", **types),
}


def gradient_over_devices(layer, key, mesh):
    """The gradient of a layer's weight whose parts on 8 devices are 256, 1 and zeros."""
    assert mesh.size == 8
    dy = np.zeros((8, 2, 2, 1), np.float32)
    dy[0], dy[1] = 256 / 4, 1 / 4
    x = np.ones((8, 4, 4, 1) if isinstance(layer, Conv3x3Stride2) else dy.shape, np.float32)
    params = layer.init(jax.random.key(0), x)

    def loss(params, x, dy):
        return (layer.apply(params, x).astype(jnp.float32) * dy).sum()

    batch, whole = NamedSharding(mesh, BATCH), NamedSharding(mesh, P())
    gradient = jax.jit(
        jax.grad(loss), in_shardings=(whole, batch, batch), out_shardings=whole
    )  # as the training step is compiled
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return np.asarray(gradient(params, x, dy)["params"][key])


@pytest.mark.parametrize(
    ("layer", "key"),
    [("dense", "kernel"), ("dense", "bias"), ("convolution", "bias"), ("bias", "bias")],
)
def test_gradients_are_summed_over_devices_in_their_own_type(layer, key):
    mesh = make_mesh()
    for dtype, expected in ((jnp.float32, 257), (jnp.bfloat16, 256)):  # bfloat16 has no 257
        made = LAYERS[layer](dtype=jnp.bfloat16, gradient_dtype=dtype)
        np.testing.assert_array_equal(gradient_over_devices(made, key, mesh), expected)


def test_the_kernel_of_a_convolution_is_summed_in_float32_too():
    mesh = make_mesh()
    made = LAYERS["convolution"](dtype=jnp.bfloat16, gradient_dtype=jnp.float32)
    middle = gradient_over_devices(made, "kernel", mesh)[1:, 1:]
    np.testing.assert_array_equal(middle, 257)


@pytest.mark.parametrize(
    "name", [pytest.param("mambaout_femto", marks=pytest.mark.slow), "test_mambaout"]
)
def test_on_one_device_both_types_give_the_same_gradients(name):
    images = np.random.RandomState(0).randn(2, 32, 32, 3).astype(np.float32)

    def gradients(dtype):
        model = mambaout_jax.create_model(
            name, depths=(1, 1, 1, 1), num_classes=5, dtype=jnp.bfloat16, gradient_dtype=dtype
        )
        params = jax.jit(model.init)(jax.random.key(0), images)

        def loss(params):
            return (model.apply(params, images) * np.arange(5.0)[None]).sum()

        return jax.jit(jax.grad(loss))(params)

    one, other = gradients(jnp.float32), gradients(jnp.bfloat16)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert ours.dtype == jnp.float32
        scale = np.abs(theirs).max() + 1e-12
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=0.02)


def test_float32_is_differentiated_by_jax_itself():
    x, kernel, bias = jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.zeros(4)
    _, tangent = jax.jvp(lambda k: dense(x, k, bias, jnp.float32), (kernel,), (kernel,))
    np.testing.assert_allclose(tangent, 3)


def test_the_config_says_the_type():
    config = default.get_config()
    assert build_model(config).gradient_dtype == jnp.float32
    config.model.gradient_dtype = "bfloat16"
    assert build_model(config).gradient_dtype == jnp.bfloat16
