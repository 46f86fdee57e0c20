"""The shapes: the same images and masks everywhere, in both forms that they are written in."""

import hashlib

import numpy as np
import pytest

from mambaout_jax.data.segmentation.masks import decode
from mambaout_jax.data.shapes import images
from mambaout_jax.data.shapes.__main__ import main
from mambaout_jax.data.sources import Dataset, open_source
from mambaout_jax.errors import UserError

SIZES = ["--train=3", "--validation=2"]
DIGESTS = {
    ("train", 0): "7aba429ea84752909edb283fb76163e73b2abd77bd103d3390a302d93c1220ca",
    ("train", 599): "10f84795e738cbcf4bb04d493749b30d94144b94a11e98a1e17fcc3147fea606",
    ("validation", 99): "ba98e7431d3b611a909361da83eeba643fbbf8271f10448b8f3666e8962bf200",
}


@pytest.mark.parametrize("place", DIGESTS)
def test_the_pixels_are_pinned(place):
    image, labels = images.make_pixels(*place)
    assert (image.shape, image.dtype) == ((images.SIZE, images.SIZE, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((images.SIZE, images.SIZE), np.uint8)
    digest = hashlib.sha256(image.tobytes() + labels.tobytes()).hexdigest()
    assert digest == DIGESTS[place]


def test_every_class_has_pixels_and_none_is_a_colour():
    made = [images.make_pixels("validation", index) for index in range(100)]
    pixels = np.concatenate([image.reshape(-1, 3) for image, _ in made])
    labels = np.concatenate([labels.ravel() for _, labels in made])
    counts = np.bincount(labels, minlength=len(images.CLASSES))
    assert counts[0] > counts[1:].sum()
    assert counts[1:].min() > 0.7 * counts[1:].max()
    means = np.stack([pixels[labels == label].mean(axis=0) for label in range(7)])
    assert np.abs(means - means.mean(axis=0)).max() < 0.1 * 255


@pytest.mark.parametrize("kind", ["tfds", "folder"])
def test_both_forms_hold_the_same_files(tmp_path, kind):
    main([f"--output={tmp_path}", *SIZES, *(["--folders"] if kind == "folder" else [])])
    dataset = Dataset(kind, "shapes", str(tmp_path), "train", "validation", 7, "segmentation")
    for split, count in (("train", 3), ("validation", 2)):
        source = open_source(dataset, split)
        assert source.class_names == list(images.CLASSES)
        records = [source[index] for index in range(len(source))]
        assert {(record["image"], record["label"]) for record in records} == {
            images.make_files(split, index) for index in range(count)
        }
    record = min(records, key=lambda record: record["image"] != images.make_files(split, 0)[0])
    pixels, labels = images.make_pixels(split, 0)
    image, decoded = decode(record, source.mask_labels)
    np.testing.assert_array_equal(np.asarray(image), pixels)
    np.testing.assert_array_equal(decoded, labels)
    with pytest.raises(UserError, match="exists: remove it, or choose another --output"):
        main([f"--output={tmp_path}", *SIZES, *(["--folders"] if kind == "folder" else [])])


def test_no_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="expected an image or more in each"):
        main([f"--output={tmp_path}", "--train=0"])
    assert not list(tmp_path.iterdir())
