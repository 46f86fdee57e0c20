"""Masks of files: the labels at the original size, and what is written."""

import dataclasses

import flax.linen as nn
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_weights
from PIL import Image

from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.data.segmentation import drawing
from mambaout_jax.data.segmentation.whole import WholeImages
from mambaout_jax.errors import UserError
from mambaout_jax.inference.mask_predictor import MaskPredictor

OPTIONS = WholeImages(short_side=64, long_side=256)
NAMES = ["dark", "bright"]


class Brightness(nn.Module):
    """Says "bright" where the normalised image is above a parameter, at stride 4."""

    @nn.compact
    def __call__(self, images):
        threshold = self.param("threshold", nn.initializers.zeros, ())
        patches = images.reshape(len(images), images.shape[1] // 4, 4, images.shape[2] // 4, 4, 3)
        bright = patches.mean(axis=(2, 4, 5))
        return jnp.stack([jnp.full_like(bright, threshold), bright], axis=-1)


@pytest.fixture(scope="module")
def predictor():
    model = Brightness()
    params = model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    return MaskPredictor(model, params, NAMES, OPTIONS)


def picture(size):
    """A dark image with a bright right half."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, size[0] // 2 :] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(128, 64), (300, 150), (40, 60), (500, 64)])
def test_labels_have_the_size_of_the_image(predictor, size):
    labels = predictor.predict_image(picture(size))
    assert (labels.shape, labels.dtype) == ((size[1], size[0]), np.uint8)
    expected = np.broadcast_to(np.arange(size[0]) >= size[0] // 2, labels.shape)
    margin = 4 * size[0] / OPTIONS.resized(size, 1.0)[0]  # a stride of the network
    near = np.abs(np.arange(size[0]) - size[0] / 2) <= margin
    np.testing.assert_array_equal(labels[:, ~near], expected[:, ~near])


def test_files_are_predicted_in_order_and_damaged_ones_are_named(predictor, tmp_path):
    sizes = {"a.png": (64, 64), "c.png": (90, 70), "d.png": (64, 128)}
    for name, size in sizes.items():
        picture(size).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"none")
    names = ["a.png", "b.png", "c.png", "d.png", "e.png"]
    found = list(predictor.predict_files([tmp_path / name for name in names]))
    assert [prediction.name for prediction in found] == [str(tmp_path / name) for name in names]
    assert [prediction.labels is None for prediction in found] == [False, True, False, False, True]
    assert "b.png cannot be decoded" in found[1].error
    assert "e.png cannot be read" in found[4].error
    for prediction in (found[0], found[2], found[3]):
        image = picture(sizes[prediction.name[-5:]])
        np.testing.assert_array_equal(prediction.image, np.asarray(image))
        np.testing.assert_array_equal(prediction.labels, predictor.predict_image(image))


def test_a_palette_file_and_an_overlay_are_written(predictor, tmp_path):
    picture((64, 64)).save(tmp_path / "a.png")
    (prediction,) = predictor.predict_files([tmp_path / "a.png"])
    mask, over = predictor.save(prediction, tmp_path / "masks")
    assert [mask.name, over.name] == ["a_mask.png", "a_overlay.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(mask)), prediction.labels)
    expected = drawing.overlay(prediction.image, prediction.labels, len(NAMES))
    np.testing.assert_array_equal(np.asarray(Image.open(over)), expected)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a_mask.png cannot be written: "):
        predictor.save(prediction, tmp_path / "file")


def test_weights_give_their_own_classes_and_preprocessing():
    pixels = Preprocessing(size=64, mean=(0.5,) * 3, std=(0.25,) * 3)
    info = dataclasses.replace(
        small_weights.INFO, model="upernet_test_mambaout", num_classes=3, preprocessing=pixels
    )
    info = dataclasses.replace(info, overrides={**info.overrides, "channels": 8})
    params = golden.params(info.create_model())
    found = MaskPredictor.from_weights(params, info)
    assert found.class_names == ["class 0", "class 1", "class 2"]
    options = WholeImages(short_side=64, long_side=256, mean=pixels.mean, std=pixels.std)
    expected = MaskPredictor(info.create_model(), params, found.class_names, options)
    image = small_weights.image(0)
    np.testing.assert_array_equal(found.predict_image(image), expected.predict_image(image))
    with pytest.raises(UserError, match="a network of classification, not of segmentation"):
        MaskPredictor.from_weights({}, small_weights.INFO)
