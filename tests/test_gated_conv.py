"""The convolution and the gate in one operation, and the network that uses it."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mambaout_jax
from mambaout_jax.models.mambaout import GatedCNNBlock, on_device


def block_and_data(width=24, **options):
    block = GatedCNNBlock(drop_path_rate=0.5, **options)
    random = np.random.default_rng(0)
    x, target = (jnp.asarray(random.standard_normal((8, 5, 6, width)), jnp.float32) for _ in "xy")
    params = block.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * random.standard_normal(leaf.shape), jnp.float32), params
    )
    return block, params, x, target


def bfloat16_block_and_data(**options):
    """Returns a block whose inference is one operation, and one that takes several."""
    block, params, x, target = block_and_data(**options, dtype=jnp.bfloat16)
    return block.clone(fused_gpu=True), block, params, x.astype(jnp.bfloat16), target


def gradients(block, params, x, target):
    rngs = {"dropout": jax.random.key(1)}
    return loss_and_gradients(partial(block.apply, train=True, rngs=rngs), params, x, target)


def loss_and_gradients(apply, params, x, target):
    @jax.jit
    def both(params, x):
        def loss(params, x):
            return ((apply({"params": params}, x) - target).astype(jnp.float32) ** 2).sum()

        return jax.value_and_grad(loss, (0, 1))(params, x)

    return both(params, x)


def assert_close(found, expected, error):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(ours - theirs) <= error * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    "options",
    [{}, {"act": "silu", "layer_scale": 0.1}, {"width": 20, "kernel_size": 3}],
    ids=["gelu", "silu and layer scale", "padded channels"],
)
def test_a_block_is_the_same_with_it(options):
    block, params, x, target = block_and_data(**options)
    fused = block.clone(fused_gpu=True)
    shapes = jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, fused.init(jax.random.key(0), x)["params"]) == shapes
    expected = gradients(block, params, x, target)
    assert_close(gradients(fused, params, x, target), expected, 1e-6)
    # Each rounds in other places.
    rounded = gradients(fused.clone(dtype=jnp.bfloat16), params, x, target)
    assert_close(rounded, expected, 2e-2)


@pytest.mark.parametrize(
    "options",
    [{}, {"act": "silu", "layer_scale": 0.1}, {"width": 20, "kernel_size": 3}],
    ids=["gelu", "silu and layer scale", "padded channels"],
)
def test_inference_of_few_pixels_is_the_same_as_one_operation(options):
    small, block, params, x, target = bfloat16_block_and_data(**options)
    shapes = jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, small.init(jax.random.key(0), x)["params"]) == shapes
    found, expected = (jax.jit(each.apply)({"params": params}, x) for each in (small, block))
    assert found.dtype == expected.dtype
    assert_close(found, expected, 2**-8)  # of layer scale the rounding differs
    expected = loss_and_gradients(block.clone(dtype=jnp.float32).apply, params, x, target)
    assert_close(loss_and_gradients(small.apply, params, x, target), expected, 2e-2)


def test_which_blocks_are_one_operation():
    small, block, params, x, _ = bfloat16_block_and_data()

    def is_one(block, x=x, **options):
        rngs = {"dropout": jax.random.key(1)}
        jaxpr = jax.make_jaxpr(lambda x: block.apply({"params": params}, x, rngs=rngs, **options))
        return "small_block" in str(jaxpr(x))

    assert is_one(small)
    assert not is_one(small, train=True)
    assert not is_one(block)
    assert not is_one(small.clone(dtype=jnp.float32))
    assert not is_one(small, jnp.zeros((1000, 56, 56, 24), jnp.bfloat16))
    one_image = x[:1]
    mapped = jax.vmap(lambda x: small.apply({"params": params}, x[None])[0])
    np.testing.assert_array_equal(mapped(one_image), small.apply({"params": params}, one_image))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_inference_of_few_pixels_on_a_mesh(kind):
    block, _, params, x, target = bfloat16_block_and_data()
    block = block.clone(gradient_dtype=jnp.bfloat16)
    expected = loss_and_gradients(block.apply, params, x, target)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
    x, target = jax.device_put((x, target), NamedSharding(mesh, PartitionSpec("batch")))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    assert_close(loss_and_gradients(block.apply, params, x, target), expected, 2e-2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_on_a_mesh(kind):
    block, params, x, target = block_and_data(fused_gpu=True)
    expected = gradients(block, params, x, target)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
    x, target = jax.device_put((x, target), NamedSharding(mesh, PartitionSpec("batch")))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    assert_close(gradients(block, params, x, target), expected, 1e-5)


def test_gradients_are_summed_over_devices_in_the_type_that_is_asked_for():
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    for dtype in ("float32", "bfloat16"):
        block, params, x, target = block_and_data(
            fused_gpu=True, dtype=jnp.bfloat16, gradient_dtype=jnp.dtype(dtype)
        )

        def loss(params, x, block=block, target=target):
            return ((block.apply({"params": params}, x) - target) ** 2).sum()

        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
        text = jax.jit(jax.grad(loss)).trace(params, x).lower().as_text()
        sums = [line for line in text.splitlines() if "}) : (tensor<7x7x1x24x" in line]
        assert sums
        assert all(f"tensor<7x7x1x24x{'f32' if dtype == 'float32' else 'bf16'}>" in s for s in sums)


def test_gpus_take_it():
    model = mambaout_jax.create_model("mambaout_tiny")
    gpu, cpu = (SimpleNamespace(platform=name, device_kind=name) for name in ("gpu", "cpu"))
    assert on_device(model, gpu).fused_gpu
    assert not on_device(model, cpu).fused_gpu
    assert not on_device(model.clone(depthwise="xla"), gpu).fused_gpu


def test_other_mixers_do_without_it():
    block, params, x, target = block_and_data(token_mixer="none", fused_gpu=True)
    expected = gradients(block.clone(fused_gpu=False), params, x, target)
    assert_close(gradients(block, params, x, target), expected, 0)
