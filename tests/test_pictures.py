"""masks.png: held-out images beside their labels and predictions."""

import io
import struct

import numpy as np
import pytest
from etils import epath
from mask_fixture import folder_dataset, write_masks
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from mambaout_jax.data.loader import EvalBatches, LoaderOptions
from mambaout_jax.data.segmentation.whole import WholeImages
from mambaout_jax.training.pictures import Pictures, draw
from mambaout_jax.training.recorder import MASKS, Recorder

NAMES = ["wall", "$5 \udce9 sign", "sky", "floor", "tree"]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    dataset = folder_dataset(write_masks(tmp_path_factory.mktemp("masks"), train=1))
    preprocessing = WholeImages(short_side=64, long_side=256, max_shapes=2)
    loader = LoaderOptions(workers=0, threads=1, backend="pillow")
    return EvalBatches(dataset, preprocessing, batch_size=4, loader=loader)


def test_some_examples_are_those_of_the_evaluation(held_out):
    some = held_out.some(3)
    assert 2 <= len(some["image"]) <= 3
    assert some["mask"].all()
    evaluated = {
        batch["image"][row].tobytes(): {name: array[row] for name, array in batch.items()}
        for batch in held_out
        for row in range(len(batch["mask"]))
    }
    for row, image in enumerate(some["image"]):
        for name, array in evaluated[image.tobytes()].items():
            np.testing.assert_array_equal(some[name][row], array)
    assert len({image.tobytes() for image in some["image"]}) == len(some["image"])


def events(folder):
    """Returns the events of a folder's only file, which is a file of TFRecords."""
    (file,) = folder.iterdir()
    content, start, found = file.read_bytes(), 0, []
    while start < len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        found.append(Event.FromString(content[start + 12 : start + 12 + length]))
        start += 16 + length
    return found


def test_the_picture_is_a_file_and_an_event(held_out, tmp_path):
    batch = held_out.some(2)
    pictures = Pictures(batch, NAMES, predict=None)
    right, wrong = batch["label"].astype(np.int32), np.zeros(batch["label"].shape, np.int32)
    drawn = [draw(pictures, labels, "a $run\nstep 7") for labels in (right, wrong)]
    assert drawn[0] != drawn[1]
    with Recorder(epath.Path(tmp_path)) as recorder:
        recorder.picture(6, MASKS, drawn[1])
        recorder.picture(7, MASKS, drawn[0])
    assert (tmp_path / "masks.png").read_bytes() == drawn[0]
    with Image.open(io.BytesIO(drawn[0])) as image:
        width, height = image.size
    *_, before, last = events(tmp_path / "tensorboard")
    (value,) = last.summary.value
    assert (before.step, last.step, value.tag) == (6, 7, "eval/masks")
    assert (value.image.width, value.image.height) == (width, height)
    assert value.image.encoded_image_string == drawn[0]
