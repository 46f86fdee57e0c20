"""The network as an NNX module."""

import golden
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from test_step import small_model

import mambaout_jax


@pytest.fixture(scope="module")
def network():
    model = small_model(drop_path_rate=0.5)
    return model, golden.params(model)


def test_the_outputs_are_the_linen_modules_bit_for_bit(network):
    model, params = network
    images = golden.images(0, 2, 32)
    module = mambaout_jax.to_nnx(model, params)
    assert isinstance(module, nnx.Module)
    logits = nnx.jit(lambda module, images: module(images))(module, images)
    expected = jax.jit(lambda params, images: model.apply({"params": params}, images))
    np.testing.assert_array_equal(logits, expected(params, images))
    np.testing.assert_array_equal(module(images), model.apply({"params": params}, images))
    maps = model.apply({"params": params}, images, method="features")
    jax.tree.map(np.testing.assert_array_equal, module.features(images), maps)


def test_a_step_trains_every_parameter(network):
    model, params = network
    module = mambaout_jax.to_nnx(model, params, rngs=nnx.Rngs(dropout=0))
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
    images, labels = golden.images(0, 8, 32), np.arange(8) % 10

    def loss_fn(module):
        logits = module(images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @nnx.jit
    def step(module, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn)(module)
        optimizer.update(module, grads)
        return loss

    losses = [float(step(module, optimizer)) for _ in range(5)]
    assert min(losses[1:]) < losses[0]
    assert len(set(losses)) == 5
    after = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert jax.tree.structure(after) == jax.tree.structure(params)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), after, params)
    assert all(jax.tree.leaves(changed))


def test_drop_path_draws_anew_in_each_call(network):
    module = mambaout_jax.to_nnx(*network, rngs=nnx.Rngs(dropout=0))
    call = nnx.jit(lambda module, images: module(images, train=True))
    images = golden.images(0, 8, 32)
    assert (call(module, images) != call(module, images)).any()


def test_parameters_of_another_network_are_refused(network):
    model, params = network
    other = {name: part for name, part in params.items() if name != "head"}
    with pytest.raises(mambaout_jax.UserError, match=r"do not fit the model.*head"):
        mambaout_jax.to_nnx(model, other)
