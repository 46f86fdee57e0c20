"""UperNet: published sizes, parity with transformers, BatchNorm, mmsegmentation's names."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import mambaout_jax
from mambaout_jax.errors import UserError
from mambaout_jax.models.flops import count_layers, count_total
from mambaout_jax.models.layers import LayerNorm
from mambaout_jax.models.upernet import (
    STATISTICS,
    AuxiliaryHead,
    DecodeHead,
    adaptive_avg_pool,
    resize,
)
from mambaout_jax.runtime.sharding import make_mesh, state_shardings
from mambaout_jax.training.optimizer import decay_mask

NAME = "upernet_test_mambaout"
WIDTHS = (16, 32, 48, 64)
# Sizes that no pyramid divides, the last smaller than the largest pooling.
SIZES = ((19, 27), (10, 14), (5, 7), (3, 4))


def small(**options):
    model = mambaout_jax.create_model(NAME, **{"num_classes": 7, "channels": 24, **options})
    return model, positive(golden.params(model))


def positive(params):
    """The golden formula's variances are about 1: their absolute values are variances."""
    flat = flatten_dict(params)
    return unflatten_dict({k: np.abs(x) if k[-1] == "var" else x for k, x in flat.items()})


def random_maps(batch=2):
    return [
        np.random.RandomState(i).standard_normal((batch, *size, width)).astype(np.float32)
        for i, (size, width) in enumerate(zip(SIZES, WIDTHS, strict=True))
    ]


@pytest.mark.parametrize(
    ("variant", "millions", "giga"),
    [
        ("tiny", 54, 938),
        pytest.param("small", 76, 1032, marks=pytest.mark.slow),
        pytest.param("base", 112, 1178, marks=pytest.mark.slow),
    ],
)
def test_sizes_are_the_published_ones(variant, millions, giga):
    model = mambaout_jax.create_model(f"upernet_mambaout_{variant}", depthwise="xla")
    total = count_total(model, (512, 2048, 3))
    assert round(total.params / 1e6) == millions
    assert round(total.macs / 1e9) == giga


def test_the_auxiliary_head_counts_parameters_alone():
    model, params = small(depthwise="xla")
    layers = {layer.path: layer for layer in count_layers(model, (64, 96, 3))}
    head = layers["auxiliary_head",]
    assert head.macs == 0
    assert head.params == 9 * 48 * 12 + 2 * 12 + 12 * 7 + 7
    assert layers["backbone",].macs > 0
    trained = {k: x for k, x in flatten_dict(params).items() if k[-1] not in STATISTICS}
    assert layers[()].params == sum(x.size for x in trained.values())


@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_logits_have_a_quarter_of_the_image_size(size):
    model, params = small()
    logits = jax.eval_shape(model.apply, {"params": params}, jnp.zeros((2, *size, 3)))
    assert logits.shape == (2, -(-size[0] // 4), -(-size[1] // 4), 7)
    assert logits.dtype == jnp.float32


def test_bad_options():
    with pytest.raises(UserError, match="num_classes=0: a segmentation network needs classes"):
        mambaout_jax.create_model(NAME, num_classes=0)
    with pytest.raises(UserError, match="unknown model 'mambaout_tny'"):
        mambaout_jax.create_model("upernet_mambaout_tny")
    with pytest.raises(UserError, match="unknown option 'chanels'"):
        mambaout_jax.create_model(NAME, chanels=3)
    with pytest.raises(UserError, match="unknown option 'channels' of test_mambaout"):
        mambaout_jax.create_model("test_mambaout", channels=3)


@pytest.mark.slow
def test_every_parameter_but_the_statistics_gets_a_gradient():
    model, params = small()
    images = golden.images(0, 2, [64, 96])

    @jax.jit
    @jax.grad
    def gradients(params):
        outputs, _ = model.apply({"params": params}, images, True, mutable=["batch_stats"])
        return sum((x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum() for x in outputs)

    for path, leaf in flatten_dict(gradients(params)).items():
        assert np.isfinite(leaf).all(), path
        assert (np.abs(leaf).max() > 0) == (path[-1] not in STATISTICS), path


def test_no_decay_on_norms_and_a_rule_for_each_parameter():
    _, params = small()
    decays = flatten_dict(decay_mask(params))
    assert {path[-1] for path, decayed in decays.items() if decayed} == {"kernel"}
    state_shardings(params, make_mesh(8))


@pytest.mark.slow
def test_statistics_are_those_of_the_whole_batch_over_devices():
    model, params = small()
    images = golden.images(0, 8, 32)

    def apply(params, images):
        return model.apply({"params": params}, images, True, mutable=["batch_stats"])

    outputs, new = jax.jit(apply)(params, images)
    split = NamedSharding(make_mesh(), PartitionSpec(("data", "fsdp")))
    on_devices = jax.jit(apply)(params, jax.device_put(images, split))
    for x, y in zip(jax.tree.leaves((outputs, new)), jax.tree.leaves(on_devices), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * np.abs(x).max())
    names = {k for k in flatten_dict(params) if k[-1] in STATISTICS}
    assert set(flatten_dict(new["batch_stats"])) == names


@pytest.mark.parametrize("layout", [pytest.param("timm", marks=pytest.mark.slow), "original"])
def test_a_file_with_mmsegmentations_names_is_read_and_written(tmp_path, layout):
    name = "upernet_mambaout_femto"
    model = mambaout_jax.create_model(name, num_classes=4)
    rng = np.random.RandomState(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    params = jax.tree.map(lambda x: rng.random_sample(x.shape).astype(np.float32), shapes)
    tensors = mambaout_jax.to_torch(params, name, layout)
    for key, shape in {
        "decode_head.psp_modules.3.1.conv.weight": (512, 288, 1, 1),
        "decode_head.psp_modules.0.1.bn.running_var": (512,),
        "decode_head.lateral_convs.2.conv.weight": (512, 192, 1, 1),
        "decode_head.fpn_convs.0.bn.weight": (512,),
        "decode_head.bottleneck.conv.weight": (512, 288 + 4 * 512, 3, 3),
        "decode_head.fpn_bottleneck.conv.weight": (512, 2048, 3, 3),
        "decode_head.conv_seg.bias": (4,),
        "auxiliary_head.convs.0.conv.weight": (256, 192, 3, 3),
        "auxiliary_head.conv_seg.weight": (4, 256, 1, 1),
        "backbone.norm3.weight": (288,),
        {"timm": "backbone.stem.", "original": "backbone.downsample_layers.0."}[layout]
        + "conv1.weight": (24, 3, 3, 3),
    }.items():
        assert tensors[key].shape == shape
    tensors["decode_head.bottleneck.bn.num_batches_tracked"] = np.asarray(3)
    save_file(tensors, tmp_path / "seg.safetensors")
    found, info = mambaout_jax.read_weights(tmp_path / "seg.safetensors")
    assert (info.model, info.num_classes) == (name, 4)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    del tensors["auxiliary_head.conv_seg.bias"]
    with pytest.raises(UserError, match=r"auxiliary_head.conv_seg.bias is missing"):
        mambaout_jax.from_torch(tensors, name, num_classes=4)


def theirs(torch, channels=24, widths=WIDTHS, classes=7):
    """Transformers' two heads, with random weights, and the same in mmsegmentation's names."""
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    options = {"hidden_size": channels, "auxiliary_channels": channels // 2}
    config = UperNetConfig(num_labels=classes, **options)
    heads = torch.nn.ModuleDict(
        {
            "decode_head": UperNetHead(config, widths),
            "auxiliary_head": UperNetFCNHead(config, widths),
        }
    ).eval()
    shapes = [(k, list(x.shape)) for k, x in heads.state_dict().items() if x.ndim]
    weights = golden.weights(sorted(shapes), 0)
    weights = {k: np.abs(x) if k.endswith("_var") else x for k, x in weights.items()}
    heads.load_state_dict({k: torch.from_numpy(x) for k, x in weights.items()}, strict=False)
    names = {"classifier": "conv_seg", "batch_norm": "bn"}
    renamed = {}
    for key, array in weights.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = array
    return heads, renamed


def our_heads(renamed, model):
    """The heads' weights, as `from_torch` reads them beside any backbone."""
    tensors = mambaout_jax.to_torch(positive(golden.params(model)), model)
    heads = ("decode_head.", "auxiliary_head.")
    assert {key for key in tensors if key.startswith(heads)} == set(renamed)
    return mambaout_jax.from_torch(tensors | renamed, model)


def torch_maps(torch, maps):
    return [torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))) for x in maps]


@pytest.mark.parametrize("train", [False, True])
def test_heads_equal_transformers(train):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    heads, renamed = theirs(torch)
    heads.train(train)
    model, _ = small()
    params, maps = our_heads(renamed, model), random_maps()
    with torch.no_grad():
        inputs = torch_maps(torch, maps)
        expected = {name: head(inputs) for name, head in heads.items()}
    for name, head, x in (
        ("decode_head", DecodeHead(7, 24), maps),
        ("auxiliary_head", AuxiliaryHead(7, 12), maps[2]),
    ):
        logits, new = head.apply({"params": params[name]}, x, train, mutable=["batch_stats"])
        theirs_ = expected[name].numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(logits, theirs_, rtol=0, atol=1e-4)
        if train:  # the running statistics after this batch
            for path, value in flatten_dict(new["batch_stats"], sep=".").items():
                key = path.replace("bn.", "batch_norm.running_").replace("psp_modules_", "psp_")
                for old in ("convs_", "psp_"):
                    key = key.replace(old, f"{old[:-1]}.")
                key = key.replace("psp.", "psp_modules.")
                key = key.replace(".batch_norm", ".1.batch_norm") if "psp" in key else key
                found = heads[name].state_dict()[key].numpy()
                np.testing.assert_allclose(value, found, rtol=1e-4, atol=1e-5)


def test_pooling_and_resizing_equal_torchs_for_any_size():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for size in ((1, 1), (2, 5), (7, 6), (16, 64)):
        x = np.random.RandomState(0).standard_normal((2, *size, 3)).astype(np.float32)
        (y,) = torch_maps(torch, [x])
        for bins in (1, 2, 3, 6):
            pooled = torch.nn.functional.adaptive_avg_pool2d(y, bins).numpy()
            got = adaptive_avg_pool(x, bins)
            np.testing.assert_allclose(got, pooled.transpose(0, 2, 3, 1), atol=1e-6)
        for target in ((1, 1), (3, 4), (14, 12), (31, 63)):
            resized = torch.nn.functional.interpolate(y, target, mode="bilinear").numpy()
            got = resize(jnp.asarray(x), target)
            np.testing.assert_allclose(got, resized.transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.slow
def test_the_whole_network_equals_timms_backbone_with_transformers_heads():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    timm = pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    widths = (96, 192, 384, 576)
    heads, renamed = theirs(torch, 512, widths, 150)
    backbone = timm.create_model("mambaout_tiny", num_classes=0).eval()
    shapes = [(key, list(value.shape)) for key, value in backbone.state_dict().items()]
    weights = golden.weights(sorted(shapes), 1)
    backbone.load_state_dict({key: torch.from_numpy(x) for key, x in weights.items()})
    images = golden.images(0, 1, [128, 160])
    with torch.no_grad():
        x, maps = backbone.stem(*torch_maps(torch, [images])), []
        for stage in backbone.stages:
            x = stage(x)
            maps.append(LayerNorm().apply({"params": ones(x.shape[-1])}, x.numpy()))
        expected = heads["decode_head"](torch_maps(torch, map(np.asarray, maps)))
    model = mambaout_jax.create_model("upernet_mambaout_tiny")
    tensors = mambaout_jax.to_torch(positive(golden.params(model)), model)
    norms = {k: ones(w) for k, w in zip(("norm0", "norm1", "norm2", "norm3"), widths, strict=True)}
    for name, values in norms.items():
        tensors |= {f"backbone.{name}.weight": values["scale"]}
        tensors |= {f"backbone.{name}.bias": values["bias"]}
    stages = {f"backbone.{k}": x for k, x in weights.items() if not k.startswith("head")}
    params = mambaout_jax.from_torch(tensors | renamed | stages, model)
    logits = jax.jit(model.apply)({"params": params}, images)
    np.testing.assert_allclose(logits, expected.numpy().transpose(0, 2, 3, 1), rtol=0, atol=1e-4)


def ones(width):
    return {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}
