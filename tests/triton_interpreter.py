"""Triton's kernels in Triton's interpreter; test_triton.py runs this file in its own process.

The interpreter is chosen by TRITON_INTERPRET=1 before triton is imported.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_depthwise import TOLERANCE, assert_close, draw, reference, reference_filter_gradient
from test_norm import check_bfloat16_gradients_are_rounded_once, check_gradients
from triton_calls import MODULES, interpret

from mambaout_jax.ops import norm_triton
from mambaout_jax.ops.depthwise import gpu

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
