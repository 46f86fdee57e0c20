"""Convolutions with a stride, as products of patches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mambaout_jax.models.layers import Conv3x3Stride2
from mambaout_jax.ops.patches import patch_product, strided_conv, xla_conv

PADDINGS = {(3, 2): ((1, 1), (1, 1)), (4, 4): ((0, 0), (0, 0)), (3, 1): ((2, 0), (0, 1))}


def draw(size, features=5):
    random = np.random.default_rng(0)
    images = random.standard_normal((2, 11, 14, 3), np.float32)
    return images, random.standard_normal((size, size, 3, features), np.float32)


@pytest.mark.parametrize(("size", "stride"), PADDINGS)
def test_patches_agree_with_float64(size, stride):
    options = {"stride": stride, "padding": PADDINGS[size, stride]}
    args = draw(size)
    y = patch_product(*map(jnp.asarray, args), **options)
    assert y.dtype == jnp.float32
    with jax.enable_x64(True):
        exact = xla_conv(*(jnp.asarray(array, jnp.float64) for array in args), **options)
    np.testing.assert_allclose(y, exact, atol=1e-5)


def test_gradients_are_those_of_the_convolution():
    args = draw(3)

    def loss(function, *args):
        return (function(*args) ** 2).sum()

    ours = functools.partial(strided_conv, stride=2, padding=PADDINGS[3, 2])
    reference = functools.partial(xla_conv, stride=2, padding=PADDINGS[3, 2])
    got = jax.grad(loss, (1, 2))(lambda x, kernel: ours(x, kernel), *args)
    expected = jax.grad(loss, (1, 2))(reference, *args)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), got, expected)


def test_the_layer_takes_the_paddings_that_jax_names():
    images = jnp.asarray(draw(3)[0])
    layer = Conv3x3Stride2(5, padding="SAME")
    y, variables = layer.init_with_output(jax.random.key(0), images)
    padding = jax.lax.padtype_to_pads(images.shape[1:3], (3, 3), (2, 2), "SAME")
    kernel = variables["params"]["kernel"]
    expected = xla_conv(images, kernel, stride=2, padding=tuple(padding))
    np.testing.assert_allclose(y, expected, atol=1e-5)


IMAGES, MAPS = (1, 224, 224, 3), (8, 56, 56, 96)


@pytest.mark.parametrize(
    ("platform", "shape", "dtype", "patches"),
    [
        ("cpu", IMAGES, "float32", True),
        ("cpu", (256, 224, 224, 3), "float32", True),
        ("cpu", IMAGES, "bfloat16", False),
        ("cpu", MAPS, "float32", False),
        ("tpu", IMAGES, "float32", False),
        ("cuda", MAPS, "bfloat16", True),
        ("cuda", (256, 56, 56, 96), "bfloat16", False),
    ],
)
def test_patches_are_multiplied_where_that_is_faster(platform, shape, dtype, patches):
    x, kernel = (jax.ShapeDtypeStruct(s, dtype) for s in (shape, (3, 3, shape[-1], 5)))
    call = jax.jit(lambda x, kernel: strided_conv(x, kernel, 2, PADDINGS[3, 2]))
    text = call.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in text) != patches
    assert ("stablehlo.dot_general" in text) == patches
