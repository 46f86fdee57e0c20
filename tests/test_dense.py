"""The block's dense layers: padding changes no result, and no shape of a parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mambaout_jax.ops import dense, gate_product, merge_dense, split_dense

# Hidden channels and those of the convolution: padded by 3, 4 and 0.
CASES = [(341, 128), (48, 20), (40, 16)]


def draw(hidden, conv, width=16):
    random = np.random.default_rng(hidden)
    shapes = ((3, width), (width, 2 * hidden), (2 * hidden,), (hidden, width), (width,))
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


def padded(weights, x, conv):
    kernel1, bias1, kernel2, bias2 = weights
    gate, identity, c = split_dense(x, kernel1, bias1, conv, jnp.float32)
    return merge_dense(
        gate_product("gelu", gate, identity, c * c), kernel2, bias2, conv, jnp.float32
    )


def plain(weights, x, conv):
    kernel1, bias1, kernel2, bias2 = weights
    hidden = kernel2.shape[0]
    y = dense(x, kernel1, bias1, jnp.float32)
    gate, identity, c = jnp.split(y, (hidden, 2 * hidden - conv), axis=-1)
    return dense(gate_product("gelu", gate, identity, c * c), kernel2, bias2, jnp.float32)


@pytest.mark.parametrize(("hidden", "conv"), CASES)
def test_padding_changes_neither_results_nor_gradients(hidden, conv):
    x, *weights = draw(hidden, conv)
    cotangent = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    results = []
    with jax.default_matmul_precision("highest"):
        for block in (padded, plain):
            y, pull = jax.vjp(lambda weights, x, block=block: block(weights, x, conv), weights, x)
            results.append((y, pull(cotangent)))
    for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
        assert got.shape == expected.shape
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(("hidden", "conv"), CASES)
def test_identity_channels_are_padded_to_a_multiple_of_eight(hidden, conv):
    x, kernel, bias, *_ = draw(hidden, conv)
    gate, identity, c = split_dense(x, kernel, bias, conv, jnp.float32)
    assert identity.shape[-1] == -(-(hidden - conv) // 8) * 8
    assert gate.shape[-1] == identity.shape[-1] + conv
    assert c.shape[-1] == conv
    assert not identity[:, hidden - conv :].any()
    assert not gate[:, hidden - conv : identity.shape[-1]].any()
