"""TFDS's own builder of scene_parse150, on small archives in the publisher's layout."""

import io
import os
import types
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from mask_fixture import CLASSES, SIZES, files, png, values
from PIL import Image

from mambaout_jax.data.segmentation.masks import decode
from mambaout_jax.data.sources import Dataset, open_source
from mambaout_jax.errors import UserError


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Returns a function that builds the dataset with a function of a number as the masks."""
    from tensorflow_datasets.datasets.scene_parse150 import scene_parse150_dataset_builder

    gfile = types.SimpleNamespace(listdir=os.listdir)  # all that it needs of TensorFlow
    tensorflow = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
    monkeypatch.setattr(scene_parse150_dataset_builder, "tf", tensorflow)
    with tfds.core.registered.skip_registration():

        class Builder(scene_parse150_dataset_builder.Builder):
            name = "scene_parse150"
            pkg_dir_path = tfds.core.tfds_path("datasets/scene_parse150")
            code_path = None  # without importlib_resources, TFDS cannot look for the
            url_infos: ClassVar[dict] = {}  # builder's files and its checksums

    unpacked = {"images": str(tmp_path / "a"), "annotations": str(tmp_path / "b")}
    monkeypatch.setattr(
        tfds.download.DownloadManager, "download_and_extract", lambda *_: dict(unpacked)
    )

    def build(mask):
        for split in ("training", "validation"):
            images = tmp_path / "a" / "images" / split
            masks = tmp_path / "b" / "annotations_instance" / split
            images.mkdir(parents=True)
            masks.mkdir(parents=True)
            for number in range(3):
                (images / f"ADE_{number}.jpg").write_bytes(files(number)[0])
                (masks / f"ADE_{number}.png").write_bytes(mask(number))
        Builder(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
        data = Dataset(
            "tfds", "scene_parse150", str(tmp_path), "train", "test", CLASSES, "segmentation", True
        )
        return [open_source(data, split) for split in ("train", "test")]

    return build


def test_masks_of_one_channel_are_read(build):
    for source in build(lambda number: files(number)[1]):
        records = [source[index] for index in range(3)]
        assert {(record["image"], record["label"]) for record in records} == {
            files(number) for number in range(3)
        }
        image, labels = decode(records[0], source.mask_labels)
        assert labels.shape == (image.height, image.width)


def test_masks_of_instances_are_refused(build):
    def instances(number):
        classes = values(number, SIZES[number])
        return png(np.stack([classes, classes + 1, 0 * classes], axis=-1))

    source, _ = build(instances)
    assert Image.open(io.BytesIO(source[0]["label"])).mode == "RGB"
    with pytest.raises(
        UserError,
        match=r"'annotation' of scene_parse150/1.0.0/train\[0\] has mode RGB: .*instances",
    ):
        decode(source[0], source.mask_labels)
