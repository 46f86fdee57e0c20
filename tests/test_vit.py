"""ViT: against timm, and against timm's blocks with masked attention; causality, counts."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import mambaout_jax
from mambaout_jax.__main__ import main
from mambaout_jax.build import build_model, build_run
from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.errors import UserError
from mambaout_jax.inference.export import export_program
from mambaout_jax.models.flops import attention_block_macs, count_layers, count_total
from mambaout_jax.models.vit import VITS
from mambaout_jax.runtime.sharding import BATCH, make_mesh, over_mesh, state_shardings
from mambaout_jax.training.optimizer import decay_mask
from mambaout_jax.weights.finetune import layer_scales
from mambaout_jax.weights.info import WeightsInfo

NAME = "vit_tiny_patch16_224"
SMALL = {"depth": 2, "width": 24, "heads": 3, "image_size": 64, "num_classes": 5}


def small(**options):
    model = mambaout_jax.create_model(NAME, **{**SMALL, **options})
    return model, golden.params(model)


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("vit_tiny_patch16_224", 5_717_416, 1.26e9),
        ("vit_small_patch16_224", 22_050_664, 4.61e9),
        ("vit_base_patch16_224", 86_567_656, 17.58e9),
    ],
)
def test_sizes_are_the_published_ones(name, params, macs):
    total = count_total(mambaout_jax.create_model(name), (224, 224, 3))
    assert total.params == params
    assert abs(total.macs / macs - 1) < 0.01


def test_a_block_counts_as_the_papers_equation():
    layers = count_layers(small()[0], (64, 64, 3))
    (block,) = (layer for layer in layers if layer.path == ("blocks_0",))
    assert block.macs - 2 * 5 * 17 * 24 == sum(attention_block_macs(24, 17))


def test_every_parameter_gets_a_gradient_and_causal_differs():
    outputs = []
    for attention in ("full", "causal"):
        model, params = small(attention=attention)
        images = golden.images(0, 2, 64)
        logits, gradients = jax.jit(
            jax.value_and_grad(
                lambda p, model=model, images=images: (
                    model.apply({"params": p}, images) * jnp.cos(jnp.arange(5.0))[None]
                ).sum()
            )
        )(params)
        outputs.append(logits)
        for path, leaf in jax.tree.leaves_with_path(gradients):
            assert bool(jnp.isfinite(leaf).all()), path
            assert float(jnp.abs(leaf).max()) > 0, path
    assert abs(outputs[0] - outputs[1]) > 1e-3


def test_bad_options():
    with pytest.raises(UserError, match="attention is 'half': expected 'full' or 'causal'"):
        small(attention="half")
    with pytest.raises(UserError, match="unknown option 'token_mixer' of vit_tiny"):
        small(token_mixer="none")
    with pytest.raises(UserError, match="multiple of 16 pixels: 60"):
        small(image_size=60)
    model, params = small()
    with pytest.raises(UserError, match=r"expected images of shape \[N, 64, 64, 3\]"):
        model.apply({"params": params}, golden.images(0, 1, 32))


def test_a_file_of_timms_is_read_and_takes_a_new_last_layer(tmp_path):
    params = golden.params(mambaout_jax.create_model(NAME, num_classes=4))
    file = tmp_path / "vit.safetensors"
    save_file(mambaout_jax.to_torch(params, mambaout_jax.create_model(NAME, num_classes=4)), file)
    found, info = mambaout_jax.read_weights(file)
    assert (info.model, info.num_classes) == (NAME, 4)
    assert (info.preprocessing.mean, info.preprocessing.crop_pct) == ((0.5, 0.5, 0.5), 0.9)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    _, finetuned = mambaout_jax.load_pretrained(file, num_classes=2)
    assert finetuned["head"]["kernel"].shape == (192, 2)
    with pytest.raises(UserError, match="has no pretrained weights"):
        mambaout_jax.read_weights(NAME)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_on_a_mesh(kind):
    model, params = small(depth=1)
    images = golden.images(0, 8, 64)
    expected = jax.jit(model.apply)({"params": params}, images)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    split = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        got = jax.jit(model.apply)({"params": params}, split)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["full", "causal"])
def test_sharded_gradients_are_equal(attention):
    mesh = make_mesh(2)
    model, params = small(depth=1, attention=attention)
    images = golden.images(0, 8, 64)

    def loss(params, images):
        return (model.apply({"params": params}, images) * jnp.cos(jnp.arange(5.0))[None]).sum()

    expected = jax.jit(jax.grad(loss))(params, images)
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


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["full", "causal"])
@pytest.mark.parametrize("name", VITS)
def test_logits_equal_timms(name, attention):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    theirs = timm.create_model(name).eval()
    shapes = [(key, list(value.shape)) for key, value in theirs.state_dict().items()]
    weights = golden.weights(sorted(shapes), 0)
    theirs.load_state_dict({key: torch.from_numpy(array) for key, array in weights.items()})
    images = golden.images(3, 2, 224)
    with torch.no_grad():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        expected = theirs(x) if attention == "full" else causal(torch, theirs, x)
    model = mambaout_jax.create_model(name, attention=attention)
    params = mambaout_jax.from_torch(weights, model)
    logits = jax.jit(model.apply)({"params": params}, images)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-4)
    for key, array in mambaout_jax.to_torch(params, model).items():
        np.testing.assert_array_equal(array, weights[key])


def causal(torch, model, x):
    """Timm's network with the class token last and a mask in its attention."""
    x = model._pos_embed(model.patch_embed(x))
    x = torch.cat((x[:, 1:], x[:, :1]), dim=1)
    mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
    for block in model.blocks:
        attention, y = block.attn, block.norm1(x)
        shape = (*y.shape[:2], 3, attention.num_heads, -1)
        q, k, v = attention.qkv(y).reshape(shape).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5 + mask
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(y.shape)
        x = x + attention.proj(y)
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[:, -1])


def test_a_config_names_a_vit_and_bad_combinations_are_sentences():
    vit = {"model.name": NAME, "model.depthwise": "auto"}
    keys = {**vit, "model.attention": "causal"}
    run = build_run(small_run.small_config(**keys))
    assert (run.model.attention, run.model.image_size) == ("causal", 32)
    shapes = jax.eval_shape(lambda key: run.initial_state(key).params, jax.random.key(0))
    assert shapes["pos_embed"].shape == (1, 5, 192)
    state_shardings(shapes, make_mesh(8))
    decay = decay_mask(shapes)
    assert not decay["pos_embed"]
    assert not decay["cls_token"]
    info = run.weights_info()
    assert info.create_model().attention == "causal"
    for bad, message in (
        (
            {**vit, "model.token_mixer": "none"},
            "config.model.token_mixer is 'none', an option of MambaOut",
        ),
        (
            {**vit, "model.depthwise": "xla"},
            "config.model.depthwise is 'xla', an option of MambaOut",
        ),
        ({"model.attention": "causal"}, "test_mambaout has no attention: expected one of vit_tiny"),
    ):
        with pytest.raises(UserError, match=message):
            build_model(small_run.small_config(**bad))


def test_layer_decay_counts_the_blocks():
    _, params = small()
    scales = layer_scales(params, 0.5)
    assert set(jax.tree.leaves(scales["head"])) == {1}
    assert set(jax.tree.leaves([scales["norm"], scales["blocks_1"]])) == {0.5}
    assert set(jax.tree.leaves(scales["blocks_0"])) == {0.25}
    stem = [scales[name] for name in ("patch_embed", "cls_token", "pos_embed")]
    assert set(jax.tree.leaves(stem)) == {0.125}


@pytest.mark.parametrize("attention", ["full", pytest.param("causal", marks=pytest.mark.slow)])
def test_an_exported_vit_takes_any_batch(attention):
    model, params = small(attention=attention)
    info = WeightsInfo(NAME, 5, Preprocessing(size=64))
    program = export_program(model, params, info, platforms=("cpu", "cuda", "tpu"))
    images = np.random.RandomState(0).randint(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    pixels = mambaout_jax.normalize(images, info.preprocessing.mean, info.preprocessing.std)
    logits = program.call(jax.tree.leaves(params), images)
    expected = model.apply({"params": params}, pixels)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_the_summary_counts_vits_and_mixers(capsys):
    assert main(["summary", NAME, "--size=64"]) == 0
    assert "64x64x3 in" in capsys.readouterr().out
    assert main(["summary", "test_mambaout", "--token-mixer=conv,conv,conv,conv_ssm"]) == 0
    assert "GatedCNNBlock" in capsys.readouterr().out
