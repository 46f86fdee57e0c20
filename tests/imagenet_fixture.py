"""A small, real `imagenet2012` directory: TFDS's features and 1,000 classes, a few made JPEGs."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from compiler_flags import FAST_COMPILATION
from PIL import Image

LABELS_FILE = tfds.core.tfds_path("datasets/imagenet2012/labels.txt")


def jpeg(number: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """Returns an encoded image of a (width, height), which depends on its number alone."""
    noise = np.random.RandomState(number).randint(0, 256, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


with tfds.core.registered.skip_registration():  # TFDS has its own builder of this name

    class Imagenet2012(tfds.core.GeneratorBasedBuilder):
        """Writes what TFDS's builder of ImageNet writes, from small images, without TensorFlow."""

        VERSION = tfds.core.Version("5.1.0")
        counts: dict[str, int]

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names_file=LABELS_FILE),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in self.counts}

        def _generate_examples(self, split):
            for number in range(self.counts[split]):
                name = f"{split}_{number}.JPEG"
                image = io.BytesIO(jpeg(number))
                yield name, {"image": image, "label": number * 37 % 1000, "file_name": name}


def write_imagenet(directory: Path, train: int = 64, validation: int = 20) -> Path:
    """Writes `directory`/imagenet2012/5.1.0 in ArrayRecord form; returns `directory`."""
    builder = Imagenet2012(data_dir=str(directory), file_format="array_record")
    builder.counts = {"train": train, "validation": validation}
    builder.download_and_prepare()
    return directory


def train_tiny(directory: Path, workdir: Path, batch_size: int = 16) -> str:
    """Trains configs/tiny.py, as a user starts it, for an epoch of few pixels; returns its log."""
    options = {
        "data.dir": directory,
        "data.image_size": 32,
        "data.workers": 0,
        "model.depthwise": "xla",
        "batch_size": batch_size,
        "eval.batch_size": 4,
        "schedule.duration": "1 epochs",
        "schedule.warmup": "",
        "schedule.cooldown": "",
        "log.every": "1 steps",
    }
    command = [sys.executable, "main.py", "--config=configs/tiny.py", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in options.items()]
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILATION}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr
