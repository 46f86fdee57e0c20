"""The public names: what they take and return, and that importing them is fast."""

import io
import os
import runpy
import subprocess
import sys

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_weights
from PIL import Image

import mambaout_jax
from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.errors import UserError
from mambaout_jax.models.pretrained import DEFAULT_TAGS, PRETRAINED, find_pretrained
from mambaout_jax.models.variants import VARIANTS


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_weights.write(tmp_path_factory.mktemp("weights") / "w")


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_public_name_is_listed_and_there():
    listed = dir(mambaout_jax)
    assert listed == sorted(listed)
    for name in mambaout_jax.__all__:
        assert name in listed
        assert getattr(mambaout_jax, name) is not None
    assert {"Predictor", "Preprocessing", "normalize", "UserError"} <= set(mambaout_jax.__all__)
    assert issubclass(mambaout_jax.UserError, ValueError)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mambaout_jax.nothing


def test_setup_takes_the_version_of_the_package(monkeypatch):
    passed = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: passed.update(options))
    runpy.run_path("setup.py")
    assert passed["version"] == mambaout_jax.__version__


def test_a_model_and_its_weights(weights):
    model, params = mambaout_jax.load_pretrained(weights)
    assert model == small_weights.INFO.create_model()
    pair = mambaout_jax.create_model(str(weights), pretrained=True)
    assert pair[0] == model
    assert_equal(pair[1], params)
    assert mambaout_jax.create_model("mambaout_tiny", num_classes=5).num_classes == 5
    assert isinstance(mambaout_jax.create_model("mambaout_tiny"), mambaout_jax.MambaOut)


def test_another_number_of_classes_gives_a_new_last_layer(weights):
    _, whole = mambaout_jax.load_pretrained(weights)
    model, params = mambaout_jax.create_model(weights, pretrained=True, num_classes=37)
    assert model.num_classes == 37
    logits = model.apply({"params": params}, golden.images(0, 2, 32))
    assert logits.shape == (2, 37)
    last = params["head"].pop("fc2")
    whole["head"].pop("fc2")
    assert_equal(params, whole)
    assert last["kernel"].shape == (96, 37)
    assert abs(float(last["kernel"].std()) - 0.02) < 2e-3
    assert not last["bias"].any()
    _, again = mambaout_jax.load_pretrained(weights, num_classes=37, seed=0)
    _, other = mambaout_jax.load_pretrained(weights, num_classes=37, seed=1)
    np.testing.assert_array_equal(again["head"]["fc2"]["kernel"], last["kernel"])
    assert (other["head"]["fc2"]["kernel"] != last["kernel"]).any()


def test_without_classes_there_is_no_head(weights):
    model, params = mambaout_jax.load_pretrained(weights, num_classes=0)
    assert "head" not in params
    assert model.apply({"params": params}, golden.images(0, 2, 64)).shape == (2, 2, 2, 24)


def test_options_reach_the_model(weights):
    model, _ = mambaout_jax.load_pretrained(weights, drop_path_rate=0.3, dtype=jnp.bfloat16)
    assert (model.drop_path_rate, model.dtype) == (0.3, jnp.bfloat16)
    with pytest.raises(UserError, match="unknown option 'drop_path'"):
        mambaout_jax.load_pretrained(weights, drop_path=0.3)
    with pytest.raises(UserError, match="do not fit test_mambaout with these options: "):
        mambaout_jax.load_pretrained(weights, widths=(8, 12, 16, 20))


def test_each_variant_has_default_weights_of_its_own_preprocessing():
    assert set(DEFAULT_TAGS) == set(VARIANTS) - {"test_mambaout"}
    for name, tag in DEFAULT_TAGS.items():
        assert PRETRAINED[tag].variant == name
        assert PRETRAINED[tag].num_classes == 1000
        assert mambaout_jax.preprocessing(tag) == mambaout_jax.preprocessing(name)


def test_default_weights_are_timms():
    models = pytest.importorskip("timm.models", reason="timm is not installed")
    for name, tag in DEFAULT_TAGS.items():
        assert f"{name}.{models.get_pretrained_cfg(name).tag}" == tag


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_an_image_is_a_files_bytes_its_path_or_pillows(tmp_path, mode):
    image = small_weights.image(0).convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG")
    (tmp_path / "x.png").write_bytes(file.getvalue())
    preprocessing = Preprocessing(size=32)
    expected = mambaout_jax.preprocess_image(file.getvalue(), preprocessing)
    opened = Image.open(tmp_path / "x.png")
    for source in (tmp_path / "x.png", str(tmp_path / "x.png"), opened, image, file.getbuffer()):
        found = mambaout_jax.preprocess_image(source, preprocessing)
        np.testing.assert_array_equal(found, expected)
    pixels = mambaout_jax.normalize(expected[None], preprocessing.mean, preprocessing.std)
    assert pixels.shape == (1, 32, 32, 3)


def test_images_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for source, message in (
        (tmp_path / "gone.png", "gone.png cannot be read: No such file"),
        (tmp_path / "pipe.jpg", "pipe.jpg is not a regular file"),
        (tmp_path, "is not a regular file"),
        (b"nothing", "the image cannot be decoded"),
        (np.zeros((32, 32, 3), np.uint8), "an image is a ndarray: expected a file's bytes, a path"),
    ):
        with pytest.raises(UserError, match=message):
            mambaout_jax.preprocess_image(source, Preprocessing(size=32))


def test_every_variant_has_its_preprocessing():
    assert {entry.variant for entry in PRETRAINED.values()} == set(VARIANTS)
    assert mambaout_jax.list_pretrained() == list(PRETRAINED)
    for name, variant in VARIANTS.items():
        record = mambaout_jax.preprocessing(name)
        assert record.shape == (variant.image_size, variant.image_size)
        assert record.crop_pct == (0.95 if "base_" in name and "plus" not in name else 1.0)
        assert record.crop_mode == "center"
        assert record.interpolation == "bicubic"


def test_pretrained_names_keep_their_own_preprocessing_and_classes():
    r384 = "mambaout_base_plus_rw.sw_e150_r384_in12k_ft_in1k"
    assert mambaout_jax.preprocessing(r384) == Preprocessing(size=384, crop_mode="squash")
    assert mambaout_jax.preprocessing(f"timm/{r384}").shape == (384, 384)
    assert find_pretrained(r384).top1 == 87.508
    assert find_pretrained("mambaout_base_plus_rw.sw_e150_in12k").num_classes == 11_821
    assert mambaout_jax.preprocessing("mambaout_base_wide_rw.sw_e500_in1k").crop_pct == 0.95
    with pytest.raises(UserError, match=r"did you mean 'mambaout_tiny\.in1k'"):
        mambaout_jax.preprocessing("mambaout_tiny.in2k")
    with pytest.raises(UserError, match="did you mean 'mambaout_tiny'"):
        mambaout_jax.preprocessing("mambaout_tyny")


def test_importing_the_package_imports_jax_and_flax_alone():
    heavy = ("orbax", "safetensors", "huggingface_hub", "PIL", "torch", "grain", "tensorflow")
    code = (
        "import sys, jax, flax.linen, flax.traverse_util; before = set(sys.modules); "
        "import mambaout_jax; "
        "mambaout_jax.preprocessing('mambaout_tiny'); mambaout_jax.create_model('mambaout_tiny'); "
        "mambaout_jax.ops.selective_scan, mambaout_jax.models.mambaout.MambaOut; "
        "assert not hasattr(mambaout_jax, 'opps'); "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(heavy) & set(done.stdout.split())
    assert "mambaout_jax" in done.stdout
