"""Depthwise convolution: the implementations that run anywhere, against float64; and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambaout_jax.errors import UserError
from mambaout_jax.ops import depthwise_conv2d
from mambaout_jax.ops.depthwise import pallas_tpu
from mambaout_jax.ops.depthwise.dispatch import implementations

EVERYWHERE = [name for name in implementations() if name != "triton"]

# Largest error, as a part of the largest absolute value: float32 sums of up to k * k or
# N * H * W products; for bfloat16, half a unit in the last of its 8 digits, and a little.
TOLERANCE = {jnp.float32: 3e-6, jnp.bfloat16: 2.0**-8}


def reference(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolves in float64: x [N, H, W, C], kernel [k, k, 1, C]."""
    size = kernel.shape[0]
    height, width = x.shape[1:3]
    edge = size // 2
    padded = np.pad(x.astype(np.float64), ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    return sum(
        padded[:, i : i + height, j : j + width] * kernel[i, j].astype(np.float64)
        for i in range(size)
        for j in range(size)
    )


def reference_filter_gradient(x: np.ndarray, dy: np.ndarray, size: int) -> np.ndarray:
    """Returns the kernel's gradient [k, k, 1, C] in float64 for x and dy [N, H, W, C]."""
    height, width = x.shape[1:3]
    edge = size // 2
    padded = np.pad(x.astype(np.float64), ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    rows = [
        [(padded[:, i : i + height, j : j + width] * dy).sum((0, 1, 2)) for j in range(size)]
        for i in range(size)
    ]
    return np.array(rows)[:, :, None]


def draw(shape: tuple[int, ...], size: int, dtype, seed: int = 0):
    """Returns x, kernel and dy in the dtype, from numpy's generator."""
    random = np.random.RandomState(seed)
    x, dy = random.standard_normal((2, *shape))
    kernel = random.standard_normal((size, size, 1, shape[-1]))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), jnp.asarray(dy, dtype)


def assert_close(actual: jax.Array, expected: np.ndarray, tolerance: float) -> None:
    error = np.abs(np.asarray(actual, np.float64) - expected).max()
    assert error <= tolerance * np.abs(expected).max()


def check(implementation: str, shape: tuple[int, ...], size: int, dtype, seed: int = 0) -> None:
    x, kernel, dy = draw(shape, size, dtype, seed)

    @jax.jit
    def run(x, kernel, dy):
        y, pull = jax.vjp(
            lambda x, kernel: depthwise_conv2d(x, kernel, implementation=implementation), x, kernel
        )
        return y, *pull(dy)

    y, dx, dkernel = run(x, kernel, dy)
    assert y.dtype == dx.dtype == dkernel.dtype == dtype
    x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    assert_close(y, reference(x, kernel), TOLERANCE[dtype])
    assert_close(dx, reference(dy, kernel[::-1, ::-1]), TOLERANCE[dtype])
    assert_close(dkernel, reference_filter_gradient(x, dy, size), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_seven_by_seven_agrees_with_float64(implementation, dtype):
    check(implementation, (2, 7, 7, 48), 7, dtype)


@pytest.mark.parametrize("implementation", EVERYWHERE)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, high) for high in (3, 11, 11, 20)]),
    size=st.sampled_from([1, 3, 5, 7]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    seed=st.integers(0, 99),
)
def test_any_shape_agrees_with_float64(implementation, shape, size, dtype, seed):
    check(implementation, shape, size, dtype, seed)


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_float32_kernel_is_rounded_and_keeps_its_gradient_in_float32(implementation):
    x, kernel, dy = draw((2, 5, 5, 8), 3, jnp.float32)
    x = x.astype(jnp.bfloat16)
    rounded = kernel.astype(jnp.bfloat16)

    def convolve(kernel):
        return depthwise_conv2d(x, kernel, implementation=implementation)

    y, pull = jax.vjp(convolve, kernel)
    np.testing.assert_array_equal(y, convolve(rounded))
    assert pull(dy.astype(jnp.bfloat16))[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        (2, (9, 4, 20, 3)),  # rows in blocks with rows of their neighbours, columns in even parts
        (3, (2, 7, 17, 130)),  # a last block of 1 row, uneven parts, two blocks of channels
    ],
)
def test_tpu_kernels_in_several_blocks(monkeypatch, rows, shape):
    monkeypatch.setattr(pallas_tpu, "_rows", lambda x, size: rows)
    check("pallas_tpu", shape, 5, jnp.float32)


def test_tpu_blocks_fit_their_memory():
    for size, itemsize in (
        (56, jnp.bfloat16),
        (56, jnp.float32),
        (96, jnp.float32),
        (83, jnp.bfloat16),
    ):
        x = jax.ShapeDtypeStruct((size, size, 8, 96), itemsize)
        rows = pallas_tpu._rows(x, 7)
        assert pallas_tpu._block_bytes(x, 7, rows) <= 13 * 2**20
        assert rows > 1


def test_unknown_implementation_names_the_known_ones():
    x, kernel, _ = draw((1, 4, 4, 2), 3, jnp.float32)
    with pytest.raises(UserError, match=r"'cudnn'.*auto, xla"):
        depthwise_conv2d(x, kernel, implementation="cudnn")


@pytest.mark.parametrize(
    ("x", "kernel", "message"),
    [
        (jnp.ones((4, 4, 2)), jnp.ones((3, 3, 1, 2)), r"\[N, H, W, C\]"),
        (jnp.ones((1, 4, 4, 2), jnp.int32), jnp.ones((3, 3, 1, 2)), "int32"),
        (jnp.ones((1, 4, 4, 2)), jnp.ones((4, 4, 1, 2)), "odd k"),
        (jnp.ones((1, 4, 4, 2)), jnp.ones((3, 5, 1, 2)), r"\[k, k, 1, 2\]"),
        (jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 4)), "2 channels"),
        (jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2), jnp.bfloat16), "float32"),
    ],
)
def test_bad_input_is_refused(x, kernel, message):
    with pytest.raises(UserError, match=message):
        depthwise_conv2d(x, kernel)


def test_forward_mode_is_refused():
    x, kernel, _ = draw((1, 4, 4, 2), 3, jnp.float32)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(depthwise_conv2d, (x, kernel), (x, kernel))
