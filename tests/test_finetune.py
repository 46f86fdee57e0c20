"""configs/finetune.py: splits, classes, batch and rate that follow a folder of images."""

import csv
import importlib.util
from pathlib import Path

import jax
import pytest
import small_run
import small_weights

from configs import finetune, in12k, in21k
from mambaout_jax import config as configuration
from mambaout_jax.build import build_run, build_schedule
from mambaout_jax.build_data import fill_in
from mambaout_jax.data.folder import FolderSource, find_splits
from mambaout_jax.errors import UserError
from mambaout_jax.finetune import finetune as from_python


def write_classes(folder, size=(8, 8), **counts):
    """Writes images of noise into a folder for each class."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            image = small_weights.image(100 * number + index, size)
            image.save(folder / name / f"{index:02d}.png")


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train/cat", "validation/cat"), ("train", "validation")),
        (("train/cat", "val/cat", "test/cat"), ("train", "val")),
        (("train/cat", "test/cat"), ("train", "test")),
        (("train/cat", "train/dog"), ("train[:80%]", "train[80%:]")),
        (("cat", "dog"), (".[:80%]", ".[80%:]")),
    ],
)
def test_splits_are_found(folders, splits, tmp_path):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    assert find_splits(str(tmp_path)) == splits


def test_a_part_of_a_split_is_one_of_each_class(tmp_path):
    write_classes(tmp_path / "train", cat=10, dog=4, eel=1)
    train, held_out = (
        FolderSource(str(tmp_path), split, "train[:80%]")
        for split in ("train[:80%]", "train[80%:]")
    )
    whole = FolderSource(str(tmp_path), "train", "train")
    assert train.class_names == held_out.class_names == ["cat", "dog", "eel"]
    files = [{s.name_of(index) for index in range(len(s))} for s in (train, held_out, whole)]
    assert (len(train), len(held_out)) == (8 + 3 + 1, 2 + 1)
    assert files[0] | files[1] == files[2]
    assert not files[0] & files[1]
    assert [held_out[index]["label"] for index in range(3)] == [0, 0, 1]
    assert held_out[0]["name"].endswith("train/cat/08.png")
    assert held_out.name == f"{tmp_path.name}/train[80%:]"
    assert len(FolderSource(str(tmp_path), "train[50%:60%]", "train")) == 2
    assert len(FolderSource(str(tmp_path / "train"), ".", ".")) == 15
    for split in (
        "train[",
        "train[:]x",
        "train[80%:20%]",
        "train[:120%]",
        "train[3:]",
        "train[::2]",
    ):
        with pytest.raises(UserError, match="is no part of a split: expected one such as"):
            FolderSource(str(tmp_path), split, "train")
    with pytest.raises(UserError, match="no split 'trian'; did you mean 'train'"):
        FolderSource(str(tmp_path), "trian[:80%]", "train")


def filled(directory, **keys):
    config = finetune.get_config()
    config.update_from_flattened_dict({"data.dir": str(directory), **keys})
    fill_in(config)
    configuration.check(config)
    return config


def test_classes_batch_and_rate_follow_the_images(tmp_path):
    write_classes(tmp_path, cat=90, dog=80, eel=2)
    config = filled(tmp_path)
    assert config.data.num_classes == 3
    assert (config.data.train_split, config.data.eval_split) == (".[:80%]", ".[80%:]")
    assert config.batch_size == config.eval.batch_size == 16  # 138 training images
    assert build_schedule(config, 8).peak == pytest.approx(5e-4 * 0.5)
    assert build_schedule(config, 8).end == pytest.approx(1e-5 * 0.5)
    given = filled(tmp_path, **{"batch_size": 32, "data.num_classes": 3, "eval.batch_size": 8})
    assert (given.batch_size, given.eval.batch_size) == (32, 8)
    assert build_schedule(given, 8).peak == pytest.approx(5e-4 * 0.5**0.5)
    given.optimizer.name = "sgd"
    assert build_schedule(given, 8).peak == pytest.approx(5e-4 * 0.5)
    given.schedule.reference_batch = 0
    assert build_schedule(given, 8).peak == 5e-4
    assert jax.device_count() == 8
    for name in ("cat", "dog"):
        for file in sorted((tmp_path / name).iterdir())[10:]:
            file.unlink()
    assert filled(tmp_path).batch_size == 8, "each of the eight devices gets an image"


def test_other_configs_are_left_alone():
    config = small_run.small_config()
    before = configuration.flatten(config)
    fill_in(config)
    assert configuration.flatten(config) == before


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="no images: expected --config"):
        fill_in(finetune.get_config())
    config = finetune.get_config()
    config.data.source = "tfds"
    with pytest.raises(UserError, match="train_split is '' and config"):
        fill_in(config)
    config = small_run.small_config(**{"batch_size": 0, "data.source": "tfsd"})
    with pytest.raises(UserError, match=r"data\.source is 'tfsd'; did you mean 'tfds'"):
        fill_in(config)
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="has the folder val and no folder train: expected both"):
        filled(tmp_path)
    (tmp_path / "val").rmdir()
    with pytest.raises(UserError, match="has no class folders"):
        filled(tmp_path)
    config = in12k.get_config()
    write_classes(tmp_path / "train", cat=1)
    config.data.dir = str(tmp_path)
    fill_in(config)
    assert config.data.num_classes == 11_821, "it is compared with the folder when a run is built"


@pytest.mark.parametrize(
    ("recipe", "listed"), [(in12k, "imagenet12k_synsets.txt"), (in21k, "imagenet22k_synsets.txt")]
)
def test_the_folders_of_large_imagenets_are_numbered_as_in_timm(recipe, listed, tmp_path):
    timm = importlib.util.find_spec("timm")
    if timm is None:
        pytest.skip("needs timm: pip install -e '.[verify]'")
    synsets = (Path(timm.origin).with_name("data") / "_info" / listed).read_text().split()
    config = recipe.get_config()
    assert config.data.num_classes == len(synsets)
    assert synsets == sorted(synsets), "class folders are numbered in the order of their names"
    write_classes(tmp_path / "train", **dict.fromkeys(synsets[:2] + synsets[-1:], 100))
    keys = {"data.dir": str(tmp_path), "batch_size": 8, "eval.batch_size": 8}
    keys |= {"data.image_size": 32, "data.workers": 0, "model.depthwise": "xla"}
    config.update_from_flattened_dict(keys)
    with pytest.raises(UserError, match=f"has 3 classes, but the model has {len(synsets)}"):
        build_run(config)
    config.data.num_classes = 0
    run = build_run(config)
    assert (run.model.num_classes, run.model_name) == (3, "mambaout_base_plus_rw")
    assert len(run.eval_batches) == 1, "three images: one of a hundred of each class"


def test_from_python_a_mistake_leaves_no_workdir(tmp_path):
    for directory, weights, message in (
        (tmp_path / "none", "test_mambaout.digits", "no folder"),
        (tmp_path, "nothing", "there are no weights 'nothing'"),
    ):
        with pytest.raises(UserError, match=message):
            from_python(directory, tmp_path / "run", weights)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_is_learned_in_one_flag(tmp_path):
    """The network of the package, on two classes of which one is brighter; and it resumes."""
    for number, name in enumerate(("bright", "dark")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(40):
            image = small_weights.image(index).point(lambda value: value // 2)
            image = image.point(lambda value, add=128 * (1 - number): value + add)
            image.save(tmp_path / "data" / name / f"{index}.png")
    keys = {
        "data.dir": str(tmp_path / "data"),
        "data.image_size": 32,
        "data.workers": 0,
        "model.name": "test_mambaout",
        "model.depthwise": "xla",
        "init_from": "test_mambaout.digits",
        "schedule.learning_rate": 5e-3,
        "schedule.duration": "5 epochs",
        "augment.policy": "",
    }
    for _ in range(2):  # the second finds the run finished
        config = finetune.get_config()
        config.update_from_flattened_dict(keys)
        small_run.train(config, tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5]
    assert float(rows[-1]["top1"]) == 100
