"""Training augmentation: each distribution against its formula, each option against its effect."""

import io
import math
import sys

import numpy as np
import pytest
from PIL import Image

from configs import default
from mambaout_jax.build_data import build_augmentation
from mambaout_jax.data.augment import TrainTransform, color_jitter, draw_crop
from mambaout_jax.data.backends import PillowBackend, open_backend
from mambaout_jax.errors import UserError

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


NOISE = np.random.RandomState(0).randint(0, 256, (60, 80, 3), np.uint8)


def plain_config(**augment):
    """The default configuration with every augmentation off but those given."""
    config = default.get_config()
    config.data.image_size = 32
    off = {"crop_scale": (1.0, 1.0), "crop_ratio": (4 / 3, 4 / 3), "interpolation": "bilinear"}
    config.augment.update(off | {"hflip": 0.0, "policy": ""} | augment)
    return config


def transformed(seed=0, **augment):
    transform = TrainTransform(build_augmentation(plain_config(**augment)), "auto")
    image = np.empty(transform.shape, np.uint8)
    transform(png(NOISE), np.random.default_rng(seed), "noise", image)
    return image


def uniform_distance(samples, low, high):
    """Largest difference between the samples' distribution and the uniform one."""
    ranks = np.arange(1, len(samples) + 1) / len(samples)
    return np.abs(np.sort((np.asarray(samples) - low) / (high - low)) - ranks).max()


def test_everything_off_is_a_plain_resize():
    expected = Image.fromarray(NOISE).resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(transformed(), np.asarray(expected))


def test_crop_area_and_ratio_follow_their_formulas():
    rng = np.random.default_rng(0)
    small = (0.1, 0.4)  # of a square this always fits, so that nothing is drawn again
    boxes = np.array([draw_crop((1000, 1000), small, RATIO, rng) for _ in range(4000)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    bound = 1.63 / math.sqrt(4000)  # Kolmogorov and Smirnov's, exceeded once in a hundred times
    assert uniform_distance(width * height / 1e6, *small) < bound
    assert uniform_distance(np.log(width / height), *np.log(RATIO)) < bound
    assert uniform_distance(boxes[:, 0] / (1000 - width), 0, 1) < bound
    assert uniform_distance(boxes[:, 1] / (1000 - height), 0, 1) < bound


def test_crops_lie_inside_and_tall_images_fall_back_to_the_centre():
    rng = np.random.default_rng(0)
    for _ in range(500):
        left, top, right, bottom = draw_crop((7, 5), SCALE, RATIO, rng)
        assert 0 <= left < right <= 7
        assert 0 <= top < bottom <= 5
    assert draw_crop((30, 400), (1.0, 1.0), RATIO, rng) == (0, 180, 30, 220)
    assert draw_crop((400, 30), (1.0, 1.0), RATIO, rng) == (180, 0, 220, 30)
    assert draw_crop((40, 40), (1.0, 1.0), (1.1, 1.2), rng) == (0, 2, 40, 38)


def test_crop_options_act():
    whole, half = transformed(), transformed(crop_scale=(0.5, 0.5))
    assert not np.array_equal(whole, half)
    assert not np.array_equal(half, transformed(crop_scale=(0.5, 0.5), crop_ratio=(1.0, 1.0)))


def test_interpolation_is_drawn_with_even_odds():
    forms = {transformed(interpolation=name).tobytes(): name for name in ("bilinear", "bicubic")}
    assert len(forms) == 2
    drawn = [forms[transformed(s, interpolation="random").tobytes()] for s in range(400)]
    assert abs(drawn.count("bicubic") - 200) < 2.6 * 10


def test_flip_has_its_probability():
    plain = transformed()
    np.testing.assert_array_equal(transformed(hflip=1.0), plain[:, ::-1])
    flips = [not np.array_equal(transformed(s, hflip=0.3), plain) for s in range(400)]
    assert abs(sum(flips) - 120) < 2.6 * math.sqrt(400 * 0.3 * 0.7)


def test_color_jitter_draws_each_factor_uniformly():
    grey = Image.new("RGB", (4, 4), (100, 100, 100))  # contrast and saturation leave it alone
    values = [
        np.asarray(color_jitter(grey, 0.4, np.random.default_rng(s), PillowBackend()))[0, 0, 0]
        for s in range(1500)
    ]
    assert uniform_distance(np.array(values) + 0.5, 60, 140) < 1.63 / math.sqrt(1500) + 1 / 80
    assert not np.array_equal(transformed(color_jitter=0.4), transformed())


def test_policy_acts_and_depends_on_the_generator_alone():
    policy = "rand-m9-mstd0.5-inc1-p1"
    first = transformed(1, policy=policy)
    assert not np.array_equal(first, transformed())
    np.testing.assert_array_equal(first, transformed(1, policy=policy))
    assert not np.array_equal(first, transformed(2, policy=policy))


def test_backends_are_chosen_by_name_and_by_what_is_installed(monkeypatch):
    assert isinstance(open_backend("pillow"), PillowBackend)
    monkeypatch.setitem(sys.modules, "mambaout_jax.data.fast.backend", None)  # as without Numba
    assert isinstance(open_backend("auto"), PillowBackend)
    with pytest.raises(UserError, match=r"'fast' needs Numba .*pip install"):
        open_backend("fast")
