"""Augmentation of images with masks, against a plain reference by Pillow and NumPy."""

import dataclasses
import io

import numpy as np
import pytest
from mask_fixture import CLASSES, files, folder_dataset, write_masks
from PIL import Image

from mambaout_jax.data.loader import LoaderOptions, TrainBatches
from mambaout_jax.data.segmentation.augment import SegmentationAugmentation, draw_crop
from mambaout_jax.data.segmentation.photometric import distort
from mambaout_jax.data.segmentation.resizing import resized_size
from mambaout_jax.data.sources import Dataset, open_source
from mambaout_jax.errors import UserError

SMALL = SegmentationAugmentation(crop_size=48, scale=(256, 64))
LOADER = LoaderOptions(workers=0, threads=2, backend="auto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_masks(tmp_path_factory.mktemp("masks"))


def reference_distortion(pixels, rng):
    """Float32 arithmetic of mmsegmentation's description, on whole arrays."""

    def convert(array, alpha=1.0, beta=0.0):
        return np.clip(array.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    def hsv(array):
        return np.array(Image.fromarray(array).convert("HSV"))

    def rgb(array):
        size = array.shape[1], array.shape[0]
        return np.array(Image.frombytes("HSV", size, array.tobytes()).convert("RGB"))

    def contrast(array):
        if rng.random() < 0.5:
            return convert(array, alpha=rng.uniform(0.5, 1.5))
        return array

    if rng.random() < 0.5:
        pixels = convert(pixels, beta=rng.uniform(-32, 32))
    last = rng.random() < 0.5
    if not last:
        pixels = contrast(pixels)
    if rng.random() < 0.5:
        array = hsv(pixels)
        array[..., 1] = convert(array[..., 1], alpha=rng.uniform(0.5, 1.5))
        pixels = rgb(array)
    if rng.random() < 0.5:
        array = hsv(pixels)
        degrees = 2 * rng.integers(-18, 18)
        array[..., 0] = (array[..., 0].astype(int) + round(degrees / 360 * 256)) % 256
        pixels = rgb(array)
    return contrast(pixels) if last else pixels


def reference(image, mask, options, rng):
    """The pipeline of mmsegmentation for an image and a mask of labels 0 to CLASSES."""
    side = options.crop_size
    labels = np.where(mask == 0, 255, mask - 1).astype(np.uint8)
    height, width = labels.shape
    ratio = rng.uniform(*options.ratio_range)
    long, short = int(options.scale[0] * ratio), int(options.scale[1] * ratio)
    factor = min(long / max(height, width), short / min(height, width))
    size = int(width * factor + 0.5), int(height * factor + 0.5)
    image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    rows = ((np.arange(size[1]) + 0.5) * height / size[1]).astype(int)
    columns = ((np.arange(size[0]) + 0.5) * width / size[0]).astype(int)
    labels = labels[rows][:, columns]

    def box():
        top = rng.integers(max(size[1] - side, 0) + 1)
        left = rng.integers(max(size[0] - side, 0) + 1)
        return slice(top, top + side), slice(left, left + side)

    place = box()
    if size[1] > side or size[0] > side:  # else there is one box only
        for _ in range(10):
            found, counts = np.unique(labels[place], return_counts=True)
            counts = counts[found != 255]
            if len(counts) > 1 and counts.max() / counts.sum() < options.cat_max_ratio:
                break
            place = box()
    image, labels = image[place], labels[place]
    if rng.random() < 0.5:
        image, labels = image[:, ::-1], labels[:, ::-1]
    image = reference_distortion(np.ascontiguousarray(image), rng)
    rest = (0, side - labels.shape[0]), (0, side - labels.shape[1])
    channels = [
        np.pad(image[..., channel], rest, constant_values=value)
        for channel, value in enumerate((124, 116, 104))
    ]
    return np.stack(channels, -1), np.pad(labels, rest, constant_values=255)


@pytest.mark.parametrize("seed", range(40))
def test_pixels_and_labels_are_those_of_the_reference(folder, seed):
    source = open_source(folder_dataset(folder), "training")
    make = SMALL.examples(source, "auto")
    record = source[seed % 12]
    out = {name: np.zeros(shape, dtype) for name, shape, dtype in make.arrays}
    make(record, np.random.default_rng(seed), out)
    image, mask = (np.asarray(Image.open(io.BytesIO(file))) for file in files(seed % 12))
    expected = reference(image, mask.astype(int), SMALL, np.random.default_rng(seed))
    np.testing.assert_array_equal(out["image"], expected[0])
    np.testing.assert_array_equal(out["label"], expected[1])


def test_sizes_are_those_of_mmcv():
    assert resized_size((683, 512), (2048, 512)) == (683, 512)
    assert resized_size((500, 375), (2048, 512)) == (683, 512)
    assert resized_size((375, 500), (512, 2048)) == (512, 683)
    assert resized_size((4000, 500), (2048, 512)) == (2048, 256)
    assert resized_size((1000, 1), (50, 10)) == (50, 1)


def test_no_class_covers_a_crop_where_another_crop_exists():
    labels = np.zeros((200, 40), np.uint8)
    labels[100:] = 1

    def tops(ratio):
        boxes = [draw_crop(labels, 40, ratio, np.random.default_rng(s)) for s in range(200)]
        assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {(40, 40)}
        return [top for _, top, _, _ in boxes]

    # A drawn box is good with probability 19 / 161, one of eleven with probability 0.75.
    assert 0.05 < np.mean([70 < top < 90 for top in tops(1.0)]) < 0.2
    assert 0.65 < np.mean([70 < top < 90 for top in tops(0.75)]) < 0.85


def test_a_crop_of_one_class_is_taken_at_last():
    labels = np.zeros((50, 40), np.uint8)
    tops = {draw_crop(labels, 40, 0.75, np.random.default_rng(s))[1] for s in range(60)}
    assert tops == set(range(11))


def test_ignored_pixels_are_no_class_of_a_crop():
    labels = np.full((200, 40), 255, np.uint8)
    labels[:100] = 0
    labels[80:100, ::2] = 1  # below row 60 both are in a crop, and 0 covers less than 3/4
    tops = [draw_crop(labels, 40, 0.75, np.random.default_rng(s))[1] for s in range(30)]
    assert sum(60 < top < 100 for top in tops) > 25


def test_distortion_changes_colours_and_may_change_nothing():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    results = {distort(image, np.random.default_rng(seed)).tobytes() for seed in range(200)}
    assert image.tobytes() in results
    assert len(results) > 150


OPTIONS = {
    "scale": (64, 64),
    "ratio_range": (1.0, 1.0),
    "cat_max_ratio": 1.0,
    "hflip": 0.0,
    "photometric": False,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_examples(folder, name):
    changed = dataclasses.replace(SMALL, **{name: OPTIONS[name]})
    first, second = (next(train(folder, options)) for options in (SMALL, changed))
    assert any(not np.array_equal(first[key], second[key]) for key in ("image", "label"))


def train(folder, options=SMALL, loader=LOADER, dataset=None, **process):
    return TrainBatches(
        dataset or folder_dataset(folder),
        options,
        batch_size=12,
        seed=0,
        repeats=1,
        max_bad_fraction=0.0,
        loader=loader,
        **process,
    )


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_batches_have_labels_of_pixels_and_resume_exactly(folder):
    batches = train(folder)
    assert batches.made_by.startswith("Pillow in")
    straight = take(batches, 4)
    assert {key: (value.shape, value.dtype) for key, value in straight[0].items()} == {
        "image": ((12, 48, 48, 3), np.uint8),
        "label": ((12, 48, 48), np.uint8),
        "replaced": ((12,), np.bool_),
    }
    assert set(np.unique(straight[0]["label"])) == {*range(CLASSES), 255}
    resumed = train(folder)
    take(resumed, 1)
    state = resumed.state()
    take(resumed, 2)
    resumed.restore(state)
    assert_same(take(resumed, 3), straight[1:])
    parts = [take(train(folder, process_index=p, process_count=2), 2) for p in range(2)]
    joined = [
        {key: np.concatenate([part[step][key] for part in parts]) for key in straight[0]}
        for step in range(2)
    ]
    assert_same(joined, straight[:2])


@pytest.mark.slow
def test_worker_processes_change_nothing(folder):
    batches = train(folder, loader=dataclasses.replace(LOADER, workers=2))
    assert_same(take(batches, 2), take(train(folder), 2))
    batches.close()


def test_a_damaged_mask_is_replaced_and_a_wrong_one_is_named(tmp_path):
    folder = write_masks(tmp_path / "data")
    mask = folder / "annotations" / "training" / "05.png"
    mask.write_bytes(mask.read_bytes()[:50])
    batches = train(folder)
    assert next(batches)["replaced"].sum() == 1
    assert batches.bad_images == {str(folder / "images" / "training" / "05.jpg")}
    Image.new("L", (96, 64), 99).save(mask)  # the size of another image
    with pytest.raises(UserError, match=r"05.png has the label 99|05.png has 96 x 64 pixels"):
        next(train(folder))


def test_the_fast_backend_is_refused(folder):
    with pytest.raises(UserError, match=r"backend is 'fast', which has no augmentation of masks"):
        train(folder, loader=dataclasses.replace(LOADER, backend="fast"))


def test_synthetic_batches_have_random_labels():
    dataset = Dataset("synthetic", "", "", "train", "8", 7, "segmentation")
    batch = next(train(None, dataset=dataset))
    assert (batch["label"].shape, batch["label"].dtype) == ((12, 48, 48), np.uint8)
    assert set(np.unique(batch["label"])) == set(range(7))


@pytest.mark.slow
def test_a_mask_that_stays_unreadable_counts_as_bad(tmp_path):
    folder = write_masks(tmp_path / "data")
    mask = folder / "annotations" / "training" / "05.png"
    mask.unlink()
    mask.symlink_to("/proc/self/mem")  # whose first read fails with EIO
    batches = train(folder)
    assert next(batches)["replaced"].sum() == 1
    assert batches.bad_images == {str(folder / "images" / "training" / "05.jpg")}
