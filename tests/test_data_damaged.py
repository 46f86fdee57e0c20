"""Damaged pictures: replaced, counted and named in training, an error in evaluation."""

import shutil

import numpy as np
import pytest
from absl import logging
from imagenet_fixture import jpeg

from configs import default
from mambaout_jax.data.loader import EvalBatches, TrainBatches
from mambaout_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in order, of which numbers 3 and 4 are damaged."""
    directory = tmp_path / "train" / "class"
    directory.mkdir(parents=True)
    for number in range(12):
        (directory / f"{number:02d}.JPEG").write_bytes(jpeg(number))
    (directory / "03.JPEG").write_bytes(b"no picture")
    without_tables = jpeg(4).replace(b"\xff\xdb", b"\xff\xef")  # found out while decoding
    (directory / "04.JPEG").write_bytes(without_tables)
    return tmp_path


def config(folder, max_bad_fraction=0.2, workers=0, backend="auto"):
    config = default.get_config()
    config.data.update(source="folder", dir=str(folder), num_classes=1, image_size=16)
    config.data.update(threads=2, workers=workers, backend=backend, eval_split="train")
    config.augment.update(max_bad_fraction=max_bad_fraction)
    config.batch_size = config.eval.batch_size = 12
    return config


@pytest.mark.parametrize(("workers", "backend"), [(0, "pillow"), (1, "auto")])
def test_training_replaces_counts_and_names_once(folder, caplog, workers, backend):
    logging.get_absl_logger().propagate = True
    whole = shutil.copytree(folder, folder.with_name(f"whole{workers}"))
    for number in (3, 4):
        (whole / "train" / "class" / f"{number:02d}.JPEG").write_bytes(jpeg(5))
    batches = TrainBatches(config(folder, workers=workers, backend=backend))
    expected = TrainBatches(config(whole))
    for _ in range(2):
        batch, replaced = next(batches), next(expected)
        np.testing.assert_array_equal(batch["image"], replaced["image"])
        assert batch["replaced"].sum() == 2
    batches.close()
    names = {str(folder / "train" / "class" / name) for name in ("03.JPEG", "04.JPEG")}
    assert batches.bad_pictures == names
    assert "takes its place (2 of at most 2)" in caplog.text
    for name in names:
        assert sum(name in record.getMessage() for record in caplog.records) == 1


def test_too_many_stop_the_run(folder):
    with pytest.raises(UserError, match=r"More than 1 training pictures .*max_bad_fraction"):
        next(TrainBatches(config(folder, max_bad_fraction=0.1)))
    for picture in (folder / "train" / "class").iterdir():
        picture.write_bytes(b"")
    with pytest.raises(UserError, match="More than 2 training pictures cannot be decoded"):
        next(TrainBatches(config(folder)))


def test_evaluation_names_the_damaged_picture(folder):
    with pytest.raises(UserError, match=r"0[34].JPEG cannot be decoded"):
        list(EvalBatches(config(folder)))
