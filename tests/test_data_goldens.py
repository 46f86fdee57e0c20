"""Pixels against those that timm makes of the same images."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mambaout_jax.data import image_ops
from mambaout_jax.data.preprocess import Preprocessing, preprocess_image

GOLDENS = Path(__file__).parent / "goldens"
EVALUATION_CASES = json.loads((GOLDENS / "eval-preprocess.json").read_text())
OPERATION_CASES = json.loads((GOLDENS / "randaugment-ops.json").read_text())["cases"]


@pytest.mark.parametrize("case", EVALUATION_CASES, ids=lambda case: str(case["case"]))
def test_evaluation_pixels_equal_the_reference(case):
    with np.load(GOLDENS / "eval-preprocess.npz") as arrays:
        file, expected = (arrays[f"{case['case']}/{part}"] for part in ("file", "pixels"))
    preprocessing = Preprocessing(
        size=case["size"], crop_pct=case["crop_pct"], interpolation=case["interpolation"]
    )
    np.testing.assert_array_equal(preprocess_image(file.tobytes(), preprocessing), expected)


@pytest.mark.parametrize("name", sorted({case["op"] for case in OPERATION_CASES}))
def test_randaugment_operations_equal_the_reference(name):
    with np.load(GOLDENS / "randaugment-ops.npz") as arrays:
        for case in (case for case in OPERATION_CASES if case["op"] == name):
            image = Image.fromarray(arrays[case["key"].split("/")[0]])
            actual = image_ops.OPERATIONS[name](
                image, case["magnitude"], case["sign"], Image.Resampling.BICUBIC
            )
            np.testing.assert_array_equal(np.asarray(actual), arrays[case["key"]], case["key"])


def test_posterize_with_zero_bits_answers_black():
    image = Image.fromarray(np.full((4, 4, 3), 255, np.uint8))
    black = image_ops.OPERATIONS["PosterizeIncreasing"](image, 10.0, 1, Image.Resampling.BICUBIC)
    assert not np.asarray(black).any()


@pytest.mark.parametrize("level", [20.0, 25.0, 30.0])
def test_posterize_beyond_eight_bits_changes_nothing(level):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    same = image_ops.OPERATIONS["Posterize"](image, level, 1, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(same), np.asarray(image))
