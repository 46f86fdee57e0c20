"""Activations and the gate's product against float64 formulas: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from mambaout_jax.errors import UserError
from mambaout_jax.ops import activate, gate_product

X = np.linspace(-9, 9, 721)
EXPECTED = {
    "gelu": (X * stats.norm.cdf(X), stats.norm.cdf(X) + X * stats.norm.pdf(X)),
    "silu": (X * special.expit(X), special.expit(X) * (1 + X * special.expit(-X))),
}


@pytest.mark.parametrize("act", EXPECTED)
def test_values_and_derivatives(act):
    value, derivative = EXPECTED[act]
    y, pull = jax.vjp(lambda x: activate(act, x), jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(y, value, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(pull(jnp.ones_like(y))[0], derivative, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("act", EXPECTED)
def test_bfloat16_is_rounded_once(act):
    x = jnp.asarray(X, jnp.bfloat16)
    exact = activate(act, x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(activate(act, x), exact)
    slope = jax.vjp(lambda x: activate(act, x), x.astype(jnp.float32))[1](jnp.ones(X.shape))[0]
    got = jax.vjp(lambda x: activate(act, x), x)[1](jnp.ones(X.shape, jnp.bfloat16))[0]
    np.testing.assert_array_equal(got, slope.astype(jnp.bfloat16))


@pytest.mark.parametrize("act", EXPECTED)
def test_gate_product(act):
    random = np.random.default_rng(0)
    gate, dy = random.standard_normal((2, 2, 3, 721))
    gate += X.reshape(1, 1, -1)
    identity, conv = random.standard_normal((2, 3, 500)), random.standard_normal((2, 3, 221))
    args = [jnp.asarray(array, jnp.float32) for array in (gate, identity, conv)]
    y, pull = jax.vjp(lambda *args: gate_product(act, *args), *args)
    active = gate * (stats.norm.cdf(gate) if act == "gelu" else special.expit(gate))
    slope = np.interp(gate, X, EXPECTED[act][1])  # to 1e-4, as finely as X samples it
    value = np.concatenate((identity, conv), axis=-1)
    np.testing.assert_allclose(y, active * value, rtol=1e-5, atol=1e-5)
    dgate, didentity, dconv = pull(jnp.asarray(dy, jnp.float32))
    np.testing.assert_allclose(dgate, dy * slope * value, atol=2e-3)
    both = np.concatenate((didentity, dconv), axis=-1)
    np.testing.assert_allclose(both, dy * active, rtol=1e-5, atol=1e-5)


def test_an_unknown_activation_is_an_error_that_lists_the_known_ones():
    with pytest.raises(UserError, match=r"unknown activation 'relu' \(known: gelu, silu\)"):
        activate("relu", jnp.ones(3))
