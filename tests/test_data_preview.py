"""The contact sheet shows the pictures and writes a file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from configs import default
from mambaout_jax.data.pipeline import TrainBatches
from mambaout_jax.data.preview import contact_sheet


def test_sheet_holds_the_first_pictures():
    config = default.get_config()
    config.data.update(name="digits", num_classes=10, image_size=96, threads=2)
    config.batch_size = 4
    sheet = np.asarray(contact_sheet(TrainBatches(config), rows=2, columns=3))
    assert sheet.shape == (2 * 112, 3 * 96, 3)
    batches = TrainBatches(config)
    first, second = next(batches)["image"], next(batches)["image"]
    np.testing.assert_array_equal(sheet[:96, 96:192], first[1])
    np.testing.assert_array_equal(sheet[112:208, 192:], second[1])
    assert (sheet[208:, :96] < 128).any()  # the caption


def test_command_writes_a_file(tmp_path):
    command = [sys.executable, "-m", "mambaout_jax.data.preview"]
    command += ["--config=configs/quickstart.py", f"--output={tmp_path / 'sheet.png'}", "--rows=2"]
    root = Path(__file__).parents[1]
    subprocess.run(command, check=True, capture_output=True, cwd=root)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 8 * 96
