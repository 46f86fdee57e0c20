"""The fast backend against Pillow: equal pixels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import default
from mambaout_jax.data import image_ops
from mambaout_jax.data.augment import TrainTransform
from mambaout_jax.data.backends import FastBackend, PillowBackend

pytest.importorskip("numba", reason="needs pip install -e '.[fast]'")
pytest.importorskip("simplejpeg", reason="needs pip install -e '.[fast]'")

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def noise(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("filter_", FILTERS)
def test_resize_along_rows_then_columns_equals_pillow(filter_):
    from mambaout_jax.data import kernels

    shapes = [(375, 500), (90, 61), (7, 300), (300, 7), (1, 1), (40, 40), (64, 200)]
    for seed, (height, width) in enumerate(shapes):
        pixels = noise(height, width, seed)
        for target in ((64, 64), (33, 90), (width, 20)):
            rows = Image.fromarray(pixels).resize((target[0], height), filter_)
            expected = np.asarray(rows.resize(target, filter_))
            actual = kernels.resize(pixels, target, filter_)
            np.testing.assert_array_equal(actual, expected, f"{height}x{width} to {target}")


@pytest.mark.parametrize("filter_", FILTERS)
def test_affine_equals_pillow(filter_):
    from mambaout_jax.data import kernels

    rng = np.random.default_rng(0)
    for seed in range(30):
        pixels = noise(*rng.integers(1, 60, 2), seed)
        moved = rng.normal(size=6) * (0.3, 0.3, 9, 0.3, 0.3, 9) * rng.integers(0, 2, 6)
        coefficients = tuple(float(value) for value in np.array([1, 0, 0, 0, 1, 0]) + moved)
        expected = image_ops.pillow_warp(Image.fromarray(pixels), coefficients, filter_)
        actual = kernels.affine(pixels, coefficients, filter_, image_ops.FILL)
        np.testing.assert_array_equal(actual, np.asarray(expected), str(coefficients))


def test_decoders_agree():
    with np.load(Path(__file__).parent / "goldens" / "eval-preprocess.npz") as goldens:
        files = [goldens[key].tobytes() for key in goldens.files if key.endswith("file")]
    for file in files:
        fast, pillow = FastBackend().decode(file, "x"), PillowBackend().decode(file, "x")
        np.testing.assert_array_equal(fast.pixels, np.asarray(pillow))
        assert fast.size == pillow.size


def test_the_whole_transform_is_the_same_but_for_the_order_of_the_resize():
    with np.load(Path(__file__).parent / "goldens" / "eval-preprocess.npz") as goldens:
        file = goldens["0/file"].tobytes()
    pictures = []
    for backend in ("pillow", "fast"):
        config = default.get_config()
        config.data.update(backend=backend, image_size=96)
        config.augment.policy = "rand-m9-inc1-p1"
        config.augment.crop_scale = config.augment.crop_ratio = (1.0, 1.0)  # a square is cut
        config.augment.crop_scale = (0.3, 0.3)
        transform = TrainTransform(config)
        pictures.append([transform(file, np.random.default_rng(s), "x") for s in range(40)])
    np.testing.assert_array_equal(*pictures)
