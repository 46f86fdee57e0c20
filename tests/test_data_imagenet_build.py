"""The commands of docs/imagenet.md, run on small hand-made tars with TFDS's own builder."""

import importlib.util
import io
import subprocess
import sys
import tarfile

import pytest
from batches import eval_batches, train_batches
from imagenet_fixture import LABELS_FILE, jpeg, train_tiny

from configs import tiny
from mambaout_jax.build_data import build_dataset
from mambaout_jax.data.sources import open_source
from mambaout_jax.errors import UserError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="TFDS's imagenet2012 builder needs TensorFlow: pip install -e '.[prepare]'",
)


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Two images of each of 24 classes, nested as ImageNet's tars are, and 12 held-out ones."""
    directory = tmp_path_factory.mktemp("manual")
    classes = LABELS_FILE.read_text().split()[:24]
    with tarfile.open(directory / "ILSVRC2012_img_train.tar", "w") as train:
        for number, synset in enumerate(classes):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for number_of_class in range(2):
                    add(tar, f"{synset}_{number_of_class}.JPEG", jpeg(2 * number + number_of_class))
            add(train, f"{synset}.tar", inner.getvalue())
    with tarfile.open(directory / "ILSVRC2012_img_val.tar", "w") as validation:
        for number in range(12):
            add(validation, f"ILSVRC2012_val_{number + 1:08d}.JPEG", jpeg(number))
    return directory


def tfds(*arguments):
    script = "from tensorflow_datasets.scripts.cli.main import launch_cli; launch_cli()"
    command = [sys.executable, "-c", script, *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=1200)


def check(directory):
    config = tiny.get_config()
    config.data.dir = str(directory)
    config.data.image_size = 64
    config.batch_size = config.eval.batch_size = 16
    source = open_source(build_dataset(config), "train")
    assert (len(source), source.num_classes) == (48, 1000)
    assert {source[i]["image"]: source[i]["label"] for i in range(48)} == {
        jpeg(number): number // 2 for number in range(48)
    }
    assert next(train_batches(config))["image"].shape == (16, 64, 64, 3)
    assert sum(batch["mask"].sum() for batch in eval_batches(config)) == 12


def test_build_writes_what_training_reads(tars, tmp_path):
    arguments = ("--file_format=array_record", f"--data_dir={tmp_path}", f"--manual_dir={tars}")
    tfds("build", "imagenet2012", *arguments)
    check(tmp_path)
    log = train_tiny(tmp_path, tmp_path / "run")
    assert "step 3/3: loss" in log
    assert "epoch 1/1: train loss" in log


def test_a_tfrecord_copy_is_converted_by_the_command_of_the_message(tars, tmp_path):
    tfds("build", "imagenet2012", f"--data_dir={tmp_path}", f"--manual_dir={tars}")
    config = tiny.get_config()
    config.data.dir = str(tmp_path)
    with pytest.raises(UserError) as caught:
        open_source(build_dataset(config), "train")
    tfds(*str(caught.value).split("tfds ", 1)[1].split())
    check(tmp_path)
