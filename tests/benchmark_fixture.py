"""The test sets of ImageNet's classes, made by TFDS's own builders from small archives.

The archives have the publishers' layouts. TFDS's builders list and read files through TensorFlow;
without it, functions of the standard library take its place.
"""

import importlib
import io
import json
import os
import tarfile
import types
import zipfile
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds
from imagenet_fixture import jpeg
from tensorflow_datasets.core.download import extractor
from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

from mambaout_jax.labels import imagenet_subset, imagenet_wordnet_ids

COUNT = 12  # images of each dataset
REAL = [[number * 7 % 1000, number][: number % 3] for number in range(COUNT)]


def labels(dataset: str) -> list[int]:
    """Returns the class of each image of a dataset."""
    if dataset in ("imagenet_a", "imagenet_r"):
        subset = imagenet_subset(dataset)
        return [subset[(number * 17) % 200] for number in range(COUNT)]
    return [number * 83 % 1000 for number in range(COUNT)]


def image(dataset: str, number: int) -> bytes:
    """Returns the file of an image."""
    return jpeg(100 * len(dataset) + number)


def members(dataset: str) -> dict[str, bytes]:
    """Returns the files in the publisher's archive."""
    names = [imagenet_wordnet_ids()[label] for label in labels(dataset)]
    paths = {
        "imagenet_a": "imagenet-a/{name}/0.0001_{name}_{number}.jpg",
        "imagenet_r": "imagenet-r/{name}/art_{number}.jpg",
        "imagenet_v2": "imagenetv2-matched-frequency-format-val/{label}/{number}.jpeg",
        "imagenet_sketch": "sketch/{name}/sketch_{number}.JPEG",
        "imagenet2012_real": "ILSVRC2012_val_{image:08d}.JPEG",
    }
    files = {
        paths[dataset].format(name=name, number=number, image=number + 1, label=label): image(
            dataset, number
        )
        for number, (name, label) in enumerate(zip(names, labels(dataset), strict=True))
    }
    if dataset in ("imagenet_a", "imagenet_r"):  # as their tars have it
        files[f"{dataset.replace('_', '-')}/README.txt"] = b"readme"
    return files


def archive(dataset: str, folder: Path) -> Path:
    """Writes the publisher's archive, and returns its path."""
    if dataset == "imagenet_sketch":
        path = folder / "ImageNet-Sketch.zip"
        with zipfile.ZipFile(path, "w") as zip_file:
            for name, content in members(dataset).items():
                zip_file.writestr(name, content)
        return path
    path = folder / ("ILSVRC2012_img_val.tar" if "real" in dataset else f"{dataset}.tar")
    with tarfile.open(path, "w") as tar:
        for name, content in members(dataset).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def build(dataset: str, directory: Path, scratch: Path, monkeypatch, tensorflow=None) -> None:
    """Builds `directory`/`dataset` in ArrayRecord form with TFDS's builder."""
    module = importlib.import_module(
        f"tensorflow_datasets.datasets.{dataset}.{dataset}_dataset_builder"
    )
    if tensorflow is None:
        gfile = types.SimpleNamespace(
            listdir=os.listdir,
            isdir=os.path.isdir,
            exists=os.path.exists,
            GFile=open,
        )
        tensorflow = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
    for each in (module, imagenet_common, extractor):
        monkeypatch.setattr(each, "tf", tensorflow, raising=False)
    path = archive(dataset, scratch)

    def download(manager, url):
        if url.endswith("real.json"):
            (scratch / "real.json").write_text(json.dumps(REAL))
            return scratch / "real.json"
        return path

    def download_and_extract(manager, url):
        with tarfile.open(path) as tar:
            tar.extractall(scratch / dataset, filter="data")
        return os.fspath(scratch / dataset)

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", download_and_extract)
    with tfds.core.registered.skip_registration():

        class Builder(module.Builder):
            name = dataset
            pkg_dir_path = tfds.core.tfds_path(f"datasets/{dataset}")
            code_path = None  # without importlib_resources, TFDS cannot look for the
            url_infos: ClassVar[dict] = {}  # builder's files and its checksums

    options = {"config": "matched-frequency"} if dataset == "imagenet_v2" else {}
    builder = Builder(data_dir=str(directory), file_format="array_record", **options)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(scratch))
    )
