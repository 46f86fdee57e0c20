"""The block's kernels for TPUs, in Pallas' interpreter, and the network that uses them."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mambaout_jax
from mambaout_jax.models.mambaout import GatedCNNBlock, on_device
from mambaout_jax.ops import activations, gated_block_vmem
from mambaout_jax.ops.gated_block import dispatch, pallas_tpu, tpu, xla

# Odd sizes, batches that are padded, channels that fill no register, several parts of hidden ones.
SHAPES = {
    "small": (3, 5, 3, 48, 128, 256),
    "several blocks": (16, 9, 7, 96, 128, 256),
    "several columns": (2, 3, 1, 24, 384, 768),
}


def draw(images, height, width, channels, conv, hidden, dtype=jnp.float32):
    random = np.random.default_rng(0)

    def normal(*shape, scale=1.0, dtype=dtype):
        return jnp.asarray(random.standard_normal(shape) * scale, dtype)

    sizes = images, height, width
    maps = normal(*sizes, channels), normal(*sizes, conv), normal(*sizes, channels)
    kept = jnp.asarray(random.integers(0, 2, images) * 1.25, jnp.float32)
    bias = functools.partial(normal, dtype=jnp.float32)
    weights = (
        normal(channels, hidden, scale=channels**-0.5),
        bias(hidden),
        normal(channels, hidden, scale=channels**-0.5),
        bias(hidden),
        normal(channels, hidden, scale=hidden**-0.5),
        bias(channels),
    )
    return maps, kept, weights


def reference(x, conv, kept, weights):
    """Computes the block's result in float64, for GELU."""
    x, conv, kept, *weights = (jnp.asarray(a, jnp.float64) for a in (x, conv, kept, *weights))
    gate, gate_bias, value, value_bias, out, out_bias = weights
    centred = x - x.mean(-1, keepdims=True)
    normalised = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    gated = normalised @ gate + gate_bias.reshape(1, 1, 1, -1)
    active = gated * (1 + jax.lax.erf(gated / math.sqrt(2))) / 2
    values = normalised @ value + value_bias.reshape(1, 1, 1, -1)
    values = values.at[..., : conv.shape[-1]].add(conv)
    y = (active * values) @ out.T + out_bias.reshape(1, 1, 1, -1)
    return x + kept.reshape(-1, 1, 1, 1) * y


def assert_close(got, expected, error):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.linalg.norm(got - expected) <= error * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernels_agree_with_float64(shape, monkeypatch):
    if shape == SHAPES["several columns"]:
        monkeypatch.setattr(pallas_tpu, "_LOOPED", 0)
    (x, conv, dy), kept, weights = draw(*shape)

    @jax.jit
    def kernels(x, conv, dy, kept, weights):
        y = tpu.gated(x, conv, kept, *weights, act="gelu", interpret=True)
        return y, tpu.gated_gradient(x, conv, dy, kept, *weights, act="gelu", interpret=True)

    @jax.jit
    def formulas(x, conv, dy, kept, weights):
        y, pull = jax.vjp(lambda *args: reference(*args, kept, weights), x, conv)
        _, pull_weights = jax.vjp(lambda weights: reference(x, conv, kept, weights), weights)
        return y, (*pull(dy.astype(y.dtype)), *pull_weights(dy.astype(y.dtype))[0])

    y, gradients = kernels(x, conv, dy, kept, weights)
    with jax.enable_x64(True):
        expected, expected_gradients = formulas(x, conv, dy, kept, weights)
    assert_close(y, expected, 1e-5)  # GELU's error, which float32 does not hide
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(got, wanted, 3e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_convolutions_input(shape):
    (x, dy, dx), _, (kernel, bias, *_) = draw(*shape)
    kernel, bias = (array[..., : dy.shape[-1]] for array in (kernel, bias))
    y = tpu.norm_dense(x, kernel, bias, interpret=True)
    assert_close(y, xla.norm_dense(x, kernel, bias), 1e-6)
    got = tpu.norm_dense_gradient(x, dx, dy, kernel, bias, interpret=True)
    for a, b in zip(got, xla.norm_dense_gradient(x, dx, dy, kernel, bias), strict=True):
        assert_close(a, b, 2e-6)


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_bfloat16_is_as_close_as_the_plain_form(act):
    (x, conv, dy), kept, weights = draw(*SHAPES["small"], dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), (x, conv, kept, *weights))
    options = {"act": act, "interpret": True}
    y = jax.jit(functools.partial(tpu.gated, **options))(x, conv, kept, *weights)
    assert y.dtype == jnp.bfloat16
    assert_close(y, jax.jit(functools.partial(xla.gated, act=act))(*wide), 2.0**-8)
    gradient = jax.jit(functools.partial(tpu.gated_gradient, **options))
    got = gradient(x, conv, dy, kept, *weights)
    x, conv, kept, *weights = wide
    expected = jax.jit(functools.partial(xla.gated_gradient, act=act))(
        x, conv, dy.astype(jnp.float32), kept, *weights
    )
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 2.0**-7)


def test_gelu_for_bfloat16():
    x = np.linspace(-12, 12, 20001)
    erf = np.array([math.erf(value / math.sqrt(2)) for value in x])
    gelu = x * (1 + erf) / 2
    slope = (1 + erf) / 2 + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    got, derivative = activations.ACTIVATIONS_NEAR["gelu"](jnp.asarray(x, jnp.float32))
    assert np.abs(got - gelu).max() < 3e-5
    assert np.abs(derivative - slope).max() < 3e-5
    inside = x > -3
    assert (np.abs(got - gelu) <= 2.0**-13 * np.abs(gelu))[inside].all()  # bfloat16 rounds by 2^-9


def test_a_plain_batch_of_weights_is_ordered():
    """One hidden channel of each kind: norm, bias of the convolution and padding are folded in."""
    weights = dispatch.block_weights(
        (jnp.full(1, 2.0), jnp.full(1, 3.0)),
        (jnp.array([[1.0, 10.0, 100.0, 1000.0]]), jnp.arange(4.0)),
        (jnp.ones((1, 1, 1, 1)), jnp.full(1, 7.0)),
        (jnp.array([[5.0], [50.0]]), jnp.full(1, 9.0)),
    )
    kernel, bias = weights.conv_input
    assert (kernel[0, :2].tolist(), bias[:2].tolist()) == ([2000, 0], [3003, 0])
    gate, gate_bias, value, value_bias, out, out_bias = weights.gated
    assert (gate[0, :3].tolist(), gate_bias[:3].tolist()) == ([20, 2, 0], [31, 3, 0])
    assert (value[0, :3].tolist(), value_bias[:3].tolist()) == ([0, 200, 0], [7, 302, 0])
    assert (out[0, :3].tolist(), out_bias.tolist()) == ([50, 5, 0], [9])


BLOCKS = {
    "the paper's": {},
    "timm's": {"conv_ratio": 1.5, "act": "silu", "layer_scale": 0.5, "expansion_ratio": 3.0},
}


def block_and_data(images=16, **options):
    block = GatedCNNBlock(drop_path_rate=0.5, dtype=jnp.bfloat16, **options)
    random = np.random.default_rng(0)
    x, target = (jnp.asarray(a, jnp.float32) for a in random.standard_normal((2, images, 3, 4, 12)))
    params = jax.jit(block.init)(jax.random.key(0), x)["params"]
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * random.standard_normal(leaf.shape).astype(np.float32), params
    )
    return block, params, x, target


@functools.partial(jax.jit, static_argnums=0)
def gradients(block, params, x, target):
    def loss(params, x):
        x = x.astype(block.dtype)
        y = block.apply({"params": params}, x, True, rngs={"dropout": jax.random.key(1)})
        return (y.astype(jnp.float32) * target).sum()

    return jax.value_and_grad(loss, (0, 1))(params, x)


@pytest.mark.slow
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_a_fused_block_has_the_same_parameters_and_gradients(options):
    block, params, x, target = block_and_data(**options)
    fused = block.clone(fused_vmem=16)
    again = jax.jit(fused.init)(jax.random.key(0), x)["params"]
    first = jax.jit(block.init)(jax.random.key(0), x)["params"]
    jax.tree.map(np.testing.assert_array_equal, again, first)
    exact = gradients(block.clone(dtype=jnp.float32, fused_vmem=16), params, x, target)
    for got in (gradients(block, params, x, target), gradients(fused, params, x, target)):
        jax.tree.map(lambda a, b: assert_close(a, b, 2.0**-6), got, exact)


def test_float32_and_other_mixers_are_not_fused():
    block, params, x, _ = block_and_data(fused_vmem=16)
    for other in (block.clone(dtype=jnp.float32), block.clone(token_mixer="none")):
        plain, fused = (
            str(jax.make_jaxpr(model.apply)({"params": params}, x))
            for model in (other.clone(fused_vmem=0), other)
        )
        assert plain == fused
    assert str(jax.make_jaxpr(block.apply)({"params": params}, x)) != plain


def over_eight_devices(params, x, target):
    """Returns a function like `gradients`, and its arguments on a mesh."""
    assert jax.device_count() == 8
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    batch, whole = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(("data", "fsdp")), PartitionSpec())
    )

    def in_mesh(block, params, x, target):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gradients(block, params, x, target)

    step = jax.jit(
        in_mesh, static_argnums=0, in_shardings=(whole, batch, batch), out_shardings=whole
    )
    return step, [jax.device_put(a, s) for a, s in ((params, whole), (x, batch), (target, batch))]


def test_each_device_computes_its_part_of_the_batch():
    block, params, x, target = block_and_data(images=64, fused_vmem=16)
    step, on_mesh = over_eight_devices(params, x, target)
    expected = gradients(block, params, x, target)
    jax.tree.map(lambda a, b: assert_close(a, b, 2.0**-7), step(block, *on_mesh), expected)


@pytest.mark.parametrize("images", [1, 7])
def test_few_images_are_left_to_xla(images):
    block, params, x, target = block_and_data(images, fused_vmem=16)
    ours, theirs = (
        gradients.trace(model, params, x, target).lower(lowering_platforms=("tpu",)).as_text()
        for model in (block, block.clone(fused_vmem=0, depthwise="xla"))
    )
    assert ours == theirs
    assert "tpu_custom_call" not in ours


@pytest.mark.parametrize(("images", "kernels"), [(56, 0), (64, 7)])
def test_the_images_of_a_device_decide(images, kernels):
    block, params, x, target = block_and_data(images, fused_vmem=16)
    step, on_mesh = over_eight_devices(params, x, target)
    program = step.trace(block, *on_mesh).lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("tpu_custom_call") == kernels


def test_only_tpus_run_the_kernels():
    block, params, x, target = block_and_data(fused_vmem=16)
    traced = jax.jit(functools.partial(gradients, block)).trace(params, x, target)
    calls = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")
        for platform in ("tpu", "cpu")
    }
    assert calls == {"tpu": 2 + 1 + 2 + 2, "cpu": 0}  # block and convolution, forward and backward


def test_blocks_are_fused_where_the_vector_memory_suffices():
    model = mambaout_jax.create_model("mambaout_tiny", dtype=jnp.bfloat16)
    v4, v5e, gpu = (
        SimpleNamespace(platform=platform, device_kind=kind)
        for platform, kind in (("tpu", "TPU v4"), ("tpu", "TPU v5 lite"), ("gpu", "H100"))
    )
    assert [on_device(model, device).fused_vmem for device in (v4, v5e, gpu)] == [16, 128, 0]
    needed = [gated_block_vmem(width, int(width * 8 / 3)) / 2**20 for width in model.widths]
    assert [mib <= 16 for mib in needed] == [True, True, True, False]
    vit = mambaout_jax.create_model("vit_tiny_patch16_224")
    assert on_device(vit, v5e) is vit
