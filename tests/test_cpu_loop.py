"""A network on a CPU, a few images at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mambaout_jax
from mambaout_jax.ops import cpu_loop
from mambaout_jax.ops.cpu_loop import images_at_a_time


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr("mambaout_jax.ops.cpu_loop._cores", lambda: 2)


def network_and_inputs(batch=4):
    network = mambaout_jax.create_model("test_mambaout", num_classes=10)
    images = np.random.default_rng(0).standard_normal((batch, 64, 64, 3), np.float32)
    return network, network.init(jax.random.key(0), images), images


def lowered(function, *args, platform="cpu"):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("method", [None, "features", "pooled"])
def test_the_loop_computes_what_the_whole_batch_gives(two_cores, method):
    network, params, images = network_and_inputs()
    apply = functools.partial(network.apply, params, method=method)
    looped = jax.jit(apply)(images)
    alone = [apply(images[i : i + 1]) for i in range(len(images))]
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *alone)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), looped, whole)
    assert "while" in lowered(apply, images)


def test_only_programs_for_one_cpu_loop(two_cores):
    network, params, images = network_and_inputs()
    assert "while" in lowered(network.apply, params, images)
    assert "while" not in lowered(network.apply, params, images[:1])
    for platform in ("tpu", "cuda"):
        assert "while" not in lowered(
            network.clone(depthwise="xla").apply, params, images, platform=platform
        )
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    assert "while" not in lowered(network.apply, params, jax.device_put(images, split))
    train = functools.partial(network.apply, train=True, rngs={"dropout": jax.random.key(0)})
    assert "while" not in lowered(train, params, images)


def test_gradients_are_the_networks_own(two_cores):
    network, params, images = network_and_inputs()

    def loss(params, images, method):
        return (jnp.asarray(network.apply(params, images, method=method)[-1]) ** 2).sum()

    for argnums in (0, 1):
        gradient = jax.grad(loss, argnums)(params, images, "features")
        expected = jax.grad(loss, argnums)(params, images, "batch_maps")
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), gradient, expected)


def test_vmap(two_cores):
    network, params, images = network_and_inputs()
    pairs = images.reshape(2, 2, *images.shape[1:])
    logits = jax.vmap(functools.partial(network.apply, params))(pairs)
    np.testing.assert_allclose(logits.reshape(4, 10), network.apply(params, images), atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "cores", "count"),
    [(8, 1, 1), (8, 2, 2), (7, 2, 1), (8, 8, 8), (8, 64, 8), (9, 4, 3), (7, 4, 7), (64, 16, 16)],
)
def test_one_image_for_each_core(batch, cores, count):
    assert images_at_a_time(batch, cores) == count


def test_the_cores_are_counted():
    assert cpu_loop._cores() >= 1
