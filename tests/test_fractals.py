"""The fractals: the same images everywhere, in every form that they are written in."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from mambaout_jax.data.fractals import images, systems
from mambaout_jax.data.fractals.__main__ import main
from mambaout_jax.data.fractals.making import Plan, class_name, make_files
from mambaout_jax.data.sources import Dataset, open_source
from mambaout_jax.errors import UserError

CLASSES, TRAIN, VALIDATION = 2, 3, 2
SIZES = [f"--classes={CLASSES}", f"--train={TRAIN}", f"--validation={VALIDATION}", "--processes=2"]
# Of the pixels before they are encoded: a JPEG's bytes depend on the version of libjpeg.
DIGESTS = {
    (0, "train", 0): "e8aae3060d75f776bb1a6328163a8ce438c97e8feed11d38e34b33292cc20c48",
    (41, "train", 499): "778b7e2f596858d401ee7a381bea872e0afcc9e08a73d890b4adda238357bdbf",
    (99, "validation", 49): "4a7fc0b2549e8b225ee77183cde85e441e0bb8f93744faefeafe4accf419b1a2",
}


@pytest.mark.parametrize("place", DIGESTS)
def test_the_pixels_are_pinned(place):
    pixels = images.make_pixels(*place)
    assert (pixels.shape, pixels.dtype) == ((images.SIZE, images.SIZE, 3), np.uint8)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == DIGESTS[place]


def test_every_image_is_another():
    places = [(0, "train", 0), (0, "train", 1), (0, "validation", 0), (1, "train", 0)]
    made = [images.make_pixels(*place).tobytes() for place in places]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("label", [0, 33, 66, 99])
def test_an_attractor_is_drawn_and_filled(label):
    system = systems.class_system(label)
    assert np.abs(np.linalg.svd(system.matrices)[1]).max() < 1
    rng = np.random.default_rng(0)
    x, y, tint = systems.attractor(system, 5000, rng)
    assert len(x) == len(y) == len(tint) == 5000
    assert max(x.std(), y.std()) == pytest.approx(1)
    assert 0 <= tint.min() < tint.max() <= 1
    assert len(np.unique(systems.cells(x, y, 32))) > 0.12 * 32 * 32


def test_a_varied_system_is_near_its_own_and_contracts():
    system, rng = systems.class_system(7), np.random.default_rng(0)
    varied = system.varied(0.2, rng)
    assert 0 < np.abs(varied.turns - system.turns).max() <= 0.2
    assert 0 < np.abs(varied.scales / system.scales - 1).max() <= 0.2
    assert np.abs(varied.scales).max() <= 0.95


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The data set in both forms: (the folder of TFDS's, that of class folders)."""
    directory = tmp_path_factory.mktemp("fractals")
    main([f"--output={directory}", *SIZES])
    main([f"--output={directory / 'folders'}", "--folders", *SIZES])
    return directory, directory / "folders"


def records(kind, directory, split):
    dataset = Dataset(kind, "fractals", str(directory), "train", "validation", CLASSES)
    source = open_source(dataset, split)
    assert source.class_names == [class_name(label) for label in range(CLASSES)]
    found = [source[index] for index in range(len(source))]
    return {(record["label"], record["image"]) for record in found}


@pytest.mark.parametrize(("split", "count"), [("train", TRAIN), ("validation", VALIDATION)])
def test_both_forms_hold_the_same_files(written, split, count):
    expected = {
        (label, images.make_jpeg(label, split, index))
        for label in range(CLASSES)
        for index in range(count)
    }
    assert records("tfds", written[0], split) == expected
    assert records("folder", written[1], split) == expected
    file = next(iter(expected))[1]
    assert Image.open(io.BytesIO(file)).size == (images.SIZE, images.SIZE)


def test_timm_reads_the_folders(written):
    timm_data = pytest.importorskip("timm.data")
    dataset = timm_data.create_dataset("", root=str(written[1]), split="validation")
    assert [dataset[index][1] for index in range(len(dataset))] == [0, 0, 1, 1]


def test_the_number_of_processes_changes_nothing():
    made = [
        [(name, label, file.getvalue()) for name, label, file in make_files(plan, "train")]
        for plan in (Plan(2, {"train": 2}, processes) for processes in (1, 2))
    ]
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes=101"], "expected 2 to 100 classes"),
        (["--train=0"], "an image or more"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        main([f"--output={tmp_path}", *SIZES, *flags])
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(written):
    with pytest.raises(UserError, match="exists: remove it"):
        main([f"--output={written[0]}", *SIZES])
    with pytest.raises(UserError, match="has a train or validation folder"):
        main([f"--output={written[1]}", "--folders", *SIZES])
