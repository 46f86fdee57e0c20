"""Damaged images: replaced, counted and named in training, an error in evaluation."""

import shutil

import numpy as np
import pytest
from batches import eval_batches, train_batches
from imagenet_fixture import jpeg

from configs import default
from mambaout_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Twelve images in order, of which numbers 3 and 4 are damaged."""
    directory = tmp_path / "train" / "class"
    directory.mkdir(parents=True)
    for number in range(12):
        (directory / f"{number:02d}.JPEG").write_bytes(jpeg(number))
    (directory / "03.JPEG").write_bytes(b"not an image")
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
    whole = shutil.copytree(folder, folder.with_name(f"whole{workers}"))
    for number in (3, 4):
        (whole / "train" / "class" / f"{number:02d}.JPEG").write_bytes(jpeg(5))
    batches = train_batches(config(folder, workers=workers, backend=backend))
    expected = train_batches(config(whole))
    for _ in range(2):
        batch, replaced = next(batches), next(expected)
        np.testing.assert_array_equal(batch["image"], replaced["image"])
        assert batch["replaced"].sum() == 2
    batches.close()
    names = {str(folder / "train" / "class" / name) for name in ("03.JPEG", "04.JPEG")}
    assert batches.bad_images == names
    assert "The next image replaces it (2 of at most 2)" in caplog.text
    for name in names:
        assert sum(name in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("max_bad_fraction", [0.1, 0.001, 0.0])
def test_one_bad_image_is_always_tolerated_and_two_must_be_allowed(folder, max_bad_fraction):
    limited = config(folder, max_bad_fraction)
    with pytest.raises(
        UserError,
        match=r"^2 of 12 training images could not be decoded; the limit is 1: repair .*03.JPEG, "
        r".*04.JPEG, or raise augment.max_bad_fraction$",
    ):
        next(train_batches(limited))
    (folder / "train" / "class" / "03.JPEG").write_bytes(jpeg(3))
    batches = train_batches(limited)
    assert [next(batches)["replaced"].sum() for _ in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("max_bad_fraction", "message"),
    [(0.2, "3 of 12 training images could not be decoded"), (1.0, "none of the 12 training")],
)
def test_nothing_but_bad_images_stops_the_run(folder, max_bad_fraction, message):
    for image in (folder / "train" / "class").iterdir():
        image.write_bytes(b"")
    with pytest.raises(UserError, match=message):
        next(train_batches(config(folder, max_bad_fraction)))


def test_evaluation_names_the_damaged_image(folder):
    with pytest.raises(UserError, match=r"0[34].JPEG cannot be decoded"):
        list(eval_batches(config(folder)))
