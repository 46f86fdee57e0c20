"""The fast backend against Pillow: equal pixels, whatever the picture and the parameters."""

import io

import numpy as np
import pytest
from PIL import Image

from configs import default
from mambaout_jax.data import image_ops
from mambaout_jax.data.augment import TrainTransform
from mambaout_jax.data.backends import FastBackend, PillowBackend
from mambaout_jax.data.decoding import BadImageError

pytest.importorskip("numba", reason="needs pip install -e '.[fast]'")
pytest.importorskip("simplejpeg", reason="needs pip install -e '.[fast]'")

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
BOTH = FAST, PILLOW = FastBackend(), PillowBackend()


def noise(width, height, seed=0):
    """A picture of smooth parts and of noise."""
    random = np.random.RandomState(seed)
    coarse = Image.fromarray(random.randint(0, 256, (5, 5, 3), np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    fine = random.randint(0, 256, pixels.shape, np.uint8)
    return Image.fromarray(np.where(random.rand(height, width, 1) < 0.3, fine, pixels))


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def assert_same(first, second, message=""):
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second), message)


def cut(backend, file, box, size):
    return backend.resized_crop(backend.open(file, "the file"), box, size, FILTERS[1])


@pytest.mark.parametrize("filter_", FILTERS)
def test_resized_crops_are_pillows(filter_):
    sizes = [(500, 375), (61, 90), (300, 7), (7, 300), (1, 1), (40, 40), (70, 200), (200, 70)]
    for seed, (width, height) in enumerate(sizes):
        image = noise(width, height, seed)
        for box in ((0, 0, width, height), (width // 4, height // 3, width, max(height - 2, 1))):
            for size in ((64, 64), (33, 90), (width, 20), (20, height)):
                assert_same(
                    FAST.resized_crop(image, box, size, filter_),
                    PILLOW.resized_crop(image, box, size, filter_),
                    f"{width}x{height}, {box} to {size}",
                )


@pytest.mark.parametrize("filter_", FILTERS)
def test_warps_are_pillows(filter_):
    rng = np.random.default_rng(0)
    for seed in range(60):
        image = noise(*rng.integers(1, 60, 2), seed)
        moved = rng.normal(size=6) * (0.3, 0.3, 9, 0.3, 0.3, 9) * rng.integers(0, 2, 6)
        coefficients = tuple(float(value) for value in np.array([1, 0, 0, 0, 1, 0]) + moved)
        expected = image_ops.warp(image, coefficients, filter_)
        assert_same(FAST.warp(image, coefficients, filter_), expected, str(coefficients))


@pytest.mark.parametrize("filter_", FILTERS)
def test_turns_are_pillows(filter_):
    for seed, degrees in enumerate([0, 30, -27.3, 90, 180, 270, 359.9, -0.01, 45, 400]):
        image = noise(48, 48 if degrees % 90 == 0 else 37, seed)
        expected = image.rotate(degrees, resample=filter_, fillcolor=image_ops.FILL)
        coefficients = image_ops.rotation(image.size, degrees)
        assert_same(image_ops.warp(image, coefficients, filter_), expected, str(degrees))
        assert_same(FAST.warp(image, coefficients, filter_), expected, str(degrees))


def test_sharpness_is_pillows():
    rng = np.random.default_rng(0)
    for seed in range(40):
        image, factor = noise(*rng.integers(1, 60, 2), seed), float(rng.uniform(0.0, 2.5))
        factor = (0.0, 1.0, factor)[min(seed, 2)]
        assert_same(FAST.sharpness(image, factor), image_ops.sharpness(image, factor), str(factor))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_rows_that_are_left_out_change_none_that_are(subsampling, options):
    for width, height in ((83, 75), (64, 48)):
        file = jpeg(noise(width, height), subsampling=subsampling, **options)
        expected = PILLOW.open(file, "x")
        picture = FAST.open(file, "x")
        assert picture.size == (width, height)
        for bottom in range(1, height + 1):
            box, size = (0, 0, width, bottom), (width, bottom)  # resized to itself
            fast = FAST.resized_crop(picture, box, size, FILTERS[0])
            assert_same(fast, expected.crop(box), f"{height} rows down to {bottom}")


def test_rows_that_are_not_needed_are_not_decoded():
    from mambaout_jax.data import fast_decode

    file = jpeg(noise(64, 128))
    assert fast_decode.decode_rows(file, 128, 20).shape == (22, 64)
    assert fast_decode.decode_rows(file, 128, 127).shape == (128, 64)


def test_other_files_are_pillows():
    image = noise(40, 30)
    files = [jpeg(image.convert(mode)) for mode in ("L", "CMYK")]
    files += [jpeg(image) + b"trailing", jpeg(image, keep_rgb=True)]
    png = io.BytesIO()
    image.save(png, "PNG")
    for file in (*files, png.getvalue()):
        assert_same(*(cut(backend, file, (3, 4, 33, 24), (30, 20)) for backend in BOTH))


def test_what_pillow_cannot_decode_is_damaged():
    file = jpeg(noise(64, 48))
    halves = file[: len(file) // 2], file[:100], file[:30] + file[-2:]
    for damaged in (*halves, b"\xff\xd8\xff\xd9", b""):
        for backend in BOTH:
            with pytest.raises(BadImageError, match="the file cannot be decoded"):
                cut(backend, damaged, (0, 0, 64, 48), (8, 8))


def test_flaws_that_pillow_lets_pass_pass():
    file = bytearray(jpeg(noise(64, 48)))
    file[len(file) // 2 : len(file) // 2 + 8] = b"\x12\x34\x56\x78" * 2
    assert_same(*(cut(backend, bytes(file), (0, 0, 64, 40), (64, 40)) for backend in BOTH))


@pytest.mark.parametrize(
    ("policy", "jitter"), [("rand-m9-mstd0.5-inc1-p1", 0.0), ("3a", 0.0), ("", 0.0), ("", 0.4)]
)
def test_the_whole_transform_is_the_same(policy, jitter):
    files = [jpeg(noise(120, 90, seed)) for seed in range(4)]
    pictures = []
    for backend in ("pillow", "fast"):
        config = default.get_config()
        config.data.update(backend=backend, image_size=48)
        config.augment.update(policy=policy, color_jitter=jitter)
        transform = TrainTransform(config)
        pictures.append([transform(files[s % 4], np.random.default_rng(s), "x") for s in range(80)])
    np.testing.assert_array_equal(*pictures)
