"""Token mixers: what each computes, parameters, gradients, sharding, counts, runs and export."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from etils import epath
from jax.sharding import NamedSharding

import mambaout_jax
from mambaout_jax.build import build_run
from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.errors import UserError
from mambaout_jax.inference.export import export_program
from mambaout_jax.models.flops import count_layers
from mambaout_jax.models.mambaout import GatedCNNBlock
from mambaout_jax.models.mixers import TOKEN_MIXERS, stage_mixers
from mambaout_jax.models.ssm import SSM, STATE
from mambaout_jax.ops import activate, selective_scan
from mambaout_jax.runtime.sharding import BATCH, make_mesh, over_mesh, state_shardings
from mambaout_jax.training.optimizer import decay_mask
from mambaout_jax.weights.info import WeightsInfo
from mambaout_jax.weights.load import read_weights

SMALL = {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "num_classes": 5, "depthwise": "xla"}


def model_of(token_mixer, **options):
    return mambaout_jax.create_model(
        "test_mambaout", **{**SMALL, "token_mixer": token_mixer, **options}
    )


@functools.cache
def params_of(token_mixer):
    """Parameters from numpy, which compile nothing, near those of a new network."""
    images = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(model_of(token_mixer).init, jax.random.key(0), images)["params"]
    random = np.random.RandomState(0)

    def draw(path, leaf):
        name, noise = path[-1].key, np.float32(0.1 * random.standard_normal(leaf.shape))
        if name == "kernel":
            return noise * np.float32(30 / max(leaf.shape[-2], 9)) ** 0.5
        if name == "a_log":
            return np.log(np.arange(1, STATE + 1, dtype=np.float32))[None] + noise
        if name == "bias":
            return noise - np.float32(3 if path[-2].key == "dt_proj" else 0)
        return noise + 1

    return jax.tree.map_with_path(draw, shapes)


def names(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree.leaves_with_path(tree)}  # fmt: skip


def test_a_block_is_its_equation():
    block = GatedCNNBlock(act="silu", depthwise="xla", token_mixer="conv_ssm_bidirectional")
    x = golden.images(0, 2, [3, 4])[..., [0, 1, 2, 0] * 5]
    params = block.init(jax.random.key(1), x)["params"]
    y, found = block.apply({"params": params}, x, capture_intermediates=True)
    outputs = found["intermediates"]
    z = activate("silu", outputs["conv"]["__call__"][0]).reshape(2, 12, 20)

    def state_space(p, z):
        low = z @ p["x_proj"]["kernel"]
        delta, b, c = low[..., :2], low[..., 2 : 2 + STATE], low[..., 2 + STATE :]
        step = delta @ p["dt_proj"]["kernel"] + p["dt_proj"]["bias"][None, None]
        a = -jnp.exp(p["a_log"])
        return selective_scan(z, jax.nn.softplus(step), a, b, c, p["d"], implementation="scan")

    forward = state_space(params["ssm"], z)
    backward = state_space(params["ssm_reverse"], z[:, ::-1])[:, ::-1]
    for name, expected in (("ssm", forward), ("ssm_reverse", backward)):
        ours = outputs[name]["__call__"][0].reshape(expected.shape)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)
    gate, identity, _ = outputs["fc1"]["__call__"][0]
    mean = ((forward + backward) / 2).reshape(2, 3, 4, 20)
    value = activate("silu", gate) * jnp.concatenate((identity, mean), -1)
    kernel, padding = params["fc2"]["kernel"], gate.shape[-1] - params["fc2"]["kernel"].shape[0]
    assert padding == 0 or not bool(identity[..., -padding:].any())
    kept = np.r_[: identity.shape[-1] - padding, identity.shape[-1] : value.shape[-1]]
    expected = x + value[..., kept] @ kernel + params["fc2"]["bias"].reshape(1, 1, 1, -1)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


def test_an_ssm_starts_as_mambas():
    ssm = SSM(rank=4)
    params = ssm.init(jax.random.key(0), jnp.zeros((1, 2, 2, 256)))["params"]
    shapes = {name: leaf.shape for name, leaf in names(params).items()}
    assert shapes == {
        "x_proj/kernel": (256, 4 + 2 * STATE),
        "dt_proj/kernel": (4, 256),
        "dt_proj/bias": (256,),
        "a_log": (256, STATE),
        "d": (256,),
    }
    np.testing.assert_allclose(np.exp(params["a_log"][7]), np.arange(1, 17), rtol=1e-6)
    steps = jax.nn.softplus(params["dt_proj"]["bias"])
    assert 0.99e-3 < float(steps.min()) < 2e-3
    assert 0.05 < float(steps.max()) < 0.101
    assert 0.4 < float(jnp.abs(params["dt_proj"]["kernel"]).max()) <= 0.5


def test_a_token_sees_those_before_it_in_raster_order():
    x = golden.images(0, 1, [3, 4])
    for reverse, seen in ((False, np.arange(12) <= 6), (True, np.arange(12) >= 6)):
        ssm = SSM(rank=1, reverse=reverse)
        params = ssm.init(jax.random.key(0), x)

        def token(x, ssm=ssm, params=params):
            return ssm.apply(params, x).reshape(12, 3)[6].sum()

        reached = np.abs(jax.grad(token)(x)).sum(-1).reshape(12) > 0
        np.testing.assert_array_equal(reached, seen)


def test_conv_keeps_its_parameters_and_the_others_add_or_remove():
    conv, ssm = names(params_of("conv")), names(params_of("conv_ssm"))
    bidirectional, none = names(params_of("conv_ssm_bidirectional")), names(params_of("none"))
    leaves = ("x_proj/kernel", "dt_proj/kernel", "dt_proj/bias", "a_log", "d")
    blocks = [f"stages_{stage}/blocks_0" for stage in range(4)]
    added = {f"{block}/ssm/{leaf}" for block in blocks for leaf in leaves}
    assert set(ssm) - set(conv) == added
    reverse = {name.replace("/ssm/", "/ssm_reverse/") for name in added}
    assert set(bidirectional) == set(ssm) | reverse
    removed = {f"{block}/conv/{leaf}" for block in blocks for leaf in ("kernel", "bias")}
    assert set(conv) - set(none) == removed
    decay = names(decay_mask(params_of("conv_ssm")))
    assert {name for name in added if decay[name]} == {n for n in added if n.endswith("kernel")}


@pytest.mark.parametrize(
    "token_mixer",
    [
        "conv,none,conv_ssm,conv_ssm_bidirectional",
        *(pytest.param(name, marks=pytest.mark.slow) for name in TOKEN_MIXERS),
    ],
)
def test_every_parameter_gets_a_gradient_and_sharded_steps_are_equal(token_mixer):
    assert jax.device_count() == 8
    mesh, model = make_mesh(2), model_of(token_mixer)
    # At 64 pixels the last stage has four tokens; one alone does not depend on a_log.
    params, images = params_of(token_mixer), golden.images(1, 8, 64)

    def loss(params, images):
        logits = model.apply({"params": params}, images)
        return (logits * jnp.cos(jnp.arange(5.0))[None]).sum() + (logits**2).sum()

    expected = jax.jit(jax.grad(loss))(params, images)
    for name, leaf in names(expected).items():
        assert bool(jnp.isfinite(leaf).all()), name
        assert float(jnp.abs(leaf).max()) > 0, name
    shardings = state_shardings(params, mesh)
    batch = NamedSharding(mesh, BATCH)
    step = jax.jit(
        over_mesh(jax.grad(loss), mesh), in_shardings=(shardings, batch), out_shardings=shardings
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max())),
        step(params, images),
        expected,
    )


@pytest.mark.parametrize("kernel_size", [3, 5, 9, 13])
def test_kernel_sizes(kernel_size):
    model = model_of("conv", kernel_size=kernel_size)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    kernel = shapes["stages_1"]["blocks_0"]["conv"]["kernel"]
    assert kernel.shape == (kernel_size, kernel_size, 1, 8)


def test_bfloat16_is_close_to_float32():
    images, params = golden.images(0, 2, 64), params_of("conv_ssm")
    exact, rounded = (
        jax.jit(model_of("conv_ssm", dtype=dtype).apply)({"params": params}, images)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert float(jnp.abs(exact - rounded).max()) < 0.03 * float(jnp.abs(exact).max())


def test_counts():
    def block(mixer):
        model = model_of(mixer)
        return {"/".join(layer.path): layer for layer in count_layers(model, (64, 64, 3))}

    conv, ssm, none = block("conv"), block("conv,conv,conv,conv_ssm"), block("none")
    tokens, channels, rank = 4, 16, 1
    macs = tokens * channels * (rank + 2 * STATE + rank + 4 * STATE + 2)
    params = channels * (rank + 2 * STATE + rank + 1 + STATE + 1)
    layer = ssm["stages_3/blocks_0/ssm"]
    assert (layer.shape, layer.params, layer.macs) == ((2, 2, 16), params, macs)
    assert ssm[""].macs - conv[""].macs == macs
    assert ssm[""].params - conv[""].params == params
    mixers = [layer for name, layer in conv.items() if name.endswith("/conv") and "blocks" in name]
    assert conv[""].macs - none[""].macs == sum(layer.macs for layer in mixers)


def test_bad_mixers():
    with pytest.raises(UserError, match=r"unknown token_mixer 'conv_smm'; did you mean 'conv_ssm'"):
        model_of("conv_smm")
    with pytest.raises(UserError, match="has 2 names: expected one, or one for each of the 4"):
        model_of("conv,none")
    with pytest.raises(UserError, match="kernel_size is 8: expected one of 3, 5, 7, 9, 11, 13"):
        model_of("conv", kernel_size=8)
    assert stage_mixers("none, conv", 2) == ("none", "conv")
    with pytest.raises(UserError, match="PyTorch's MambaOut has no token_mixer 'conv_ssm'"):
        mambaout_jax.to_torch(params_of("conv_ssm"), model_of("conv_ssm"))


KEYS = {"model.token_mixer": "conv,conv,none,conv_ssm", "model.kernel_size": 3}


def test_a_checkpoint_describes_its_mixer_and_kernel():
    run = build_run(small_run.small_config(**KEYS))
    info = WeightsInfo.from_json(run.weights_info().to_json())
    assert info.overrides == {"token_mixer": "conv,conv,none,conv_ssm", "kernel_size": 3}
    model = info.create_model()
    assert (model.token_mixer, model.kernel_size) == ("conv,conv,none,conv_ssm", 3)
    assert build_run(small_run.small_config()).weights_info().overrides == {}


@pytest.mark.slow
def test_a_run_keeps_its_mixer_and_kernel(tmp_path):
    config = small_run.small_config(**KEYS, **{"schedule.duration": "2 epochs"})
    small_run.train(config, tmp_path)
    params, info = read_weights(epath.Path(tmp_path))
    model = info.create_model()
    assert (model.token_mixer, model.kernel_size) == ("conv,conv,none,conv_ssm", 3)
    assert model.apply({"params": params}, golden.images(0, 1, 32)).shape == (1, 10)
    assert WeightsInfo.from_json(info.to_json()) == info


@pytest.mark.slow
@pytest.mark.parametrize("token_mixer", TOKEN_MIXERS)
def test_an_exported_program_takes_any_batch(token_mixer):
    model, params = model_of(token_mixer), params_of(token_mixer)
    info = WeightsInfo("test_mambaout", 5, Preprocessing(size=160))
    program = export_program(model, params, info, platforms=("cpu", "cuda", "tpu"))
    assert program.platforms == ("cpu", "cuda", "tpu")
    images = np.random.RandomState(0).randint(0, 256, (2, 160, 160, 3)).astype(np.uint8)
    pixels = mambaout_jax.normalize(images, info.preprocessing.mean, info.preprocessing.std)
    expected = jax.jit(model.apply)({"params": params}, pixels)
    logits = program.call(jax.tree.leaves(params), images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
