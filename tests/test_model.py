"""The network against outputs recorded from the references, and all variants."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mambaout_jax
from mambaout_jax.errors import UserError
from mambaout_jax.models.mambaout import GatedCNNBlock
from mambaout_jax.models.variants import VARIANTS

PARAMS = {
    "mambaout_femto": 7_304_536,
    "mambaout_kobe": 9_141_208,
    "mambaout_tiny": 26_545_096,
    "mambaout_small": 48_488_072,
    "mambaout_base": 84_813_092,
    "mambaout_small_rw": 48_495_560,
    "mambaout_base_short_rw": 88_827_688,
    "mambaout_base_tall_rw": 86_481_448,
    "mambaout_base_wide_rw": 94_448_104,
    "mambaout_base_plus_rw": 101_656_552,
    "test_mambaout": 447_560,
}


def shapes(model, size=(32, 32)):
    images = jnp.zeros((1, *size, 3))
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def tiny_model(size=(32, 32), **options):
    small = {"depths": (1, 1, 2, 1), "widths": (8, 12, 16, 24), "num_classes": 10}
    options = {**small, "depthwise": "xla", **options}  # "xla" compiles fastest
    model = mambaout_jax.create_model("test_mambaout", **options)
    images = np.random.default_rng(1).standard_normal((2, *size, 3)).astype(np.float32)
    return model, {"params": golden.params(model)}, images


def answer(model, params, images, **options):
    """Returns the model's answer, compiled: much sooner than one operation at a time."""
    return jax.jit(functools.partial(model.apply, **options))(params, images)


def test_every_variant_is_pinned():
    assert set(mambaout_jax.list_models()) == set(PARAMS) == set(VARIANTS)


@pytest.mark.parametrize("name", PARAMS)
def test_parameter_count(name):
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes(mambaout_jax.create_model(name))))
    assert count == PARAMS[name] == VARIANTS[name].params


@pytest.mark.parametrize("case", golden.CASES + golden.OPTION_CASES)
def test_outputs_equal_the_reference(case):
    meta, answers = golden.load(case)
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in meta.get("overrides", {}).items()
    }
    # Some cases run what a user gets on this platform; "xla" compiles fastest.
    depthwise = "xla" if "original" in case else "auto"
    model = mambaout_jax.create_model(
        meta["variant"], num_classes=meta.get("num_classes"), depthwise=depthwise, **options
    )
    params = mambaout_jax.from_torch(golden.weights(meta["state_dict"], meta["seed"]), model)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == meta["params"]
    images = golden.images(meta["image_seed"], meta["batch"], meta["size"])
    labels = answers["labels"].astype(np.int32)

    @jax.jit
    def recorded(params):
        def loss(params):
            maps = model.apply({"params": params}, images, method="features")
            logits = model.apply({"params": params}, maps[-1], method=lambda net, x: net.head(x))
            chosen = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
            return -chosen.mean(), (logits, maps)

        (value, (logits, maps)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return logits, value, grads, maps

    with jax.default_matmul_precision("highest"):
        logits, loss, grads, maps = recorded(params)
    np.testing.assert_allclose(logits, answers["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, answers["loss"], rtol=1e-5)
    for i, features in enumerate(maps):
        mean, std = answers[f"stage{i}/mean_std"]
        assert features.shape == tuple(answers[f"stage{i}/shape"])
        corner = np.asarray(features)[:, :2, :2, :8]
        np.testing.assert_allclose(corner, answers[f"stage{i}/corner"], rtol=0, atol=1e-4 * std)
        np.testing.assert_allclose(np.mean(features), mean, rtol=0, atol=1e-4 * std)
        np.testing.assert_allclose(np.std(features), std, rtol=1e-4)
    layout = "original" if "original" in case else "timm"
    back = mambaout_jax.to_torch(grads, model, layout=layout)
    norms = [np.linalg.norm(back[name]) for name, _ in meta["state_dict"]]
    np.testing.assert_allclose(norms, answers["grad_norms"], rtol=1e-3)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 95), (101, 32)])
def test_any_size(size):
    model, params, images = tiny_model(size=size)
    height, width = size
    maps = answer(model, params, images, method="features")
    strides = (4, 8, 16, 32)
    assert [m.shape[1:3] for m in maps] == [(-(-height // s), -(-width // s)) for s in strides]
    assert np.isfinite(answer(model, params, images)).all()


def test_too_small_images_are_refused():
    with pytest.raises(UserError, match="at least 32 pixels"):
        shapes(mambaout_jax.create_model("test_mambaout"), (31, 64))


def test_unknown_names_are_errors_that_list_the_known_ones():
    with pytest.raises(UserError, match="did you mean 'mambaout_tiny'"):
        mambaout_jax.create_model("mambaout_tinny")
    with pytest.raises(UserError, match="unknown option 'head_dropout' of mambaout_tiny") as error:
        mambaout_jax.create_model("mambaout_tiny", head_dropout=0.1)
    assert "did you mean 'head_dropout_rate'?" in str(error.value)
    known = str(error.value).partition("known: ")[2].rstrip(")").split(", ")
    assert known == sorted(known)
    assert {"act", "conv_ratio", "depthwise", "remat"} < set(known)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pooled_is_what_the_head_starts_from(dtype):
    model, params, images = tiny_model(size=(64, 95), dtype=dtype)
    pooled = model.apply(params, images, method="pooled")
    assert pooled.shape == (2, 24)
    assert pooled.dtype == jnp.float32
    last = np.asarray(model.apply(params, images, method="features")[-1], np.float64)
    np.testing.assert_allclose(pooled, last.mean((1, 2)), rtol=1e-5, atol=1e-6)
    logits = model.apply(params, pooled[:, None, None], method=lambda net, x: net.head(x))
    np.testing.assert_array_equal(logits, model.apply(params, images))
    headless, params, _ = tiny_model(size=(64, 95), dtype=dtype, num_classes=0)
    assert headless.apply(params, images, method="pooled").shape == (2, 24)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    model, params, images = tiny_model(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = model.apply(params, images)
    assert logits.dtype == jnp.float32
    maps = jax.eval_shape(functools.partial(model.apply, method="features"), params, images)
    assert maps[-1].dtype == jnp.bfloat16
    exact = dataclasses.replace(model, dtype=jnp.float32).apply(params, images)
    assert 0 < jnp.abs(logits - exact).max() < 0.05 * jnp.abs(exact).max()


def test_drop_path_rises_linearly_over_all_blocks():
    model = mambaout_jax.create_model("test_mambaout", drop_path_rate=0.4).bind({})
    rates = [block.drop_path_rate for stage in model.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.4, len(rates)))


def test_drop_path_keeps_or_drops_whole_samples():
    block = GatedCNNBlock(drop_path_rate=0.25)
    x = jax.random.normal(jax.random.key(1), (400, 3, 3, 4))
    params = jax.jit(block.init)(jax.random.key(0), x)
    branch = answer(block, params, x) - x
    dropped = answer(block, params, x, train=True, rngs={"dropout": jax.random.key(2)}) - x
    kept = np.abs(dropped).max(axis=(1, 2, 3)) > 0
    np.testing.assert_allclose(dropped[kept], branch[kept] / 0.75, rtol=1e-4, atol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.07


def test_head_dropout_acts_in_training_alone():
    model, params, images = tiny_model(head_dropout_rate=0.5)
    train = answer(model, params, images, train=True, rngs={"dropout": jax.random.key(2)})
    assert jnp.abs(train - answer(model, params, images)).max() > 0


def test_remat_recomputes_and_changes_nothing():
    plain, params, images = tiny_model()

    def gradient(model):
        return jax.jit(jax.grad(lambda params: model.apply(params, images, True).sum()))

    remat = dataclasses.replace(plain, remat=True)
    assert "remat" in str(jax.make_jaxpr(gradient(remat))(params))
    assert "remat" not in str(jax.make_jaxpr(gradient(plain))(params))
    expected, got = gradient(plain)(params), gradient(remat)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), expected, got)


def test_no_head():
    model, params, images = tiny_model(num_classes=0, size=(64, 64))
    assert "head" not in params["params"]
    assert answer(model, params, images).shape == (2, 2, 2, 24)


def test_initialisation_is_the_references():
    model, _, images = tiny_model(widths=(8, 12, 16, 64), num_classes=100)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    assert abs(params["head"]["fc2"]["kernel"].std() - 0.02) < 4e-4
    assert abs(params["stages_3"]["blocks_0"]["conv"]["kernel"].std() - 0.02) < 1e-3
    assert not params["head"]["fc2"]["bias"].any()
    np.testing.assert_array_equal(params["head"]["norm1"]["scale"], 1)
    np.testing.assert_array_equal(params["stages_0"]["blocks_0"]["layer_scale"], np.float32(1e-5))
