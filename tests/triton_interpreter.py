"""Triton's kernels in Triton's interpreter; test_triton.py runs this file in its own process.

The interpreter is chosen by TRITON_INTERPRET=1 before triton is imported.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_norm
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_depthwise import TOLERANCE, assert_close, draw, reference, reference_filter_gradient
from test_selective_scan import example, loop
from triton.runtime.interpreter import TensorHandle, interpreter_builder
from triton_calls import MODULES, interpret

from mambaout_jax.ops import norm_triton
from mambaout_jax.ops.depthwise import gpu
from mambaout_jax.ops.depthwise import xla as xla_depthwise
from mambaout_jax.ops.first_conv import triton_kernels as first_conv
from mambaout_jax.ops.gated_conv import dense_triton
from mambaout_jax.ops.gated_conv import gpu as gated_conv
from mambaout_jax.ops.patches import xla_conv
from mambaout_jax.ops.selective_scan import triton_kernels as scan_kernels
from mambaout_jax.ops.selective_scan import xla as xla_scan

MAPS = st.tuples(*[st.integers(1, high) for high in (2, 5, 16, 20)])
# Of a bfloat16 result, as in `test_depthwise`: the interpreter cuts its last digits off.
CUT = 2.0**-7


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "launch", interpret)
    builder = interpreter_builder.__class__
    multiply = builder.create_dot

    def create_dot(self, a, b, *args):
        """Multiplies bfloat16 matrices, which the interpreter takes for those of its uint16."""
        return multiply(self, *map(as_float32, (a, b)), *args)

    monkeypatch.setattr(builder, "create_dot", create_dot)


def as_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return TensorHandle(data, tl.float32)


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    shape=MAPS,
    size=st.sampled_from([1, 3, 5, 7]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    seed=st.integers(0, 99),
)
def test_depthwise_convolution_agrees_with_float64(shape, size, dtype, seed):
    x, kernel, dy = draw(shape, size, dtype, seed)
    y, dx = gpu.forward(x, kernel), gpu.input_gradient(dy, kernel)
    dkernel = gpu.triton_kernels.filter_gradient(x, dy, size)
    assert y.dtype == dx.dtype == dtype
    assert dkernel.dtype == jnp.float32
    x, kernel, dy = (np.asarray(array, np.float64) for array in (x, kernel, dy))
    tolerance = TOLERANCE[jnp.float32] if dtype == jnp.float32 else CUT
    assert_close(y, reference(x, kernel), tolerance)
    assert_close(dx, reference(dy, kernel[::-1, ::-1]), tolerance)
    assert_close(dkernel, reference_filter_gradient(x, dy, size), TOLERANCE[jnp.float32])


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 3, 17, 40), 5), ((9, 2, 4, 70), 5), ((1, 3, 31, 8), 13)]
)
def test_depthwise_convolution_in_several_blocks(shape, size):
    """Uneven parts of a row, of the channels and, of the filter's gradient, of the rows."""
    x, kernel, dy = draw(shape, size, jnp.float32)
    dkernel = gpu.triton_kernels.filter_gradient(x, dy, size)
    y = gpu.forward(x, kernel)
    x, kernel, dy = (np.asarray(array, np.float64) for array in (x, kernel, dy))
    assert_close(y, reference(x, kernel), TOLERANCE[jnp.float32])
    assert_close(dkernel, reference_filter_gradient(x, dy, size), TOLERANCE[jnp.float32])


@pytest.mark.parametrize("shape", [(2, 5, 3, 48), (1, 40, 30, 130)])
def test_layer_norm(shape):
    test_norm.check_gradients(norm_triton.gradient, shape)
    x, scale, bias, dy, _ = test_norm.draw(shape)
    normalised, *_ = test_norm.reference(x, scale, dy)
    y = norm_triton.normalise(x, scale, bias, epsilon=test_norm.EPSILON, dtype=jnp.float32)
    expected = normalised * np.asarray(scale) + np.asarray(bias)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=1e-5)


def test_layer_norm_gradients_in_bfloat16_are_rounded_once():
    test_norm.check_bfloat16_gradients_are_rounded_once(norm_triton.gradient, tolerance=CUT)


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    shape=MAPS,
    identity=st.integers(0, 70),
    size=st.sampled_from([1, 3, 7]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    act=st.sampled_from(["gelu", "silu"]),
    seed=st.integers(0, 99),
)
def test_gated_convolution_agrees_with_float64(shape, identity, size, dtype, act, seed):
    *maps, conv = shape
    random = np.random.default_rng(seed)
    hidden = identity + conv
    x, bias, taps, conv_bias, dy = (
        jnp.asarray(random.standard_normal(sizes), dtype)
        for sizes in ((*maps, 2 * hidden), 2 * hidden, (size, size, 1, conv), conv, (*maps, hidden))
    )
    y, biased, convolved = gated_conv.forward(x, bias, taps, conv_bias, act=act)
    gradients = gated_conv.backward(biased, taps, convolved, dy, act=act)
    with jax.enable_x64(True):
        args = [np.asarray(array, np.float64) for array in (x, bias, taps, conv_bias)]
        expected, pull = jax.vjp(functools.partial(gated_convolution, act), *args)
        expected = expected, *pull(jnp.asarray(dy, jnp.float64))
    tolerance = 2 * TOLERANCE[jnp.float32] if dtype == jnp.float32 else 2 * CUT
    for found, wanted in zip((y, *gradients), expected, strict=True):
        assert_close(found, np.asarray(wanted), tolerance)


SMALL = st.tuples(*[st.integers(1, high) for high in (2, 5, 7)])


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(maps=SMALL, channels=st.integers(1, 300), outputs=st.integers(1, 150))
def test_dense_layer_after_a_norm_agrees_with_float64(maps, channels, outputs):
    check_norm_dense(maps, channels, outputs)


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    maps=SMALL,
    identity=st.integers(0, 150),
    conv=st.integers(1, 150),
    outputs=st.integers(1, 70),
    act=st.sampled_from(["gelu", "silu"]),
)
def test_dense_layer_after_a_gate_agrees_with_float64(maps, identity, conv, outputs, act):
    check_gate_dense(maps, identity, conv, outputs, act)


@pytest.mark.parametrize("channels", [48, 96, 192, 288])
def test_dense_layers_of_mambaout_femto(channels):
    hidden = 8 * channels // 3
    check_norm_dense((1, 5, 7), channels, 2 * hidden)
    check_gate_dense((1, 5, 7), hidden - channels, channels, channels, "gelu")


@pytest.mark.parametrize("tile", dense_triton._TILES)
def test_dense_layers_in_each_tile(tile, monkeypatch):
    monkeypatch.setattr(dense_triton, "_TILES", (tile,))
    check_norm_dense((2, 7, 10), 150, 100)
    check_gate_dense((2, 7, 10), 70, 80, 100, "silu")


def check_norm_dense(maps, channels, outputs):
    shapes = (*maps, channels), channels, channels, (channels, outputs), outputs
    x, scale, shift, kernel, bias = draw_bfloat16(*shapes)
    x += 3  # the mean
    scale, shift = (array.astype(jnp.float32) for array in (scale, shift))
    args = x, scale, shift, kernel, bias
    y = dense_triton.norm_dense(*args, epsilon=1e-6)
    assert y.dtype == jnp.bfloat16
    x, scale, shift, kernel, bias = (np.asarray(array, np.float64) for array in args)
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    expected = (centred / np.sqrt(variance + 1e-6) * scale + shift) @ kernel + bias
    assert_close(y, expected, 2 * CUT)


def check_gate_dense(maps, identity, conv, outputs, act):
    hidden = identity + conv
    shapes = (*maps, 2 * hidden), (*maps, conv), (*maps, outputs), (hidden, outputs), outputs
    args = draw_bfloat16(*shapes)
    y = dense_triton.gate_dense(*args, act=act)
    assert y.dtype == jnp.bfloat16
    x, convolved, shortcut, kernel, bias = (np.asarray(array, np.float64) for array in args)
    value = np.concatenate((x[..., hidden : hidden + identity], convolved), -1)
    with jax.enable_x64(True):
        active = np.asarray(exact_activation(act)(x[..., :hidden]))
    assert_close(y, shortcut + (active * value) @ kernel + bias, 2 * CUT)


def draw_bfloat16(*shapes):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in shapes]


def gated_convolution(act, x, bias, taps, conv_bias):
    """Computes `gated_conv` in float64."""

    def wide(vector):
        return vector.reshape(1, 1, 1, -1)

    hidden, conv = x.shape[-1] // 2, taps.shape[-1]
    gate, identity, convolved = jnp.split(x + wide(bias), (hidden, 2 * hidden - conv), axis=-1)
    value = jnp.concatenate(
        (identity, xla_depthwise.forward(convolved, taps) + wide(conv_bias)), -1
    )
    return exact_activation(act)(gate) * value


def exact_activation(act):
    return jax.nn.silu if act == "silu" else functools.partial(jax.nn.gelu, approximate=False)


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    sides=st.tuples(st.integers(1, 3), st.integers(2, 12), st.integers(2, 12)),
    features=st.sampled_from([8, 24, 48]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    act=st.sampled_from(["gelu", "silu"]),
    seed=st.integers(0, 99),
)
def test_first_convolution_agrees_with_float64(sides, features, dtype, act, seed):
    random = np.random.default_rng(seed)
    images, height, width = sides
    shapes = [(*sides, 3), (3, 3, 3, features), features, features, features]
    shapes.append((images, (height + 1) // 2, (width + 1) // 2, features))
    *args, dy = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    args[3:] = (array.astype(jnp.float32) for array in args[3:])
    options = {"act": act, "epsilon": 1e-6}
    y = first_conv.forward(*args, **options)
    gradients = first_conv.backward(*args, dy, **options)
    with jax.enable_x64(True):
        wide = [np.asarray(array, np.float64) for array in args]
        expected, pull = jax.vjp(functools.partial(first_convolution, **options), *wide)
        _, *expected_gradients = pull(jnp.asarray(dy, jnp.float64))
    tolerance = 2 * TOLERANCE[jnp.float32] if dtype == jnp.float32 else 2 * CUT
    for found, wanted in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        assert_close(found, np.asarray(wanted), tolerance)


def first_convolution(images, kernel, bias, scale, shift, act, epsilon):
    """Computes `first_conv` in float64."""
    bias, scale, shift = (vector.reshape(1, 1, 1, -1) for vector in (bias, scale, shift))
    x = xla_conv(images, kernel, stride=2, padding=((1, 1), (1, 1))) + bias
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    x = centred / jnp.sqrt(variance + epsilon) * scale + shift
    return jax.nn.silu(x) if act == "silu" else jax.nn.gelu(x, approximate=False)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("n", "length", "channels", "states"),
    [(1, 1, 3, 1), (3, 18, 17, 5), (1, 37, 1, 16), (1, 16, 24, 9), (3, 5, 7, 32)],
)
def test_selective_scan_agrees_with_float64(n, length, channels, states, dtype):
    check_scan(length, dtype, n=n, channels=channels, state=states)


def test_selective_scan_in_small_tiles(monkeypatch):
    """Two chunks, the second in part; two blocks of channels, tiles of states and of tokens."""
    for name, value in {"_TILE": (2, 4), "_CHANNELS": 4, "_STEPS": 2}.items():
        monkeypatch.setattr(scan_kernels, name, value)
    check_scan(xla_scan.CHUNK + 3, jnp.float32, channels=6, state=3)


def check_scan(length, dtype, **sizes):
    """Checks y, the states and all gradients; delta, a and d are float32, as in the network."""
    (x, delta, a, b, c, d), dy = example(length, **sizes)
    x, b, c, dy = (jnp.asarray(array, dtype) for array in (x, b, c, dy))
    delta, a, d = (jnp.asarray(array, jnp.float32) for array in (delta, a, d))
    args = x, delta, a, b, c, d
    y, states = scan_kernels.forward(*args, keep=True)
    (alone,) = scan_kernels.forward(*args, keep=False)
    np.testing.assert_array_equal(y, alone)
    gradients = scan_kernels.backward(*args, states, dy)
    with jax.enable_x64(True):
        wide = [np.asarray(array, np.float64) for array in args]
        expected, pull = jax.vjp(scan_in_float64, *wide)
        expected = expected, *pull(jnp.asarray(dy, jnp.float64))
    np.testing.assert_allclose(expected[0], loop(*wide), rtol=1e-12, atol=1e-12)
    for array, found, wanted in zip((x, *args), (y, *gradients), expected, strict=True):
        assert found.dtype == array.dtype
        tolerance = CUT if found.dtype == jnp.bfloat16 else 1e-5
        assert_close(found, np.asarray(wanted), tolerance)
    _, kept = xla_scan.forward(*args, keep=True)
    np.testing.assert_allclose(states, kept, rtol=1e-5, atol=1e-5)


def scan_in_float64(x, delta, a, b, c, d):
    """Computes `selective_scan` in float64."""

    def step(h, token):
        x, delta, b, c = token
        h = jnp.exp(delta[..., None] * a[None]) * h + (delta * x)[..., None] * b[:, None]
        return h, (h * c[:, None]).sum(-1)

    tokens = [jnp.moveaxis(array, 1, 0) for array in (x, delta, b, c)]
    _, y = jax.lax.scan(step, jnp.zeros((len(x), *a.shape)), tokens)
    return jnp.moveaxis(y, 0, 1) + d[None, None] * x
