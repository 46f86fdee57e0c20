"""Evaluation of whole images: padded to a few shapes, each image once, labels as they are."""

import collections
import io

import numpy as np
import pytest
from mask_fixture import CLASSES, SIZES, files, folder_dataset, write_masks
from PIL import Image

from mambaout_jax.data.loader import EvalBatches, LoaderOptions
from mambaout_jax.data.segmentation.whole import WholeImages, merge_shapes
from mambaout_jax.data.sources import Dataset
from mambaout_jax.errors import UserError

LOADER = LoaderOptions(workers=0, threads=2, backend="auto")
OPTIONS = WholeImages(short_side=64, long_side=160, max_shapes=3)
COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_masks(tmp_path_factory.mktemp("masks"), validation=COUNT)


def batches_of(folder, options=OPTIONS, batch_size=4, dataset=None, **process):
    dataset = dataset or folder_dataset(folder)
    return EvalBatches(dataset, options, batch_size=batch_size, loader=LOADER, **process)


def rows_of(batches):
    """The images of batches as (image, label) without padding."""
    rows = []
    for batch in batches:
        for row in np.flatnonzero(batch["mask"]):
            height, width = batch["input_size"][row]
            label_height, label_width = batch["label_size"][row]
            image, label = batch["image"][row], batch["label"][row]
            rows.append((image[:height, :width], label[:label_height, :label_width]))
            assert (image[height:] == (124, 116, 104)).all()
            assert (image[:, width:] == (124, 116, 104)).all()
            assert (label[label_height:] == 255).all()
            assert (label[:, label_width:] == 255).all()
    return rows


def expected_rows():
    rows = []
    for number in range(COUNT):
        image, mask = (Image.open(io.BytesIO(file)) for file in files(number))
        width, height = image.size
        factor = min(64 / min(image.size), 160 / max(image.size))
        size = int(width * factor + 0.5), int(height * factor + 0.5)
        labels = np.asarray(mask).astype(int) - 1
        resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        rows.append((resized, np.where(labels < 0, 255, labels)))
    return rows


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("process_count", [1, 2])
def test_each_image_is_there_once_with_its_original_labels(folder, process_count):
    sets = [
        batches_of(folder, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    assert sets[0].num_examples == COUNT
    lists = [list(batches) for batches in sets]
    assert {len(batches) for batches in lists} == {len(sets[0])}
    for step in zip(*lists, strict=True):  # the same shapes on each process
        assert len({batch["image"].shape for batch in step}) == 1
        assert len({batch["label"].shape for batch in step}) == 1
    found = rows_of(batch for batches in lists for batch in batches)
    expected = expected_rows()
    assert len(found) == COUNT
    for row in expected:
        assert sum(same(row, other) for other in found) == 1


def test_batches_have_few_shapes_of_multiples_of_32(folder):
    batches = list(batches_of(folder))
    shapes = {batch["image"].shape for batch in batches}
    assert len(shapes) == OPTIONS.max_shapes
    assert len(SIZES) > OPTIONS.max_shapes
    assert all(side % 32 == 0 for shape in shapes for side in shape[1:3])
    assert {(key, value.dtype.name) for key, value in batches[0].items()} == {
        ("image", "uint8"),
        ("label", "uint8"),
        ("input_size", "int32"),
        ("label_size", "int32"),
        ("mask", "bool"),
    }
    assert [batch["image"].shape for batch in batches_of(folder)] == [
        batch["image"].shape for batch in batches
    ]
    assert (
        len(
            {
                batch["image"].shape
                for batch in batches_of(folder, WholeImages(64, 160, max_shapes=1))
            }
        )
        == 1
    )


def test_shapes_are_merged_where_little_is_padded():
    shapes = [(512, 704)] * 50 + [(512, 736)] + [(512, 2048)] + [(704, 512)] * 9
    chosen = merge_shapes(shapes, 3)
    assert chosen == {
        (512, 704): (512, 704),
        (512, 736): (512, 2048),
        (512, 2048): (512, 2048),
        (704, 512): (704, 512),
    }
    assert set(merge_shapes(shapes, 1).values()) == {(704, 2048)}
    assert merge_shapes(shapes, 9) == {shape: shape for shape in shapes}


def test_any_number_of_shapes_covers_random_ones():
    rng = np.random.default_rng(0)
    shapes = [tuple((32 * rng.integers(1, 9, 2)).tolist()) for _ in range(60)]
    for most in (1, 4, 20):
        chosen = merge_shapes(shapes, most)
        assert set(chosen) == set(shapes)
        assert len(collections.Counter(chosen.values())) <= most
        assert all(c[0] >= s[0] and c[1] >= s[1] for s, c in chosen.items())


def test_a_wrong_mask_ends_the_evaluation_with_its_name(tmp_path):
    folder = write_masks(tmp_path / "data")
    Image.new("L", (9, 9)).save(folder / "annotations" / "validation" / "03.png")
    with pytest.raises(UserError, match=r"validation/03.png has 9 x 9 pixels, and its image"):
        list(batches_of(folder))
    (folder / "images" / "validation" / "04.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"validation/04.jpg cannot be decoded"):
        batches_of(folder)


def test_synthetic_images_are_of_one_shape():
    dataset = Dataset("synthetic", "", "", "train", "6", CLASSES, "segmentation")
    batches = list(batches_of(None, dataset=dataset))
    assert [batch["mask"].sum() for batch in batches] == [4, 2]
    assert batches[0]["image"].shape == (4, 64, 64, 3)
    assert (batches[0]["input_size"] == 64).all()
    assert (batches[0]["label_size"] == 64).all()
    assert batches[0]["label"].max() == CLASSES - 1


def test_other_scales_are_resized_from_the_original(folder):
    options = WholeImages(short_side=64, long_side=160, scales=(1.0, 0.5, 1.25), max_shapes=2)
    batches = list(batches_of(folder, options))
    assert len({batch["image"].shape for batch in batches}) == 2
    expected = []
    for number in range(COUNT):
        image = Image.open(io.BytesIO(files(number)[0]))
        factor = min(80 / min(image.size), 200 / max(image.size))
        size = tuple(int(side * factor + 0.5) for side in image.size)
        expected.append(np.asarray(image.resize(size, Image.Resampling.BILINEAR)).tobytes())
    found = []
    for batch in batches:
        assert batch["image_1"].shape[1] < batch["image"].shape[1]
        for row in np.flatnonzero(batch["mask"]):
            height, width = batch["input_size_2"][row]
            found.append(batch["image_2"][row, :height, :width].tobytes())
            assert (batch["image_2"][row, height:] == (124, 116, 104)).all()
    assert sorted(found) == sorted(expected)
    dataset = Dataset("synthetic", "", "", "train", "4", CLASSES, "segmentation")
    (batch,) = batches_of(None, options, dataset=dataset)
    assert batch["image_2"].shape == (4, 96, 96, 3)
    assert (batch["input_size_2"] == 80).all() or (batch["input_size_2"] == 96).all()


@pytest.mark.slow
def test_worker_processes_change_nothing(folder):
    loader = LoaderOptions(workers=2, threads=2, backend="auto")
    batches = EvalBatches(folder_dataset(folder), OPTIONS, batch_size=4, loader=loader)
    for found, expected in zip(batches, batches_of(folder), strict=True):
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
