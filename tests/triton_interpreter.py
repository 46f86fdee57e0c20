"""Triton's kernels in Triton's interpreter; test_triton.py runs this file in its own process.

The interpreter is chosen by TRITON_INTERPRET=1 before triton is imported.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_depthwise import TOLERANCE, assert_close, draw, reference, reference_filter_gradient
from test_norm import check_bfloat16_gradients_are_rounded_once, check_gradients
from test_selective_scan import example, in_float32, loop
from triton_calls import MODULES, interpret

from mambaout_jax.ops import norm_triton
from mambaout_jax.ops.depthwise import gpu
from mambaout_jax.ops.selective_scan import triton_kernels, xla

MAPS = st.tuples(*[st.integers(1, high) for high in (2, 5, 16, 20)])
# Of a bfloat16 result, as in `test_depthwise`: the interpreter cuts its last digits off.
CUT = 2.0**-7


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "launch", interpret)


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
def test_layer_norm_gradients(shape):
    check_gradients(norm_triton.gradient, shape)


def test_layer_norm_gradients_in_bfloat16_are_rounded_once():
    check_bfloat16_gradients_are_rounded_once(norm_triton.gradient, tolerance=CUT)


def check_scan(length, **sizes):
    args, weight = example(length, **sizes)
    expected_y = loop(*args)
    args, weight = tuple(map(jnp.asarray, in_float32(args))), jnp.float32(weight)
    y, states = triton_kernels.forward(*args, keep=True)
    (alone,) = triton_kernels.forward(*args, keep=False)
    np.testing.assert_array_equal(y, alone)
    np.testing.assert_allclose(y, expected_y, rtol=0, atol=1e-5)
    theirs = jax.jit(functools.partial(xla.forward, keep=True))(*args)
    np.testing.assert_allclose(states, theirs[1], rtol=0, atol=1e-5)
    found = triton_kernels.backward(*args, states, weight)
    for ours, expected in zip(found, jax.jit(xla.backward)(*args, states, weight), strict=True):
        scale = max(1, float(jnp.abs(expected).max()))
        np.testing.assert_allclose(ours / scale, expected / scale, rtol=0, atol=1e-5)


def test_selective_scan_in_small_tiles(monkeypatch):
    # Two chunks, the second in part; two blocks of channels, tiles of states and of tokens.
    for name, value in {"_TILE": (2, 4), "_CHANNELS": 4, "_STEPS": 2}.items():
        monkeypatch.setattr(triton_kernels, name, value)
    check_scan(xla.CHUNK + 3, channels=6, state=3)


@pytest.mark.parametrize(("length", "channels", "state"), [(1, 3, 4), (18, 20, 9), (5, 8, 32)])
def test_selective_scan(length, channels, state):
    check_scan(length, channels=channels, state=state)
