"""The contact sheet shows the images and writes a file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from batches import train_batches
from mask_fixture import CLASSES, folder_dataset, write_masks
from PIL import Image

from configs import default
from mambaout_jax.data.loader import LoaderOptions, TrainBatches
from mambaout_jax.data.preview import contact_sheet, save
from mambaout_jax.data.segmentation.augment import SegmentationAugmentation
from mambaout_jax.data.segmentation.drawing import overlay
from mambaout_jax.errors import UserError


def test_sheet_holds_the_first_images():
    config = default.get_config()
    config.data.update(name="digits", num_classes=10, image_size=96, threads=2)
    config.batch_size = 4
    sheet = np.asarray(contact_sheet(train_batches(config), rows=2, columns=3))
    assert sheet.shape == (2 * 112, 3 * 96, 3)
    batches = train_batches(config)
    first, second = next(batches)["image"], next(batches)["image"]
    np.testing.assert_array_equal(sheet[:96, 96:192], first[1])
    np.testing.assert_array_equal(sheet[112:208, 192:], second[1])
    assert (sheet[208:, :96] < 128).any()  # the caption


def test_masks_are_drawn_over_their_images(tmp_path):
    options = SegmentationAugmentation(crop_size=96, scale=(256, 96), ratio_range=(1.0, 1.0))
    loader = LoaderOptions(workers=0, threads=1, backend="auto")
    batches = [
        TrainBatches(
            folder_dataset(write_masks(tmp_path / str(copy))),
            options,
            batch_size=4,
            seed=0,
            repeats=1,
            max_bad_fraction=0.0,
            loader=loader,
        )
        for copy in range(2)
    ]
    sheet = np.asarray(contact_sheet(batches[0], rows=1, columns=2))
    assert sheet.shape == (112, 2 * 96, 3)
    batch = next(batches[1])
    expected = overlay(batch["image"][1], batch["label"][1], CLASSES)
    np.testing.assert_array_equal(sheet[:96, 96:], expected)
    assert (sheet[96:, 96:] < 128).any()  # the caption


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("sheet.doc", "expected a .png, .jpg or .webp file"),
        ("none/sheet.png", "cannot be written: No such"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path, output, message):
    with pytest.raises(UserError, match=message):
        save(Image.new("RGB", (4, 4)), str(tmp_path / output))


@pytest.mark.parametrize("module", ["cli", "data"])  # the command's name, and its former one
def test_command_writes_a_file(tmp_path, module):
    command = [sys.executable, "-m", f"mambaout_jax.{module}.preview"]
    command += ["--config=configs/quickstart.py", f"--output={tmp_path / 'sheet.png'}", "--rows=2"]
    root = Path(__file__).parents[1]
    subprocess.run(command, check=True, capture_output=True, cwd=root)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 8 * 96
