"""The optimizers and losses that a config names: formulas, weight decay, sharding, checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_weights
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from test_step import RECIPE, batch_of, equal, optimizer_of

from configs import default
from mambaout_jax import config as configuration
from mambaout_jax.build import build_optimizer, build_recipe, build_schedule
from mambaout_jax.errors import UserError
from mambaout_jax.runtime.sharding import make_mesh, state_shardings
from mambaout_jax.training import checkpoint, restore
from mambaout_jax.training.classification import LOSSES
from mambaout_jax.training.optimizer import MUON_RMS, OPTIMIZERS, muon_labels
from mambaout_jax.training.state import TrainState, init_state
from mambaout_jax.training.step import train_step

SHAPES = {
    "stem/conv1/kernel": (3, 3, 3, 8),
    "stages_0/blocks_0/fc1/kernel": (128, 256),
    "stages_0/blocks_0/fc1/bias": (256,),
    "stages_0/blocks_0/norm/scale": (128,),
    "head/fc2/kernel": (128, 10),
}


@pytest.fixture(scope="module")
def params():
    """Returns parameters of each kind; few, so that they compile fast."""
    random = np.random.default_rng(7)
    flat = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
    return unflatten_dict({name: jnp.asarray(p, jnp.float32) for name, p in flat.items()}, sep="/")


def gradients(params, seed):
    """Returns a tree of normal numbers, of the shapes of `params`."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape), jnp.float32), params)


def updates_of(optimizer, params, steps=2):
    """Returns the updates of the last of some steps, each with other gradients, and the state."""

    @jax.jit
    def update(grads, state):
        return optimizer.update(grads, state, params)

    updates, state = None, optimizer.init(params)
    for seed in range(steps):
        updates, state = update(gradients(params, seed), state)
    return updates, state


def test_lion_moves_by_the_sign(params):
    options = {"name": "lion", "b1": 0.5, "b2": 0.75, "weight_decay": 0.0}
    updates, _ = updates_of(optimizer_of(0.1, **options), params)
    first, second = gradients(params, 0), gradients(params, 1)
    mean = jax.tree.map(lambda g: (1 - 0.75) * g, first)
    equal(updates, jax.tree.map(lambda m, g: -0.1 * jnp.sign(0.5 * m + 0.5 * g), mean, second))


def test_sgd_has_nesterov_momentum_and_torchs_weight_decay(params):
    options = {"name": "sgd", "b1": 0.5, "weight_decay": 0.1}
    updates, _ = updates_of(optimizer_of(0.1, **options), params)

    def expected(p, first, second):
        decay = 0.1 * p if p.ndim > 1 else 0.0
        momentum = 0.5 * (first + decay) + (second + decay)
        return -0.1 * ((second + decay) + 0.5 * momentum)

    grads = gradients(params, 0), gradients(params, 1)
    equal(updates, jax.tree.map(expected, params, *grads), rtol=1e-5, atol=1e-6)


def test_lamb_moves_each_parameter_by_a_fraction_of_its_norm(params):
    updates, _ = updates_of(optimizer_of(0.1, name="lamb"), params)
    for name, update in flatten_dict(updates, sep="/").items():
        norm = np.linalg.norm(flatten_dict(params, sep="/")[name])
        if norm:
            np.testing.assert_allclose(np.linalg.norm(update), 0.1 * norm, rtol=1e-4)


def test_muon_orthogonalises_the_hidden_matrices_and_leaves_the_rest_to_adamw(params):
    labels = flatten_dict(muon_labels(params), sep="/")
    assert [name for name in labels if labels[name] == "muon"] == ["stages_0/blocks_0/fc1/kernel"]
    updates, _ = updates_of(optimizer_of(1.0, name="muon", weight_decay=0.0), params)
    adamw, _ = updates_of(optimizer_of(1.0, weight_decay=0.0), params)
    adamw = flatten_dict(adamw, sep="/")
    for name, update in flatten_dict(updates, sep="/").items():
        if labels[name] == "adamw":
            np.testing.assert_allclose(update, adamw[name], rtol=1e-5, err_msg=name)
        else:  # five Newton-Schulz iterations bring all singular values near 1
            values = np.linalg.svd(update, compute_uv=False)
            values /= MUON_RMS * np.sqrt(max(update.shape))
            assert 0.5 < values.min() < values.max() < 1.3, name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_spares_biases_and_scales(name, params):
    zero = jax.tree.map(jnp.zeros_like, params)
    optimizer = optimizer_of(0.1, name=name, weight_decay=0.5)
    updates, _ = jax.jit(optimizer.update)(zero, optimizer.init(params), params)
    for path, update in flatten_dict(updates, sep="/").items():
        assert np.any(update) == path.endswith("kernel"), path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_split_state_gives_the_same_updates(name, params):
    """The state of every optimizer has a sharding rule for each array, and large arrays split."""
    optimizer, mesh = optimizer_of(name=name), make_mesh(8)
    updates, state = updates_of(optimizer, params)
    split = jax.device_put(params, state_shardings(params, mesh))
    shardings = state_shardings(jax.eval_shape(optimizer.init, params), mesh)
    update = jax.jit(optimizer.update, out_shardings=(state_shardings(params, mesh), shardings))
    found, split_state = None, jax.device_put(optimizer.init(params), shardings)
    for seed in range(2):
        grads = jax.device_put(gradients(params, seed), state_shardings(params, mesh))
        found, split_state = update(grads, split_state, split)
    assert any("fsdp" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(split_state))
    equal(found, updates, rtol=1e-4, atol=1e-6)
    equal(split_state, state, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_restores_the_state(name, params, tmp_path):
    _, opt_state = updates_of(optimizer_of(name=name), params)
    state = TrainState(jnp.asarray(2, jnp.int32), params, opt_state)
    shardings = state_shardings(state, make_mesh())
    state = jax.device_put(state, shardings)
    info = dataclasses.replace(small_weights.INFO, num_classes=10)
    with checkpoint.open_checkpoints(epath.Path(tmp_path / "run"), keep=1) as manager:
        checkpoint.save(manager, state, {"batches": {}}, info, None, wait=True)
        found = restore.restore_newest(manager, restore.abstract_state(state, shardings))
    assert found is not None
    assert jax.tree.structure(found[0]) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found[0], state)


def test_binary_cross_entropy_is_the_hand_formula():
    random = np.random.default_rng(0)
    logits, targets = random.normal(size=(4, 10)), random.uniform(size=(4, 10))
    logits, targets = logits.astype(np.float32), targets.astype(np.float32)
    chance = 1 / (1 + np.exp(-logits))
    expected = -(targets * np.log(chance) + (1 - targets) * np.log(1 - chance)).mean(axis=1)
    np.testing.assert_allclose(LOSSES["bce"](logits, targets), expected, rtol=1e-5)


def test_the_loss_of_the_recipe_acts():
    class Linear:
        def apply(self, variables, images, train, rngs):
            return images.mean(axis=(1, 2)) @ variables["params"]

    state = init_state(jnp.zeros((3, 10)), optax.identity(), ema=False)
    found = {}
    for loss in LOSSES:
        recipe = dataclasses.replace(RECIPE, loss=loss)
        parts = {"model": Linear(), "optimizer": optax.identity(), "recipe": recipe}
        _, metrics = train_step(state, batch_of(4), jax.random.key(0), **parts)
        found[loss] = float(metrics["loss"])
    np.testing.assert_allclose(found["softmax"], np.log(10), rtol=1e-6)
    np.testing.assert_allclose(found["bce"], np.log(2), rtol=1e-6)


def test_a_config_names_them(params):
    config = default.get_config()
    config.loss, config.optimizer.name = "bce", "lion"
    configuration.check(config)
    assert build_recipe(config, 10).loss == "bce"
    optimizer = build_optimizer(config, build_schedule(config, 10))
    _, state = updates_of(optimizer, params)
    assert optax.tree.get(state, "nu") is None
    config.optimizer.name = "adamm"
    with pytest.raises(UserError, match=r"config.optimizer.name is 'adamm'; did you mean 'adamw'"):
        configuration.check(config)
    assert configuration.ADDED_KEYS["optimizer.name"] == default.get_config().optimizer.name
    assert configuration.ADDED_KEYS["loss"] == default.get_config().loss
