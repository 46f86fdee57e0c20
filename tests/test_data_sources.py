"""Sources: their examples, and one clear sentence for each mistake."""

import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from imagenet_fixture import jpeg, write_imagenet
from PIL import Image

from configs import default
from mambaout_jax.build_data import build_dataset
from mambaout_jax.data.sources import open_source
from mambaout_jax.errors import UserError


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def folder(tmp_path):
    for split, classes in (("train", "abc"), ("val", "ac")):
        for number, name in enumerate(classes):
            (tmp_path / split / name).mkdir(parents=True)
            for image in range(2):
                (tmp_path / split / name / f"{image}.JPEG").write_bytes(jpeg(number))
    return tmp_path


def data(**options):
    config = default.get_config()
    config.data.update(options)
    return build_dataset(config)


def folder_data(folder, **options):
    return data(source="folder", dir=str(folder), num_classes=3, **options)


def test_imagenet_gives_the_encoded_file(imagenet):
    source = open_source(data(dir=str(imagenet)), "train")
    assert (len(source), source.num_classes, source.class_names[0]) == (64, 1000, "n01440764")
    files = {jpeg(number): number * 37 % 1000 for number in range(64)}
    for index in range(64):
        record = source[index]
        assert files.pop(record["image"]) == record["label"]
        assert record["name"].startswith(f"imagenet2012/5.1.0/train[{index}] (train_")


def test_tfds_takes_its_directory_from_the_environment(imagenet, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(imagenet))
    assert len(open_source(data(), "validation")) == 20
    assert len(open_source(data(name="imagenet2012:5.1.0"), "train[:25%]")) == 16


def test_sources_travel_to_worker_processes(imagenet, folder):
    for source in (
        open_source(data(dir=str(imagenet)), "train[:10]"),
        open_source(folder_data(folder), "train"),
    ):
        copy = pickle.loads(pickle.dumps(source))
        assert len(copy) == len(source)
        assert copy[3] == source[3]


def test_digits_ship_with_the_package():
    source = open_source(data(name="digits", num_classes=10), "train")
    held_out = open_source(data(name="digits", num_classes=10), "validation")
    assert (len(source), len(held_out)) == (1437, 360)
    labels = [held_out[index]["label"] for index in range(360)]
    np.testing.assert_array_equal(np.bincount(labels), [36] * 10)


def test_digits_are_what_their_builder_makes():
    from mambaout_jax.data.digits.digits_dataset_builder import Builder

    source = open_source(data(name="digits", num_classes=10), "validation")
    shipped = {source[i]["name"].split("(")[1][:-1]: source[i] for i in range(len(source))}
    made = dict(Builder._generate_examples(None, held_out=True))
    assert made.keys() == shipped.keys()
    for name, example in made.items():
        assert example["label"] == shipped[name]["label"]
        pixels = [
            np.asarray(Image.open(file))
            for file in (example["image"], io.BytesIO(shipped[name]["image"]))
        ]
        np.testing.assert_array_equal(*pixels)


def test_reading_never_loads_tensorflow_or_torch():
    script = (
        "import sys; from mambaout_jax.data.sources import Dataset, open_source;"
        "dataset = Dataset('tfds', 'digits', '', 'train', 'validation', 10);"
        "open_source(dataset, 'train')[0]; assert not {'tensorflow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_folder_numbers_classes_by_the_training_split(folder):
    source = open_source(folder_data(folder), "val")
    assert source.class_names == ["a", "b", "c"]
    assert [source[i]["label"] for i in range(len(source))] == [0, 0, 2, 2]
    assert source[3]["name"] == str(folder / "val" / "c" / "1.JPEG")
    assert source[3]["image"] == jpeg(1)


def test_data_not_prepared_names_the_command(tmp_path):
    with pytest.raises(UserError, match="tfds build imagenet2012 --file_format=array_record") as e:
        open_source(data(dir=str(tmp_path)), "train")
    assert f"--data_dir={tmp_path}" in str(e.value)


@pytest.mark.parametrize(("name", "meant"), [("imagenet2013", "imagenet2012"), ("digit", "digits")])
def test_a_name_with_a_typo_names_a_dataset_that_is_there(imagenet, name, meant):
    with pytest.raises(UserError, match=rf"no dataset '{name}' in .*; did you mean '{meant}'\?"):
        open_source(data(dir=str(imagenet), name=name), "train")


def test_tfrecord_names_the_conversion(imagenet, tmp_path):
    version = tmp_path / "imagenet2012" / "5.1.0"
    version.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json", "label.labels.txt"):
        (version / name).write_bytes((imagenet / "imagenet2012" / "5.1.0" / name).read_bytes())
    info = json.loads((version / "dataset_info.json").read_text())
    (version / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=r"tfds convert_format .*--out_file_format=array_record"):
        open_source(data(dir=str(tmp_path)), "train")


def test_array_record_beside_tfrecord_is_read(imagenet, tmp_path):
    version = shutil.copytree(imagenet / "imagenet2012" / "5.1.0", tmp_path / "5.1.0")
    info = json.loads((version / "dataset_info.json").read_text())
    info |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    (version / "dataset_info.json").write_text(json.dumps(info))
    assert len(open_source(data(dir=str(version)), "train")) == 64


def test_unknown_splits_name_the_known_ones(imagenet, folder):
    with pytest.raises(UserError, match=r"no split 'test' \(its splits are train, validation;"):
        open_source(data(dir=str(imagenet)), "test")
    with pytest.raises(
        UserError,
        match=r"no split 'validation' \(its folders are train, val\)",
    ):
        open_source(folder_data(folder), "validation")


def test_class_count_must_fit(imagenet):
    with pytest.raises(
        UserError, match=r"has 1000 classes, but the model has 10: .*\.num_classes=1000"
    ):
        open_source(data(dir=str(imagenet), num_classes=10), "train")


def socket_at(path):
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.fspath(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a FIFO"),
        (socket_at, "a socket"),
        (lambda path: path.symlink_to("/dev/null"), "a device"),
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: path.symlink_to("nowhere"), "a broken link"),
    ],
)
def test_what_is_not_a_file_is_refused_when_the_folder_is_opened(folder, monkeypatch, make, kind):
    monkeypatch.chdir(folder / "train" / "b")  # the path of a socket is short
    make(Path("2.JPEG"))
    with pytest.raises(UserError, match=rf"b/2.JPEG is {kind}, not a file: remove it"):
        open_source(folder_data(folder), "train")


def test_folder_mistakes_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere': expected"):
        open_source(folder_data(tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match=r"no data directory: .* a folder with train/CLASS"):
        open_source(folder_data(""), "train[:99%]")
    (folder / "val" / "z").mkdir()
    with pytest.raises(UserError, match=r"z is a class that .*train does not have"):
        open_source(folder_data(folder), "val")
    (folder / "train" / "b" / "notes.txt").write_text("not an image")
    with pytest.raises(UserError, match=r"notes.txt is not an image"):
        open_source(folder_data(folder), "train")
    (folder / "train" / "b" / "notes.txt").unlink()
    for image in (folder / "train" / "b").iterdir():
        image.unlink()
    with pytest.raises(UserError, match=r"class folder .*b is empty"):
        open_source(folder_data(folder), "train")
