"""The training step: the reference's trajectory, accumulation, sharding, averages, clipping."""

import dataclasses
import functools
import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

import mambaout_jax
from configs import default
from mambaout_jax.errors import UserError
from mambaout_jax.inference.evaluate import compile_eval_step
from mambaout_jax.runtime.sharding import (
    check_batch,
    global_batch,
    make_mesh,
    parameter_spec,
    state_shardings,
)
from mambaout_jax.training.optimizer import decay_mask, make_optimizer
from mambaout_jax.training.state import init_params, init_state
from mambaout_jax.training.step import Recipe, compile_train_step, train_step, update_step

KEY_DATA = jax.random.key_data(jax.random.key(0))
RECIPE = Recipe(num_classes=10, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), label_smoothing=0.1)


def small_model(**options):
    small = {"depths": (1, 1, 2, 1), "widths": (8, 12, 16, 24), "num_classes": 10}
    options = {**small, "depthwise": "xla", **options}  # "xla" compiles fastest
    return mambaout_jax.create_model("test_mambaout", **options)


def batch_of(size, seed=0):
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (size, 32, 32, 3), np.uint8)
    return {"image": image, "label": random.integers(0, 10, size).astype(np.int32)}


def optimizer_of(rate=1e-3, **options):
    defaults = {"weight_decay": default.get_config().optimizer.weight_decay}
    return make_optimizer(optax.constant_schedule(rate), **(defaults | options))


def equal(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_equals_the_references_trajectory():
    meta = json.loads((golden.DIR / "trajectory-a.json").read_text())
    model = mambaout_jax.create_model(
        "mambaout_femto",
        depths=tuple(meta["model"]["depths"]),
        widths=tuple(meta["model"]["dims"]),
        num_classes=meta["num_classes"],
    )
    tensors = golden.weights(meta["state_dict"], meta["seed"])
    optimizer = optimizer_of(meta["optimizer"]["lr"])
    state = init_state(mambaout_jax.from_torch(tensors, model), optimizer, ema=False)
    step = jax.jit(functools.partial(update_step, model=model, optimizer=optimizer, recipe=RECIPE))
    losses = []
    with jax.default_matmul_precision("highest"):
        for i in range(meta["steps"]):
            labels = (7 * np.arange(meta["batch"]) + i) % meta["num_classes"]
            inputs = {
                "image": golden.images(5000 + meta["seed"] + i, meta["batch"], meta["size"]),
                "target": optax.smooth_labels(jax.nn.one_hot(labels, 10), meta["label_smoothing"]),
            }
            state, metrics = step(state, inputs, jax.random.key(0))
            losses.append(metrics["loss"])
    np.testing.assert_allclose(losses, meta["losses"], rtol=1e-4)
    final = mambaout_jax.to_torch(state.params, model, layout="original")
    norms = {name: np.linalg.norm(tensor) for name, tensor in final.items()}
    assert norms.keys() == meta["final_norms"].keys()
    for name, norm in meta["final_norms"].items():
        np.testing.assert_allclose(norms[name], norm, rtol=1e-3, err_msg=name)


def test_weight_decay_spares_biases_and_scales():
    params = golden.params(small_model())
    mask = flatten_dict(decay_mask(params), sep="/")
    assert {name.split("/")[-1] for name, decays in mask.items() if decays} == {"kernel"}
    assert all(decays for name, decays in mask.items() if name.endswith("kernel"))
    optimizer = optimizer_of(rate=0.1, weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    equal(updates, jax.tree.map(lambda p: -0.05 * p if p.ndim > 1 else 0 * p, params), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "factor"), [({"b1": 0.5}, 1.0), ({"b2": 0.9}, 1.0), ({"eps": 3.0}, 0.25)]
)
def test_adam_is_the_hand_formula(options, factor):
    options = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, **options}
    optimizer = optimizer_of(rate=0.1, weight_decay=0.0, **options)
    params, mean, square = jnp.array([1.0]), 0.0, 0.0
    state = optimizer.init(params)
    for t, grad in enumerate((1.0, -2.0, 0.5), start=1):
        updates, state = optimizer.update(jnp.array([grad]), state, params)
        mean = options["b1"] * mean + (1 - options["b1"]) * grad
        square = options["b2"] * square + (1 - options["b2"]) * grad**2
        corrected = mean / (1 - options["b1"] ** t)
        scale = np.sqrt(square / (1 - options["b2"] ** t)) + options["eps"]
        np.testing.assert_allclose(updates, [-0.1 * corrected / scale], rtol=1e-5)


def test_layer_decay_scales_the_rate_from_the_head_down():
    params = golden.params(small_model())
    grads = jax.tree.map(jnp.ones_like, params)
    updates = {}
    for decay in (1.0, 0.5):
        optimizer = optimizer_of(layer_decay=decay)
        updates[decay], _ = optimizer.update(grads, optimizer.init(params), params)
    factor = jax.tree.map(lambda a, b: float((a / b).mean()), updates[0.5], updates[1.0])
    np.testing.assert_allclose(factor["head"]["fc2"]["kernel"], 1)
    np.testing.assert_allclose(factor["stages_3"]["blocks_0"]["conv"]["kernel"], 0.5)
    np.testing.assert_allclose(factor["stages_2"]["blocks_0"]["fc1"]["bias"], 0.5**3)
    np.testing.assert_allclose(factor["stem"]["conv1"]["kernel"], 0.5**6)


def test_clipping_bounds_the_global_norm():
    grads = {"a": jnp.full((3, 3), 10.0), "b": jnp.full((2,), -10.0)}
    seen = {}
    for clip_norm in (0.0, 1.0, 1e9):
        optimizer = optimizer_of(clip_norm=clip_norm, eps=1.0, weight_decay=0.0)
        updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
        seen[clip_norm] = float(optax.tree.norm(updates))
    assert seen[1.0] < 0.5 * seen[0.0]
    np.testing.assert_allclose(seen[1e9], seen[0.0])


def test_accumulation_equals_the_whole_batch():
    model, optimizer, batch = small_model(), optimizer_of(), batch_of(16)
    state = init_state(golden.params(model), optimizer, ema=False)
    recipe = dataclasses.replace(RECIPE, mixup=0.8, cutmix=1.0, random_erasing=0.25)
    results = []
    for accumulate_steps in (1, 4):
        options = dataclasses.replace(recipe, accumulate_steps=accumulate_steps)
        step = jax.jit(
            functools.partial(train_step, model=model, optimizer=optimizer, recipe=options)
        )
        results.append(step(state, batch, jax.random.key(0)))
    (whole, expected), (split, metrics) = results
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-5)
    mean = lambda state: optax.tree.get(state.opt_state, "mu")  # noqa: E731
    equal(mean(split), mean(whole), rtol=1e-5, atol=1e-6 * float(expected["grad_norm"]))


def test_the_average_follows_the_parameters():
    model, optimizer, batch = small_model(), optimizer_of(rate=0.1), batch_of(8)
    before = init_state(golden.params(model), optimizer, ema=True)
    recipe = dataclasses.replace(RECIPE, ema_decay=0.75)
    step = functools.partial(train_step, model=model, optimizer=optimizer, recipe=recipe)
    after, _ = jax.jit(step)(before, batch, jax.random.key(0))
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, before.params, after.params)
    equal(after.ema_params, expected, rtol=1e-5, atol=1e-6)
    assert after.eval_params is after.ema_params


def test_every_parameter_gets_a_gradient():
    model = small_model(drop_path_rate=0.1)
    state = init_state(golden.params(model), optax.identity(), ema=False)
    step = functools.partial(train_step, model=model, optimizer=optax.identity(), recipe=RECIPE)
    after, _ = jax.jit(step)(state, batch_of(8), jax.random.key(0))
    grads = jax.tree.map(jnp.subtract, after.params, state.params)
    for name, grad in flatten_dict(grads, sep="/").items():
        assert np.isfinite(grad).all(), name
        assert np.abs(grad).max() > 0, name


@pytest.mark.parametrize(
    "fsdp", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 8]
)
def test_sharded_steps_equal_one_device(fsdp):
    """Twenty steps on eight devices, with drop path, erasing and mixing; traced once."""
    assert jax.device_count() == 8
    model = small_model(drop_path_rate=0.2, depths=(1, 1, 1, 1), widths=(16, 32, 64, 128))
    optimizer = optimizer_of(rate=1e-3)
    recipe = dataclasses.replace(RECIPE, mixup=0.8, cutmix=1.0, random_erasing=0.25)
    begin = lambda: init_state(golden.params(model), optimizer, ema=False)  # noqa: E731
    alone = begin()
    single = jax.jit(functools.partial(train_step, model=model, optimizer=optimizer, recipe=recipe))
    mesh = make_mesh(fsdp)
    shardings = state_shardings(jax.eval_shape(begin), mesh)
    state = jax.device_put(begin(), shardings)
    step = compile_train_step(model, optimizer, recipe, shardings, mesh)
    split = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)}
    assert split == {8}
    specs = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(state.params)}
    assert any("fsdp" in spec for spec in specs) == (fsdp > 1)
    for i in range(20):
        batch = batch_of(16, seed=i)
        alone, expected = single(alone, batch, jax.random.key(0))
        state, metrics = step(state, global_batch(batch, mesh), KEY_DATA)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    assert step._cache_size() == 1


def test_a_step_donates_its_state_and_evaluation_nothing():
    model, optimizer, mesh = small_model(), optimizer_of(), make_mesh()
    state = init_state(golden.params(model), optimizer, ema=False)
    shardings = state_shardings(state, mesh)
    state = jax.device_put(state, shardings)
    batch = global_batch({**batch_of(8), "mask": np.ones(8, bool)}, mesh)
    options = {"mean": RECIPE.mean, "std": RECIPE.std}
    compile_eval_step(model, shardings.params, mesh, **options)(state.params, batch)
    assert not state.params["head"]["fc2"]["kernel"].is_deleted()
    del batch["mask"]
    step = compile_train_step(model, optimizer, RECIPE, shardings, mesh)
    step(state, batch, KEY_DATA)
    assert state.params["head"]["fc2"]["kernel"].is_deleted()
    assert not batch["image"].is_deleted()


def test_no_step_gathers_activations():
    """The compiled step of a data-parallel mesh reduces gradients, and gathers nothing."""
    model, optimizer, mesh = small_model(), optimizer_of(), make_mesh()
    state = jax.eval_shape(lambda: init_state(golden.params(model), optimizer, ema=False))
    shardings = state_shardings(state, mesh)
    recipe = dataclasses.replace(RECIPE, mixup=0.8, cutmix=1.0, random_erasing=0.25)
    step = compile_train_step(model, optimizer, recipe, shardings, mesh)
    compiled = step.lower(state, batch_of(16), KEY_DATA).compile().as_text()
    assert "all-reduce" in compiled
    assert "all-gather" not in compiled


def test_split_parameters_are_gathered_whole_and_not_in_pieces():
    """Blocks slice the hidden axis at odd places: base has 1,365 hidden channels, this one 341."""
    model = small_model(widths=(16, 32, 64, 128), dtype=jnp.bfloat16, gradient_dtype=jnp.float32)
    optimizer, mesh = optimizer_of(), make_mesh(2)
    key = jax.random.key(0)
    params = jax.eval_shape(functools.partial(init_params, model=model, size=(32, 32)), key)
    state = jax.eval_shape(lambda: init_state(params, optimizer, ema=False))
    step = compile_train_step(model, optimizer, RECIPE, state_shardings(state, mesh), mesh)
    compiled = step.lower(state, batch_of(16), KEY_DATA).compile().as_text()
    assert "all-gather" in compiled
    assert "all-to-all" not in compiled
    assert "collective-permute" not in compiled


def test_tpu_kernels_run_on_each_devices_part_of_the_batch():
    model, optimizer, mesh = small_model(depthwise="pallas_tpu"), optimizer_of(), make_mesh(2)
    state = jax.eval_shape(lambda: init_state(golden.params(model), optimizer, ema=False))
    step = compile_train_step(model, optimizer, RECIPE, state_shardings(state, mesh), mesh)
    traced = step.trace(state, batch_of(16), KEY_DATA).jaxpr
    specs = [e.params["in_specs"] for e in traced.eqns if e.primitive.name == "shard_map"]
    assert specs
    assert all(spec[0] == P(("data", "fsdp")) for spec in specs)


def test_every_parameter_has_a_rule_and_an_unknown_one_none():
    for name in ("mambaout_femto", "mambaout_base_plus_rw"):
        model = mambaout_jax.create_model(name)
        params = jax.eval_shape(functools.partial(init_params, model=model, size=(32, 32)),
                                jax.random.key(0))  # fmt: skip
        state_shardings(params, make_mesh(2))
    with pytest.raises(ValueError, match="no sharding rule matches"):
        parameter_spec("blocks_0/attention/query", (8, 8), 2)


def test_bad_meshes_and_batches():
    with pytest.raises(UserError, match=r"mesh.fsdp 3 does not divide the 8 devices"):
        make_mesh(3)
    with pytest.raises(UserError, match=r"batch_size 12 does not divide over 8.*such as 8"):
        check_batch(12, 1, make_mesh(), "batch_size")
    with pytest.raises(UserError, match=r"2 accumulated parts: expected a multiple of 16"):
        check_batch(24, 2, make_mesh(), "batch_size")
