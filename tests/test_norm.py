"""LayerNorm and its gradients against float64 formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mambaout_jax.ops import layer_norm, norm_xla
from mambaout_jax.ops.sharded import on_parts

EPSILON = 1e-6


def draw(shape, dtype=jnp.float32):
    random = np.random.default_rng(0)
    x, dy, shortcut = (jnp.asarray(a, dtype) for a in random.standard_normal((3, *shape)) * 2 + 1)
    scale, bias = (jnp.asarray(a, jnp.float32) for a in random.standard_normal((2, shape[-1])))
    return x, scale, bias, dy, shortcut


def reference(x, scale, dy):
    x, scale, dy = (np.asarray(a, np.float64) for a in (x, scale, dy))
    centred = x - x.mean(-1, keepdims=True)
    factor = ((centred**2).mean(-1, keepdims=True) + EPSILON) ** -0.5
    normalised, scaled = centred * factor, dy * scale
    slope = (scaled * normalised).mean(-1, keepdims=True)
    dx = factor * (scaled - scaled.mean(-1, keepdims=True) - normalised * slope)
    return normalised, dx, (dy * normalised).sum((0, 1, 2)), dy.sum((0, 1, 2))


def test_values_and_the_shortcut():
    x, scale, bias, dy, shortcut = draw((2, 5, 3, 48))
    same, y = layer_norm(x, scale, bias, EPSILON, jnp.bfloat16)
    np.testing.assert_array_equal(same, x)
    assert y.dtype == jnp.bfloat16
    (_, y), pull = jax.vjp(lambda *args: layer_norm(*args, EPSILON, jnp.float32), x, scale, bias)
    normalised, dx, dscale, dbias = reference(x, scale, dy)
    expected = normalised * np.asarray(scale) + np.asarray(bias)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    gradients = pull((shortcut, dy))
    for got, expected in zip(gradients, (dx + shortcut, dscale, dbias), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def check_gradients(gradient, shape):
    x, scale, _, dy, shortcut = draw(shape)
    _, dx, *sums = reference(x, scale, dy)
    for branch, expected in (((), dx), ((shortcut,), dx + shortcut)):
        got = gradient(x, scale, dy, *branch, epsilon=EPSILON)
        for a, b in zip(got, (expected, *sums), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4)


def check_bfloat16_gradients_are_rounded_once(gradient, tolerance=2.0**-8):
    x, scale, _, dy, shortcut = draw((2, 5, 3, 48), jnp.bfloat16)
    wide = (array.astype(jnp.float32) for array in (x, dy, shortcut))
    x32, dy32, shortcut32 = wide
    expected = norm_xla.gradient(x32, scale, dy32, shortcut32, epsilon=EPSILON)
    got = gradient(x, scale, dy, shortcut, epsilon=EPSILON)
    assert got[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(got[0].astype(jnp.float32), expected[0], rtol=tolerance)
    for a, b in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 5, 3, 48), (1, 40, 30, 130)])
def test_gradients(shape):
    check_gradients(norm_xla.gradient, shape)


def test_bfloat16_gradients_are_rounded_once():
    check_bfloat16_gradients_are_rounded_once(norm_xla.gradient)


def test_each_device_runs_the_gradient_on_its_part_of_the_batch():
    assert jax.device_count() == 8
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    maps = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())

    def in_mesh(x, scale, dy):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            gradient = functools.partial(norm_xla.gradient, epsilon=EPSILON)
            return on_parts(gradient, (True, False, True), (True, False, False))(x, scale, dy)

    x, scale, _, dy, _ = draw((16, 3, 2, 24))
    step = jax.jit(in_mesh, in_shardings=(maps, whole, maps), out_shardings=(maps, whole, whole))
    compiled = step.lower(x, scale, dy).compile()
    assert "all-gather" not in compiled.as_text()
    _, dx, *sums = reference(x, scale, dy)
    got = compiled(*jax.device_put((x, scale, dy), (maps, whole, maps)))
    for a, b in zip(got, (dx, *sums), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
