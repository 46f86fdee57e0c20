"""The initial parameters of fine-tuning, and its learning rates by layer."""

import golden
import jax
import numpy as np
import pytest

import mambaout_jax
from mambaout_jax.errors import UserError
from mambaout_jax.weights.finetune import initial_params, layer_indices, layer_scales
from mambaout_jax.weights.store import WeightsInfo, save_weights

SMALL = {"depths": (1, 2, 1, 2), "widths": (8, 12, 16, 24)}


def small_model(**options):
    return mambaout_jax.create_model("test_mambaout", **{**SMALL, "num_classes": 5, **options})


@pytest.fixture
def saved(tmp_path):
    info = WeightsInfo("test_mambaout", 5, mambaout_jax.preprocessing("test_mambaout"), SMALL)
    params = golden.params(small_model())
    save_weights(tmp_path / "w", params, info)
    return tmp_path / "w", params


def test_equal_classes_take_everything(saved):
    path, params = saved
    taken, report = initial_params(path, small_model(drop_path_rate=0.3), jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, taken, params)
    assert report == f"parameters start from {path} (test_mambaout, 5 classes)"


def test_other_classes_swap_the_last_layer_and_say_so(saved):
    path, params = saved
    model = small_model(num_classes=400)
    taken, report = initial_params(path, model, jax.random.key(1))
    assert report.endswith("the last layer is new, for 400 classes")
    new = taken["head"].pop("fc2")
    params["head"].pop("fc2")
    jax.tree.map(np.testing.assert_array_equal, taken, params)
    assert new["kernel"].shape == (96, 400)
    assert new["kernel"].dtype == np.float32
    assert abs(new["kernel"].std() - 0.02) < 5e-4
    np.testing.assert_array_equal(new["bias"], np.zeros(400, np.float32))
    again, _ = initial_params(path, model, jax.random.key(1))
    other, _ = initial_params(path, model, jax.random.key(2))
    np.testing.assert_array_equal(again["head"]["fc2"]["kernel"], new["kernel"])
    assert np.abs(other["head"]["fc2"]["kernel"] - new["kernel"]).max() > 0


@pytest.mark.parametrize("size", [32, 97])
def test_another_resolution_just_works(saved, size):
    model = small_model(num_classes=7)
    params, _ = initial_params(saved[0], model, jax.random.key(1))
    logits = jax.jit(model.apply)({"params": params}, golden.images(0, 2, size))
    assert logits.shape == (2, 7)
    assert np.isfinite(logits).all()


def test_a_model_without_a_head_leaves_it_out(saved):
    params, report = initial_params(saved[0], small_model(num_classes=0), jax.random.key(1))
    assert "head" not in params
    assert report.endswith("the head is left out")


def test_another_network_is_refused(saved):
    model = small_model(widths=(8, 12, 16, 20), num_classes=9)
    with pytest.raises(UserError, match=r"are test_mambaout's and do not fit") as error:
        initial_params(saved[0], model, jax.random.key(1))
    assert "head/norm1/scale is (24,), expected (20,)" in str(error.value)


def test_layers_follow_the_order_of_the_stages():
    params = golden.params(small_model())
    indices = layer_indices(params)
    assert set(jax.tree.leaves(indices["stem"])) == {0}
    order = [("0", 0), ("1", 0), ("1", 1), ("2", 0), ("3", 0), ("3", 1)]
    for layer, (stage, block) in enumerate(order, start=1):
        found = indices[f"stages_{stage}"][f"blocks_{block}"]
        assert set(jax.tree.leaves(found)) == {layer}
    for stage, layer in (("1", 2), ("2", 4), ("3", 5)):
        assert set(jax.tree.leaves(indices[f"stages_{stage}"]["downsample"])) == {layer}
    assert set(jax.tree.leaves(indices["head"])) == {7}
    assert jax.tree.structure(indices) == jax.tree.structure(params)


def test_the_tenth_block_comes_after_the_ninth():
    model = small_model(depths=(1, 1, 12, 1))
    indices = layer_indices(jax.eval_shape(lambda: golden.params(model)))
    blocks = indices["stages_2"]
    layers = [blocks[f"blocks_{block}"]["norm"]["scale"] for block in range(12)]
    assert layers == list(range(3, 15))


def test_scales_are_powers_of_the_decay():
    params = golden.params(small_model())
    scales = layer_scales(params, 0.5)
    assert scales["head"]["fc2"]["kernel"] == 1
    assert scales["stages_3"]["blocks_1"]["fc1"]["bias"] == 0.5
    assert scales["stem"]["conv1"]["kernel"] == 0.5**7
    assert set(jax.tree.leaves(layer_scales(params, 1.0))) == {1.0}


@pytest.mark.parametrize("name", ["mambaout_femto", "vit_tiny_patch16_224"])
def test_layers_are_timms(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from timm.models._manipulate import group_parameters

    from mambaout_jax.weights.torch_layout import torch_tensors

    model = timm.create_model(name)
    expected = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    ours = mambaout_jax.create_model(name)
    indices = layer_indices(jax.eval_shape(lambda: golden.params(ours)))
    for tensor in torch_tensors(ours, "timm"):
        found = indices
        for key in tensor.path:
            found = found[key]
        assert found == expected[tensor.name]
