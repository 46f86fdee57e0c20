"""The command probe: features on the devices, kNN and the linear probe, against scikit-learn."""

import gc
import re
import time
import weakref

import jax
import numpy as np
import pytest
import small_weights
from jax.sharding import NamedSharding
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mambaout_jax import load_pretrained, preprocess_image
from mambaout_jax.__main__ import main
from mambaout_jax.data.loader import EvalBatches
from mambaout_jax.data.prepared import prepared_directory
from mambaout_jax.data.preprocess import normalize
from mambaout_jax.data.sources import TfdsSource
from mambaout_jax.errors import UserError
from mambaout_jax.inference import features
from mambaout_jax.inference.features import SPLIT, Features
from mambaout_jax.inference.knn import knn_accuracy
from mambaout_jax.inference.linear_probe import fit, probe_accuracy
from mambaout_jax.runtime.sharding import make_mesh

CLASSES, WIDTH = 6, 10
TEMPERATURE = 0.07  # the command's default


def clusters(count, seed):
    """Returns features around one centre a class, which overlap, and their classes."""
    centres = np.random.RandomState(0).standard_normal((CLASSES, WIDTH))
    random = np.random.RandomState(seed)
    labels = random.randint(0, CLASSES, count)
    values = centres[labels] + 1.5 * random.standard_normal((count, WIDTH)) + 1
    return values.astype(np.float32), labels.astype(np.int32)


def on_devices(values, labels, mesh, batch=16):
    """Returns the features as `extract` does, the last batch padded."""
    missing = -len(labels) % batch
    values = np.pad(values, ((0, missing), (0, 0)), constant_values=7)
    labels = np.pad(labels, (0, missing), constant_values=-1)
    arrays = values.reshape(-1, batch, WIDTH), labels.reshape(-1, batch)
    return Features(*jax.device_put(arrays, NamedSharding(mesh, SPLIT)))


@pytest.fixture(scope="module")
def case():
    mesh = make_mesh()
    assert mesh.size == 8
    train, evaluation = clusters(183, 1), clusters(101, 2)
    return mesh, train, evaluation, on_devices(*train, mesh), on_devices(*evaluation, mesh)


def test_knn_equals_scikit_learn(case):
    mesh, train, evaluation, train_features, eval_features = case
    theirs = KNeighborsClassifier(
        20, metric="cosine", weights=lambda distances: np.exp((1 - distances) / TEMPERATURE)
    )
    theirs.fit(*train)
    expected = 100 * theirs.score(*evaluation)
    assert 30 < expected < 95
    options = {"k": 20, "temperature": TEMPERATURE}
    ours = knn_accuracy(train_features, eval_features, CLASSES, mesh, **options)
    assert ours == pytest.approx(expected)
    one = 100 * KNeighborsClassifier(1, metric="cosine").fit(*train).score(*evaluation)
    assert one != expected
    options = {"k": 1, "temperature": 1.0}
    ours = knn_accuracy(train_features, eval_features, CLASSES, mesh, **options)
    assert ours == pytest.approx(one)
    with pytest.raises(UserError, match="there are 183 training images: expected at least the 184"):
        knn_accuracy(train_features, eval_features, CLASSES, mesh, k=184, temperature=TEMPERATURE)


@pytest.mark.slow
def test_the_linear_probe_equals_scikit_learn(case):
    c = 0.1
    mesh, train, evaluation, train_features, eval_features = case
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-8, max_iter=10_000))
    theirs.fit(*train)
    probe = fit(train_features, CLASSES, mesh, c=c)
    np.testing.assert_allclose(probe.kernel, theirs[-1].coef_.T, atol=2e-3)
    expected = 100 * theirs.score(*evaluation)
    assert probe_accuracy(probe, eval_features) == pytest.approx(expected)


def pooled(weights, splits):
    """Returns a network's features of two splits of the digits and their classes, by hand."""
    model, params = load_pretrained(weights)
    p = small_weights.INFO.preprocessing
    sources = [TfdsSource(prepared_directory("digits", ""), split) for split in splits]
    records = [source[index] for source in sources for index in range(len(source))]
    images = np.stack([preprocess_image(record["image"], p) for record in records])
    apply = jax.jit(lambda *arguments: model.apply(*arguments, method="pooled"))
    values = np.asarray(apply({"params": params}, normalize(images, p.mean, p.std)))
    labels, first = [record["label"] for record in records], len(sources[0])
    return (values[:first], labels[:first]), (values[first:], labels[first:])


def test_the_command_equals_scikit_learn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mambaout_jax.runtime.processes.join_processes", lambda: None)
    weights = small_weights.write(tmp_path / "w", num_classes=3)  # they need not be the digits'
    splits = "train[:90]", "validation[:45]"
    arguments = [f"--weights={weights}", "--data=digits", "--batch-size=40"]
    arguments += [f"--train-split={splits[0]}", f"--split={splits[1]}", "--k=5", "--c=0.5"]
    assert main(["probe", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "24 features, 90 images of digits/1.0.0/train[:90] for 45 of digits/1.0.0/val" in printed
    train, evaluation = pooled(weights, splits)
    neighbours = KNeighborsClassifier(
        5, metric="cosine", weights=lambda distances: np.exp((1 - distances) / TEMPERATURE)
    )
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, tol=1e-8, max_iter=10_000))
    expected = [100 * each.fit(*train).score(*evaluation) for each in (neighbours, linear)]
    ours = [float(match) for match in re.findall(r"top-1 ([\d.]+)%", printed)]
    assert ours == pytest.approx(expected, abs=1e-3)
    assert expected[0] != expected[1]


def write_folder(directory, count):
    """Writes two splits of `count` images of noise each, of four classes."""
    for split in ("train", "validation"):
        for number in range(count):
            file = directory / split / f"class{number % 4}" / f"{number:03d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            small_weights.image(number).save(file)


def images_on_devices():
    """Returns the bytes of all images that are alive on the devices."""
    return sum(array.nbytes for array in jax.live_arrays() if array.dtype == np.uint8)


def test_the_images_of_a_few_batches_are_in_memory(tmp_path, capsys, monkeypatch):
    """Of 30 batches a split, also where the devices are slower than the loader."""
    batch_size, started = 8, images_on_devices()
    on_host, computed, counts = [], [], []
    batches, normalize = EvalBatches.__iter__, features.normalize

    def counted(self):
        for batch in batches(self):
            images = batch["image"]
            on_host.append(weakref.ref(images if images.base is None else images.base))
            yield batch
            alive = sum(array() is not None for array in on_host)
            on_devices = (images_on_devices() - started) / images.nbytes
            counts.append((alive, on_devices, len(on_host) - len(computed)))

    def slow(images, mean, std):
        def wait(mean):
            time.sleep(0.01)
            computed.append(None)
            return np.zeros_like(mean)

        pixels = normalize(images, mean, std)
        zero = jax.ShapeDtypeStruct((), pixels.dtype)
        return pixels + jax.pure_callback(wait, zero, pixels.mean())

    monkeypatch.setattr("mambaout_jax.runtime.processes.join_processes", lambda: None)
    monkeypatch.setattr(EvalBatches, "__iter__", counted)
    monkeypatch.setattr(features, "normalize", slow)
    write_folder(tmp_path / "images", 30 * batch_size)
    weights = small_weights.write(tmp_path / "w")
    arguments = ["--data=folder", f"--data-dir={tmp_path / 'images'}", f"--weights={weights}"]
    assert main(["probe", *arguments, f"--batch-size={batch_size}"]) == 0
    assert "24 features, 240 images of" in capsys.readouterr().out
    assert len(counts) == len(computed) == 60
    most = np.max(counts, axis=0)  # on the host, on the devices, not yet computed
    assert (most <= (4, 2, 2)).all(), most
    gc.collect()
    assert not any(array() is not None for array in on_host)
    assert images_on_devices() == started


def test_a_folder_without_splits_is_divided(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mambaout_jax.runtime.processes.join_processes", lambda: None)
    for number in range(30):
        folder = tmp_path / "flat" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        small_weights.image(number).save(folder / f"{number:02}.png")
    data = ["--data=folder", f"--data-dir={tmp_path / 'flat'}"]
    weights = f"--weights={small_weights.write(tmp_path / 'w', num_classes=3)}"
    assert main(["probe", weights, *data]) == 0
    out = capsys.readouterr().out
    assert "24 images of flat/.[:80%] for 6 of flat/.[80%:]" in out
    assert main(["probe", weights, *data, "--split=validation"]) == 1
    assert "has no split 'train'" in capsys.readouterr().err


def test_mistakes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mambaout_jax.runtime.processes.join_processes", lambda: None)
    for arguments, message in (
        (["--data=digits"], "no weights: expected --weights=NAME_OR_PATH"),
        (["--weights=w", "--k=0"], "--k is 0: expected a number above 0"),
        (["--weights=w", "--c=-1"], "--c is -1.0: expected a number above 0"),
        (["--weights=test_mambaout.digits", "--data=digit"], "no dataset 'digit'"),
    ):
        assert main(["probe", f"--data-dir={tmp_path}", *arguments]) == 1
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
