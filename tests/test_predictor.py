"""Predictions equal the model's own, from Python and on the command line; errors are one line."""

import functools
import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import golden
import jax
import numpy as np
import pytest
import small_weights
from huggingface_hub import constants
from PIL import Image

from mambaout_jax import load_pretrained, preprocess_image
from mambaout_jax.__main__ import main
from mambaout_jax.data.preprocess import normalize
from mambaout_jax.errors import UserError
from mambaout_jax.inference.predictor import Predictor, constants_pay, find_images
from mambaout_jax.labels import class_names, imagenet_names, imagenet_wordnet_ids
from mambaout_jax.models.mambaout import on_device
from mambaout_jax.weights.store import save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_weights.write(tmp_path_factory.mktemp("weights") / "w")


@pytest.fixture(scope="module")
def predictor(weights):
    return Predictor.load(weights, batch_size=5)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return small_weights.write_images(tmp_path_factory.mktemp("images"), 11)


@pytest.fixture(scope="module")
def own(weights, files):
    """The model's probabilities for the files, [11, 1000]."""
    model, params = load_pretrained(weights)
    p = small_weights.INFO.preprocessing
    images = np.stack([preprocess_image(file.read_bytes(), p) for file in files])
    pixels = normalize(images, p.mean, p.std)
    return np.asarray(jax.nn.softmax(jax.jit(model.apply)({"params": params}, pixels)))


def test_files_are_classified_as_by_the_model(predictor, own, files):
    assert predictor.batch_size == 8, "rounded up to the eight devices"
    predictions = list(predictor.predict_files(files))
    assert [p.name for p in predictions] == [str(file) for file in files]
    for prediction, want in zip(predictions, own, strict=True):
        best = np.argsort(-want)[:5]
        assert [guess.index for guess in prediction.best] == best.tolist()
        got = [guess.probability for guess in prediction.best]
        np.testing.assert_allclose(got, want[best], rtol=1e-4)
        assert [guess.label for guess in prediction.best] == [imagenet_names()[i] for i in best]


def test_the_batch_is_split_over_all_devices_and_one_program_is_compiled(predictor, files):
    list(predictor.predict_files(files))
    values, _ = predictor._dispatch(np.zeros((3, 32, 32, 3), np.uint8))
    assert len(values.sharding.device_set) == 8
    assert values.sharding.shard_shape(values.shape)[0] == 1
    assert predictor._best._cache_size() == 1


def test_on_tpus_each_device_runs_the_kernels_on_its_part_of_the_batch(tmp_path):
    overrides = {**small_weights.INFO.overrides, "depthwise": "auto"}
    predictor = Predictor.load(small_weights.write(tmp_path / "w", overrides=overrides))
    images = jax.ShapeDtypeStruct((64, 32, 32, 3), np.uint8, sharding=predictor._split)
    traced = predictor._best.trace(*predictor._weights, images)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in program
    assert "manual_computation" in program


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_on_gpus_the_convolution_and_the_gate_or_the_block_are_one_operation(
    dtype, tolerance, tmp_path, monkeypatch
):
    overrides = {**small_weights.INFO.overrides, "depthwise": "auto"}
    path = small_weights.write(tmp_path / "w", overrides=overrides)
    expected = Predictor.load(path, batch_size=8, dtype=dtype)
    gpu, chosen = SimpleNamespace(platform="gpu"), []

    def on_gpu(model, device):
        del device
        chosen.append(on_device(model, gpu))
        return chosen[-1]

    monkeypatch.setattr("mambaout_jax.inference.predictor.on_device", on_gpu)
    found = Predictor.load(path, batch_size=8, dtype=dtype)
    assert [model.fused_gpu for model in chosen] == [True]
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    program = str(found._best.trace(*found._weights, images).jaxpr)
    assert ("small_block" in program) == (dtype == "bfloat16")
    for ours, theirs in zip(
        found.predict_images(images), expected.predict_images(images), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance)


def test_weights_as_constants_of_the_program(weights, files, monkeypatch):
    expected = Predictor.load(weights, batch_size=8)
    monkeypatch.setattr("mambaout_jax.inference.predictor.constants_pay", lambda *_: True)
    one = jax.devices()[:1]
    monkeypatch.setattr("jax.local_devices", lambda: one)
    found = Predictor.load(weights, batch_size=8)
    assert not found._weights
    for ours, theirs in zip(found.predict_files(files), expected.predict_files(files), strict=True):
        assert ours.name == theirs.name
        probabilities = ([guess.probability for guess in p.best] for p in (ours, theirs))
        np.testing.assert_allclose(*probabilities, rtol=1e-4)


def test_constants_pay_on_a_gpu_with_few_images_and_small_weights():
    small, large = {"w": np.zeros(4, np.float32)}, {"w": np.zeros(2**25 + 1, np.float32)}
    assert constants_pay("gpu", 32, small)
    assert not constants_pay("gpu", 33, small)
    assert not constants_pay("gpu", 1, large)
    assert not constants_pay("cpu", 1, small)


def test_a_choice_of_classes(weights, own, files):
    chosen = Predictor.load(weights, batch_size=8, top=2, classes=[7, 3, 900])
    want = own[0, [7, 3, 900]]
    (prediction,) = chosen.predict_files(files[:1])
    order = np.argsort(-want)[:2]
    assert [guess.index for guess in prediction.best] == [[7, 3, 900][i] for i in order]
    got = [guess.probability for guess in prediction.best]
    np.testing.assert_allclose(got, want[order] / want.sum(), rtol=1e-4)


def test_labels():
    assert len(set(imagenet_wordnet_ids())) == 1000
    assert class_names(None, 1000)[:2] == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    assert class_names(("ant", "bee"), 2) == ("ant", "bee")
    assert class_names(("n01443537", "bee"), 2) == ("goldfish, Carassius auratus", "bee")
    assert class_names(None, 2) == ("class 0", "class 1")


def test_the_table_and_json(weights, own, files, capsys):
    assert main(["predict", "--weights", str(weights), "--top=2", str(files[3])]) == 0
    name, first, second = capsys.readouterr().out.splitlines()
    best = np.sort(own[3])[::-1]
    assert name == str(files[3])
    assert first.split()[0] == f"{best[0]:.2%}"
    assert second.split()[0] == f"{best[1]:.2%}"
    folder = files[0].parent
    assert (
        main(["predict", "--weights", str(weights), "--json", "--batch-size=8", str(folder)]) == 0
    )
    records = json.loads(capsys.readouterr().out)
    assert [record["file"] for record in records] == [str(file) for file in files]
    assert records[3]["predictions"][0]["probability"] == pytest.approx(best[0], rel=1e-4)
    assert len(records[3]["predictions"]) == 5


def test_a_bad_image_does_not_keep_the_others_from_being_classified(weights, files, capsys):
    bad = files[0].parent.parent / "bad.png"
    bad.write_text("not an image")
    arguments = ["predict", "--weights", str(weights), "--json", str(bad), str(files[0])]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert f"error: {bad} cannot be decoded" in printed.err
    first, second = json.loads(printed.out)
    assert first["predictions"] == []
    assert "cannot be decoded" in first["error"]
    assert len(second["predictions"]) == 5


@pytest.mark.parametrize("size", [(1, 1), (20_000, 30), (30, 20_000)])
def test_tiny_and_wide_images_are_classified(predictor, tmp_path, size):
    file = tmp_path / "image.png"
    small_weights.image(0, size).save(file)
    (prediction,) = predictor.predict_files([file])
    assert len(prediction.best) == 5


def test_large_images_are_classified_silently_and_too_large_ones_are_refused(
    weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # a warning; refused at twice as many
    files = [tmp_path / "large.png", tmp_path / "too_large.png"]
    for file, size in zip(files, [(30, 40), (50, 50)], strict=True):
        small_weights.image(0, size).save(file)
    with warnings.catch_warnings(record=True, action="default") as caught:
        assert main(["predict", "--weights", str(weights), *map(str, files)]) == 1
    assert not [warning for warning in caught if "Image size" in str(warning.message)]
    error = capsys.readouterr().err
    assert error.startswith(f"error: {files[1]} cannot be decoded (Image size (2500 pixels)")
    assert error.count("\n") == 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_images_of_other_modes_are_classified(predictor, tmp_path, mode):
    file = tmp_path / "image.tif"
    Image.new(mode, (40, 40)).save(file)
    (prediction,) = predictor.predict_files([file])
    assert len(prediction.best) == 5


def test_find_images(tmp_path):
    small_weights.write_images(tmp_path / "b", 2)
    (tmp_path / "a.txt").write_text("notes")
    (tmp_path / ".hidden.png").write_text("")
    small_weights.image(0).save(tmp_path / "c.JPG")
    found = find_images([tmp_path, tmp_path / "a.txt"])
    assert [str(p.relative_to(tmp_path)) for p in found] == [
        "b/00.png", "b/01.png", "c.JPG", "a.txt"
    ]  # fmt: skip


def test_a_mistake_is_one_line(weights, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    small_weights.image(0).save(tmp_path / "x.png")
    image = str(tmp_path / "x.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    headless = small_weights.write(tmp_path / "headless", num_classes=0)
    for arguments, expected in (
        ([str(weights), str(tmp_path / "nope.jpg")], "there is no file"),
        ([str(weights), ""], "there is no file"),
        ([str(weights), str(tmp_path / "pipe.jpg")], "pipe.jpg is not a regular file"),
        ([str(weights), "/dev/zero"], "/dev/zero is not a regular file"),
        (["", image], "no weights: expected --weights=NAME_OR_PATH"),
        ([str(weights), str(tmp_path / "empty")], "holds no images"),
        (["mambaout_tny.in1k", image], "did you mean 'mambaout_tiny.in1k'?"),
        (["test_mambaout", image], "has no pretrained weights"),
        ([str(tmp_path / "nope.pth"), image], "nope.pth"),
        ([str(headless), image], "no classes"),
        ([str(weights), image, "--top=0"], "at least 1"),
        ([str(weights), image, "--batch-size=0"], "at least 1"),
    ):
        assert main(["predict", "--weights", *arguments]) == 1, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: "), error
        assert error.count("\n") == 1, error
        assert expected in error


@pytest.mark.slow
def test_names_that_are_not_utf8(weights, tmp_path):
    """A table has escapes for the bytes; JSON has those that Python reads back."""
    file = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(file, "wb") as opened:
        small_weights.image(0).save(opened, "PNG")
    command = [sys.executable, "-m", "mambaout_jax", "predict", f"--weights={weights}", file]
    for utf8 in ("0", "1"):
        environment = {**os.environ, "PYTHONUTF8": utf8, "PYTHONIOENCODING": ""}
        run = functools.partial(subprocess.run, env=environment, capture_output=True, check=True)
        assert run([*command, "--top=1"]).stdout.decode().startswith(f"{tmp_path}/caf\\udce9.png\n")
        (record,) = json.loads(run([*command, "--json"]).stdout.decode("utf-8"))
        assert os.fsencode(record["file"]) == file


def test_the_weights_go_by_their_own_option(weights, files, capsys):
    """--model is the variant, as in every command."""
    assert main(["predict", "--model=mambaout_tiny.in1k", str(files[0])]) == 1
    error = "error: no weights: expected --weights=NAME_OR_PATH, such as --weights="
    assert capsys.readouterr().err == f"{error}mambaout_tiny.in1k\n"
    arguments = ["predict", f"--weights={weights}", "--model=mambaout_tiny", str(files[0])]
    assert main(arguments) == 1
    assert "are test_mambaout's, not mambaout_tiny's" in capsys.readouterr().err
    assert main(["predict", f"--weights={weights}", "--model=test_mambaout", str(files[0])]) == 0


def test_weights_that_are_not_finite(tmp_path, files, capsys):
    params = golden.params(small_weights.INFO.create_model())
    params["head"]["fc2"]["bias"][3] = np.inf
    save_weights(tmp_path / "w", params, small_weights.INFO)
    arguments = ["predict", f"--weights={tmp_path / 'w'}", str(files[0])]
    assert main(arguments) == 1
    assert "--allow-non-finite" in capsys.readouterr().err
    assert main([*arguments, "--allow-non-finite"]) == 0


def test_no_weights_and_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    small_weights.image(0).save(tmp_path / "x.png")
    assert main(["predict", "--weights=mambaout_tiny", str(tmp_path / "x.png")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: timm/mambaout_tiny.in1k is not in the cache")
    assert error.count("\n") == 1


def test_a_process_ends_with_the_mistake_and_no_traceback():
    command = [sys.executable, "-m", "mambaout_jax", "summary", "mambaout_tny"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: unknown model 'mambaout_tny'; did you mean")


def test_top_larger_than_the_classes_shows_all(tmp_path, files):
    names = ("ant", "bee", "cat")
    directory = small_weights.write(tmp_path / "w", num_classes=3, class_names=names)
    (prediction,) = Predictor.load(directory, batch_size=1).predict_files(files[:1])
    assert sorted(guess.label for guess in prediction.best) == list(names)
    assert sum(guess.probability for guess in prediction.best) == pytest.approx(1, rel=1e-5)


def test_an_unreadable_file_is_reported(predictor, tmp_path):
    (prediction,) = predictor.predict_files([tmp_path / "gone.png"])
    assert prediction.error == f"{tmp_path / 'gone.png'} cannot be read: No such file or directory"
    os.mkfifo(tmp_path / "pipe.png")
    (prediction,) = predictor.predict_files([tmp_path / "pipe.png"])
    assert prediction.error == f"{tmp_path / 'pipe.png'} is not a regular file"
    with pytest.raises(UserError, match="batch size"):
        Predictor.load(small_weights.write(tmp_path / "w"), batch_size=0)
