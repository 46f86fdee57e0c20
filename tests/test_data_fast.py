"""The fast backend against Pillow: equal pixels, for all images and parameters."""

import io

import numpy as np
import pytest
from PIL import Image

from configs import default
from mambaout_jax.build_data import build_augmentation
from mambaout_jax.data import image_ops
from mambaout_jax.data.augment import TrainTransform
from mambaout_jax.data.backends import PillowBackend, open_backend
from mambaout_jax.data.decoding import BadImageError

pytest.importorskip("numba", reason="needs pip install -e '.[fast]'")
from mambaout_jax.data.fast import turbojpeg
from mambaout_jax.data.fast.backend import FastBackend, _LazyJpeg

needs_turbojpeg = pytest.mark.skipif(
    turbojpeg.library() is None, reason="needs libjpeg-turbo 3: pip install turbojpeg"
)

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
BOTH = FAST, PILLOW = FastBackend(), PillowBackend()
OPERATIONS = [image_ops.operations(backend) for backend in BOTH]


def noise(width, height, seed=0):
    """An image of smooth parts and of noise."""
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
        expected = PILLOW.warp(image, coefficients, filter_)
        assert_same(FAST.warp(image, coefficients, filter_), expected, str(coefficients))


@pytest.mark.parametrize("filter_", FILTERS)
def test_turns_are_pillows(filter_):
    for seed, degrees in enumerate([0, 30, -27.3, 90, 180, 270, 359.9, -0.01, 45, 400]):
        image = noise(48, 48 if degrees % 90 == 0 else 37, seed)
        expected = image.rotate(degrees, resample=filter_, fillcolor=image_ops.FILL)
        coefficients = image_ops.rotation(image.size, degrees)
        assert_same(PILLOW.warp(image, coefficients, filter_), expected, str(degrees))
        assert_same(FAST.warp(image, coefficients, filter_), expected, str(degrees))


@pytest.mark.parametrize("name", ["color", "contrast", "sharpness"])
def test_blends_are_pillows(name):
    rng = np.random.default_rng(0)
    for seed in range(40):
        image, factor = noise(*rng.integers(1, 60, 2), seed), float(rng.uniform(0.0, 2.5))
        factor = (0.0, 1.0, factor)[min(seed, 2)]
        assert_same(*(getattr(backend, name)(image, factor) for backend in BOTH), str(factor))


def with_few_values(image, seed):
    """The image with a narrower range, a single colour, or few values of very uneven counts."""
    pixels = np.array(image)
    if seed % 4 == 1:
        return Image.fromarray(pixels // 3 + 40)
    if seed % 4 == 2:
        return Image.new("RGB", image.size, tuple(map(int, pixels[0, 0])))
    if seed % 4 == 3:
        return Image.fromarray(np.where(pixels < 250, 7, pixels).astype(np.uint8))
    return image


@pytest.mark.parametrize("name", sorted(image_ops.OPERATIONS))
def test_every_operation_is_pillows(name):
    rng = np.random.default_rng(0)
    for seed in range(24):
        image = with_few_values(noise(*rng.integers(1, 60, 2), seed), seed)
        level, sign = (0.0, 10.0, float(rng.uniform(0, 10)))[min(seed, 2)], 1 - 2 * (seed % 2)
        results = (table[name](image, level, sign, FILTERS[seed % 2]) for table in OPERATIONS)
        assert_same(*results, f"seed {seed}, level {level}, sign {sign}")


@needs_turbojpeg
@pytest.mark.parametrize("sampling", ["Y444", "Y422", "Y420", "Y440", "Y411", "Y441"])
@pytest.mark.parametrize("options", [{}, {"restartrows": 1}])
def test_crops_are_decoded_to_pillows_pixels(sampling, options):
    writer = pytest.importorskip("turbojpeg")  # of more samplings than Pillow writes
    rng = np.random.default_rng(0)
    for width, height in ((83, 75), (64, 48), (17, 16), (1, 3)):
        pixels = np.asarray(noise(width, height))
        file = writer.compress(pixels, 90, getattr(writer.SAMP, sampling), **options)
        expected = PILLOW.open(file, "x")
        image = FAST.open(file, "x")
        assert isinstance(image, _LazyJpeg)
        assert image.size == (width, height)
        boxes = [(0, 0, width, bottom) for bottom in range(1, height + 1)]
        boxes += [(left, height // 2, width, height) for left in range(width)]
        boxes += [(0, height // 3, right, height) for right in range(1, width + 1)]
        for _ in range(100):
            left, top = rng.integers((width, height))
            right, bottom = rng.integers((left, top), (width, height)) + 1
            boxes.append((int(left), int(top), int(right), int(bottom)))
        for box in boxes:
            size = (box[2] - box[0], box[3] - box[1])  # resized to itself
            fast = FAST.resized_crop(image, box, size, FILTERS[0])
            assert_same(fast, expected.crop(box), f"{width}x{height}: {box}")


@needs_turbojpeg
def test_what_the_crop_throws_away_is_not_decoded():
    from mambaout_jax.data.fast import decode

    file = jpeg(noise(256, 128))  # in blocks of 16 pixels
    pixels, box = decode.Jpeg(file).decode_crop((100, 50, 150, 90))
    assert pixels.shape == (2 + 40 + 2, 4 + 50 + 2)  # from column 96, the block's first
    assert box == (4, 2, 54, 42)
    assert decode.Jpeg(file).decode_crop((0, 0, 256, 128))[0].shape == (128, 256)


@needs_turbojpeg
def test_without_libjpeg_turbo_pillow_decodes(monkeypatch):
    monkeypatch.setattr(turbojpeg, "library", lambda: None)
    file = jpeg(noise(64, 48))
    assert isinstance(FAST.open(file, "x"), Image.Image)
    assert_same(*(cut(backend, file, (3, 4, 33, 24), (30, 20)) for backend in BOTH))


def test_other_files_are_pillows():
    image = noise(40, 30)
    progressive = jpeg(image, progressive=True)
    scans = progressive.split(b"\xff\xda")
    files = [jpeg(image.convert(mode)) for mode in ("L", "CMYK")]
    files += [jpeg(image) + b"trailing", jpeg(image, keep_rgb=True), progressive]
    files += [b"\xff\xda".join(scans[:count]) + b"\xff\xd9" for count in (2, 3, 5)]
    files += [
        jpeg(image).replace(marker, b"\xff" + marker, 1) for marker in (b"\xff\xdb", b"\xff\xc0")
    ]
    png = io.BytesIO()
    image.save(png, "PNG")
    for file in (*files, png.getvalue()):
        assert_same(*(cut(backend, file, (3, 4, 33, 24), (30, 20)) for backend in BOTH))


def test_what_pillow_cannot_decode_is_damaged():
    file = jpeg(noise(64, 48))
    halves = file[: len(file) // 2], file[:100], file[:30] + file[-2:]
    frame = file.index(b"\xff\xc0")  # a warning, and behind it an error: no table of quanta
    without = file.replace(b"\xff\xdb", b"\xff\xef")
    halves += (without[:frame] + b"\x00" * 9 + without[frame:],)
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
    images = np.empty((2, 80, 48, 48, 3), np.uint8)
    for out, backend in zip(images, ("pillow", "fast"), strict=True):
        config = default.get_config()
        config.data.image_size = 48
        config.augment.update(policy=policy, color_jitter=jitter)
        transform = TrainTransform(build_augmentation(config), backend)
        for seed in range(80):
            transform(files[seed % 4], np.random.default_rng(seed), "x", out[seed])
    np.testing.assert_array_equal(*images)


def test_the_fast_backend_is_taken_where_it_can_be():
    assert isinstance(open_backend("auto"), FastBackend)
    assert isinstance(open_backend("fast"), FastBackend)
    decoder = " + libjpeg-turbo" if turbojpeg.library() else ""
    assert open_backend("auto").made_by == f"Pillow + Numba{decoder}"
