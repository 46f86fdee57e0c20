"""The command benchmark: TFDS's test sets of ImageNet's classes, their subsets and ReaL's rule."""

import csv
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import small_weights
from benchmark_fixture import COUNT, REAL, build, image, labels
from imagenet_fixture import write_imagenet

from mambaout_jax import load_pretrained, preprocess_image
from mambaout_jax.__main__ import main
from mambaout_jax.data.loader import LoaderOptions, TrainBatches
from mambaout_jax.data.preprocess import normalize
from mambaout_jax.data.sources import Dataset
from mambaout_jax.errors import UserError
from mambaout_jax.inference.benchmarks import BENCHMARKS
from mambaout_jax.labels import imagenet_subset, imagenet_wordnet_ids

DATASETS = ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet2012_real")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Processes can be joined only before jax has started, as it has here."""
    monkeypatch.setattr("mambaout_jax.runtime.processes.join_processes", lambda: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All datasets, prepared as TFDS does."""
    root = tmp_path_factory.mktemp("tfds")
    write_imagenet(root, train=1, validation=COUNT)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for dataset in DATASETS:
            build(dataset, root, tmp_path_factory.mktemp(dataset), monkeypatch)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of 1000 classes."""
    return small_weights.write(tmp_path_factory.mktemp("weights") / "w")


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_the_subsets_are_timms(name):
    classes = imagenet_subset(name)
    assert len(set(classes)) == 200
    assert list(classes) == sorted(classes)
    timm = importlib.util.find_spec("timm")
    if timm is None:
        pytest.skip("needs timm: pip install -e '.[verify]'")
    theirs = Path(timm.origin).with_name("data") / "_info" / f"{name}_indices.txt"
    assert list(classes) == list(map(int, theirs.read_text().split()))


def test_the_subsets_differ():
    first, second = map(set, map(imagenet_subset, ("imagenet_a", "imagenet_r")))
    assert imagenet_wordnet_ids().index("n01443537") in second - first  # goldfish
    assert len(first & second) < 200


def test_every_source_has_the_images_of_its_archive(data):
    for name, benchmark in BENCHMARKS.items():
        dataset = benchmark.dataset.split("/")[0]
        source = benchmark.open(str(data))
        assert len(source) == COUNT, name
        records = [source[index] for index in range(COUNT)]
        if dataset in DATASETS[:4]:
            expected = {image(dataset, n): label for n, label in enumerate(labels(dataset))}
            assert {r["image"]: int(r["label"].item()) for r in records} == expected, name
        if name == "real":
            right = {r["image"]: {int(c) for c in r["label"] if c >= 0} for r in records}
            assert right == {image(dataset, n): set(REAL[n]) for n in range(COUNT)}


def expected_hits(weights, name):
    """Returns the accuracies by hand: top-1 and top-5 in percent, and how many images count."""
    dataset = BENCHMARKS[name].dataset.split("/")[0]
    model, params = load_pretrained(weights)
    p = small_weights.INFO.preprocessing
    images = np.stack([preprocess_image(image(dataset, n), p) for n in range(COUNT)])
    logits = np.array(jax.jit(model.apply)({"params": params}, normalize(images, p.mean, p.std)))
    right = [{label} for label in labels(dataset)] if name != "real" else [*map(set, REAL)]
    if name in ("a", "r"):
        logits[:, np.setdiff1d(np.arange(1000), imagenet_subset(dataset))] = -np.inf
    order = np.argsort(-logits, axis=1)
    hits = [
        (row[0] in good, bool(set(row[:5]) & good))
        for row, good in zip(order.tolist(), right, strict=True)
        if good
    ]
    return (*(100 * np.mean(hits, axis=0)), len(hits))


def test_one_table_and_one_csv(data, weights, tmp_path, capsys):
    out = tmp_path / "out.csv"
    arguments = [str(weights), f"--data-dir={data}", "--batch-size=8", f"--csv={out}"]
    assert main(["benchmark", *arguments, f"--json={tmp_path / 'out.json'}"]) == 0
    with out.open() as file:
        rows = {row["dataset"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(BENCHMARKS)
    timms = "model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation"
    assert list(rows["a"])[:10] == ["dataset", *timms.split(",")]
    for name in ("v2", "a", "r", "sketch", "real"):
        top1, top5, count = expected_hits(weights, name)
        assert float(rows[name]["top1"]) == pytest.approx(top1, abs=1e-3), name
        assert float(rows[name]["top1_err"]) == pytest.approx(100 - top1, abs=1e-3), name
        assert float(rows[name]["top5"]) == pytest.approx(top5, abs=1e-3), name
        assert int(rows[name]["examples"]) == count, name
    assert rows["real"]["examples"] == str(sum(map(bool, REAL))) != str(COUNT)
    assert rows["a"]["img_size"] == "32"
    assert [row["dataset"] for row in json.loads((tmp_path / "out.json").read_text())] == [*rows]
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 7
    assert table[0].split() == ["model", "dataset", "examples", "top1", "top5"]


def test_mistakes(data, weights, tmp_path, capsys):
    ten = small_weights.write(tmp_path / "ten", num_classes=10)
    for arguments, message in (
        ([weights, "--data=imagenet,av"], "unknown test set 'av'"),
        ([weights, f"--data-dir={tmp_path}", "--data=v2"],
         "tfds build imagenet_v2/matched-frequency --file_format=array_record"),
        ([weights, "--batch-size=0"], "--batch-size is 0"),
        ([ten, "--data=a"], "the weights have 10 classes: expected ImageNet-1k's 1000"),
        ([], "no weights: expected NAME_OR_PATH, or --model=mambaout_tiny"),
    ):  # fmt: skip
        assert main(["benchmark", f"--data-dir={data}", *map(str, arguments)]) == 1
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1
        assert not printed.out


def test_lists_of_classes_are_for_evaluation_alone(data):
    dataset = Dataset("tfds", "imagenet2012_real", str(data), "validation", "validation", 1000)
    loader = LoaderOptions(workers=0, threads=1, backend="pillow")
    with pytest.raises(UserError, match="it is for evaluation alone"):
        TrainBatches(
            dataset, None, batch_size=4, seed=0, repeats=1, max_bad_fraction=0, loader=loader
        )


def test_builders_with_tensorflow(tmp_path, monkeypatch):
    """What the other tests read is what TFDS writes with TensorFlow."""
    tensorflow = pytest.importorskip("tensorflow")
    for dataset in DATASETS:
        (tmp_path / dataset).mkdir()
        build(dataset, tmp_path, tmp_path / dataset, monkeypatch, tensorflow)
    for benchmark in BENCHMARKS.values():
        if benchmark.dataset != "imagenet2012":
            assert len(benchmark.open(str(tmp_path))) == COUNT
