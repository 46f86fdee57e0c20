"""Sources of images with masks, and one clear sentence for each mistake."""

import pickle

import numpy as np
import pytest
from mask_fixture import (
    CLASSES,
    SIZES,
    files,
    folder_dataset,
    png,
    values,
    write_masks,
    write_tfds_masks,
)
from PIL import Image

from mambaout_jax.data.decoding import BadImageError
from mambaout_jax.data.segmentation.masks import MaskLabels, decode
from mambaout_jax.data.sources import Dataset, open_source
from mambaout_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return write_masks(tmp_path / "data")


def opened(folder, **options):
    return open_source(folder_dataset(folder, **options), "training")


def test_a_folder_gives_the_encoded_pairs(folder):
    source = opened(folder)
    assert (source.name, len(source), source.num_classes) == ("data/training", 12, CLASSES)
    record = source[7]
    assert (record["image"], record["label"]) == files(7)
    assert record["name"] == source.name_of(7) == str(folder / "images" / "training" / "07.jpg")
    assert record["label_name"] == str(folder / "annotations" / "training" / "07.png")
    assert pickle.loads(pickle.dumps(source))[7] == record


@pytest.mark.parametrize("names", [None, ["none", "a", "b", "c", "d", "e"]])
def test_tfds_gives_the_same_files(tmp_path, names):
    source = open_source(write_tfds_masks(tmp_path, names), "train")
    assert source.class_names == (names[1:] if names else [f"class {k}" for k in range(5)])
    records = [pickle.loads(pickle.dumps(source))[index] for index in range(12)]
    assert {(record["image"], record["label"]) for record in records} == {
        files(number) for number in range(12)
    }
    assert records[3]["label_name"] == "'annotation' of scene_masks/1.0.0/train[3]"


def test_labels_are_reduced_by_one_and_255_stays():
    table = MaskLabels(150, reduce_zero_label=True).table()
    assert (table[0], table[1], table[150], table[255]) == (255, 0, 149, 255)
    table = MaskLabels(150, reduce_zero_label=False).table()
    assert (table[0], table[1], table[149], table[255]) == (0, 1, 149, 255)


def test_decoded_labels_are_the_values_less_one(folder):
    source = opened(folder)
    image, labels = decode(source[2], source.mask_labels)
    assert image.size == SIZES[2]
    expected = values(2, SIZES[2]).astype(int) - 1
    np.testing.assert_array_equal(labels, np.where(expected < 0, 255, expected))


def test_a_palette_and_two_values_are_labels_too(folder):
    source = opened(folder)
    indexed = Image.fromarray(values(0, SIZES[0])).convert("P")
    indexed.putdata(values(0, SIZES[0]).ravel().tolist())
    indexed.putpalette([7, 7, 7] * 256)
    file = folder / "annotations" / "training" / "00.png"
    _, expected = decode(source[0], source.mask_labels)
    indexed.save(file)
    assert Image.open(file).mode == "P"
    np.testing.assert_array_equal(decode(source[0], source.mask_labels)[1], expected)
    Image.fromarray(values(0, SIZES[0]) > 2).save(file)
    assert Image.open(file).mode == "1"
    two = decode(source[0], MaskLabels(2, reduce_zero_label=False))[1]
    np.testing.assert_array_equal(two, values(0, SIZES[0]) > 2)


def test_classes_are_named_by_a_file(folder):
    (folder / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
        + "".join(
            f"{k}\t0.1\t11\t1\t1\t{name}\n"
            for k, name in enumerate(["wall", "building;edifice", "sky", "floor", "bed "], 1)
        )
    )
    assert opened(folder).class_names == ["wall", "building", "sky", "floor", "bed"]
    (folder / "classes.txt").write_text("a\nb\nc\n")
    assert opened(folder, num_classes=None).class_names == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"training has 3 classes, but the model has 5"):
        opened(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a\n\nc\n", r"line 2 of .*classes.txt is empty"),
        (b"a\nb\na\n", r"line 3 of .*classes.txt names 'a' again"),
        (b"\xff\n", r"classes.txt cannot be read as UTF-8"),
    ],
)
def test_a_bad_list_of_classes_is_refused(folder, text, message):
    (folder / "classes.txt").write_bytes(text)
    with pytest.raises(UserError, match=message):
        opened(folder, num_classes=None)


def test_mistakes_in_a_folder_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"has no classes.txt .*: set data.num_classes"):
        opened(folder, num_classes=None)
    with pytest.raises(UserError, match=r"no folder .*nowhere': expected one with images/training"):
        opened(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no folder images/valid; did you mean 'validation'\?"):
        open_source(folder_dataset(folder), "valid")
    with pytest.raises(UserError, match=r"folders of images and masks are read from a disk"):
        open_source(
            Dataset("folder", "", "gs://bucket", "training", "", 2, "segmentation"), "training"
        )
    with pytest.raises(UserError, match=r"has 255 classes: expected 254 at most"):
        opened(folder, num_classes=255)
    lost = folder / "annotations" / "training" / "03.png"
    mask = lost.read_bytes()
    lost.unlink()
    with pytest.raises(UserError, match=r"training/03.jpg has no mask: expected .*/03.png$"):
        opened(folder)
    lost.write_bytes(mask)
    for name in ("20.png", "21.png"):
        (folder / "annotations" / "training" / name).write_bytes(mask)
    with pytest.raises(UserError, match=r"mask .*/20.png has no image in .*\(and 1 more\)$"):
        opened(folder)


def test_tfds_without_masks_is_refused():
    digits = Dataset("tfds", "digits", "", "train", "", 10, "segmentation")
    with pytest.raises(UserError, match=r"has no images with masks: its features are file_name"):
        open_source(digits, "train")


GREY = values(0, SIZES[0])


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (png(GREY[1:]), UserError, r"00.png has 96 x 63 pixels, and its image .*00.jpg 96 x 64"),
        (png(GREY + 2), UserError, r"00.png has the label 7, but the 5 classes are 1 to 5"),
        (png(GREY.astype(np.uint16)), UserError, r"00.png has 16 bits or more: expected one ch"),
        (
            png(np.repeat(GREY[..., None], 3, 2)),
            UserError,
            r"00.png has mode RGB: expected one channel",
        ),
        (png(GREY)[:60], BadImageError, r"00.png cannot be decoded"),
        (b"", BadImageError, r"00.png cannot be decoded \(not an image\)"),
    ],
)
def test_bad_masks_are_named(folder, mask, error, message):
    (folder / "annotations" / "training" / "00.png").write_bytes(mask)
    source = opened(folder)
    with pytest.raises(UserError, match=message) as caught:
        decode(source[0], source.mask_labels)
    assert type(caught.value) is error
