"""Evaluation pixels for every kind of file and shape, against the reference's steps written out."""

import io

import numpy as np
import pytest
from batches import eval_batches
from PIL import Image

from configs import default
from mambaout_jax.build_data import build_dataset
from mambaout_jax.data.preprocess import Preprocessing, preprocess_image
from mambaout_jax.data.sources import open_source
from mambaout_jax.errors import UserError

NOISE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (50, 81, 4), np.uint8))


def encode(image, format_="PNG", **options):
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6  # turn by 90 degrees
FILES = {
    "greyscale": encode(NOISE.convert("L")),
    "palette": encode(NOISE.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)),
    "transparent palette": encode(NOISE.convert("RGB").quantize(16), transparency=3),
    "alpha": encode(NOISE),
    "grey alpha": encode(NOISE.convert("LA")),
    "16 bit": encode(Image.fromarray((np.arange(50 * 81) * 16).reshape(50, 81).astype(np.uint16))),
    "1 bit": encode(NOISE.convert("1")),
    "CMYK": encode(NOISE.convert("RGB").convert("CMYK"), "JPEG"),
    "progressive": encode(NOISE.convert("RGB"), "JPEG", progressive=True),
    "turned by EXIF": encode(NOISE.convert("RGB"), "JPEG", exif=EXIF),
    "GIF": encode(NOISE.convert("RGB"), "GIF"),
    "WebP": encode(NOISE.convert("RGB"), "WEBP"),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_is_converted_by_pillow_alone(kind):
    expected = Image.open(io.BytesIO(FILES[kind])).convert("RGB")
    expected = expected.resize((48, 30), Image.Resampling.BICUBIC).crop((9, 0, 39, 30))
    actual = preprocess_image(FILES[kind], Preprocessing(size=30))
    np.testing.assert_array_equal(actual, np.asarray(expected))


RGB = Image.fromarray(np.random.RandomState(1).randint(0, 256, (50, 81, 3), np.uint8))


def steps(resized, box, image=RGB, filter_=Image.Resampling.BICUBIC):
    return np.asarray(image.resize(resized, filter_).crop(box))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"size": 32, "crop_pct": 0.95}, steps((53, 33), (10, 0, 42, 32))),
        ({"size": 32, "crop_pct": 0.875}, steps((58, 36), (13, 2, 45, 34))),
        ({"size": 32, "crop_mode": "squash"}, steps((32, 32), (0, 0, 32, 32))),
        ({"size": 32, "crop_mode": "squash", "crop_pct": 0.9}, steps((35, 35), (2, 2, 34, 34))),
        ({"size": (20, 60)}, steps((60, 37), (0, 8, 60, 28))),
        ({"size": (60, 20)}, steps((97, 60), (38, 0, 58, 60))),
        ({"size": (20, 60), "crop_mode": "squash"}, steps((60, 20), (0, 0, 60, 20))),
        ({"size": 100}, steps((162, 100), (31, 0, 131, 100))),
        ({"size": 32, "crop_pct": 1.25}, steps((40, 25), (4, -3, 36, 29))),  # padded with black
        (
            {"size": 32, "interpolation": "bilinear"},
            steps((51, 32), (10, 0, 42, 32), filter_=Image.Resampling.BILINEAR),
        ),
    ],
)
def test_sizes_crops_and_modes(options, expected):
    actual = preprocess_image(encode(RGB), Preprocessing(**options))
    np.testing.assert_array_equal(actual, expected)


def test_the_loader_gives_the_same_pixels():
    config = default.get_config()
    config.data.update(name="digits", num_classes=10, image_size=20, threads=2)
    config.eval.update(batch_size=7, crop_pct=0.8, crop_mode="squash")
    preprocessing = Preprocessing(size=20, crop_pct=0.8, crop_mode="squash")
    source = open_source(build_dataset(config), "validation")
    first = next(iter(eval_batches(config)))
    for row in range(7):
        expected = preprocess_image(source[row]["image"], preprocessing)
        np.testing.assert_array_equal(first["image"][row], expected)
        assert first["label"][row] == source[row]["label"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"crop_pct": 0.0}, "crop_pct is 0.0"),
        ({"crop_mode": "border"}, "crop_mode is 'border'"),
    ],
)
def test_meaningless_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Preprocessing(**options)


def test_unknown_filters_and_files_are_named():
    with pytest.raises(UserError, match="unknown interpolation 'cubic'; did you mean 'bicubic'"):
        preprocess_image(encode(RGB), Preprocessing(interpolation="cubic"))
    with pytest.raises(UserError, match=r"x.png cannot be decoded \(not an image\)"):
        preprocess_image(b"nothing", Preprocessing(), "x.png")
