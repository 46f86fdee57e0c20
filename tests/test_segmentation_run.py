"""Segmentation through the loop that classification uses: loss, schedule, statistics, resume."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run
from etils import epath
from flax.traverse_util import flatten_dict
from golden import images as random_images
from optax.losses import softmax_cross_entropy_with_integer_labels
from PIL import Image

import mambaout_jax
from mambaout_jax import config as configuration
from mambaout_jax.__main__ import main
from mambaout_jax.build import build_model, build_run, build_schedule
from mambaout_jax.build_data import build_evaluation
from mambaout_jax.data.shapes.__main__ import write_folders
from mambaout_jax.errors import PreemptedError, UserError
from mambaout_jax.evaluate_run import evaluate_workdir
from mambaout_jax.inference.mask_predictor import MaskPredictor
from mambaout_jax.models.upernet import STATISTICS, running_statistics
from mambaout_jax.runtime.sharding import make_mesh, state_shardings
from mambaout_jax.training import loop
from mambaout_jax.training.pictures import open_pictures
from mambaout_jax.training.recipe import Recipe
from mambaout_jax.training.recorder import POSITION_COLUMNS, read_rows
from mambaout_jax.training.schedule import PolynomialSchedule
from mambaout_jax.training.segmentation import cross_entropy
from mambaout_jax.training.state import init_params, init_state
from mambaout_jax.training.step import compile_train_step, train_step
from mambaout_jax.weights.store import load_weights

SMALL = {
    "model.name": "upernet_test_mambaout",
    "model.depthwise": "xla",
    "segmentation.channels": 8,
    "data.source": "folder",
    "data.image_size": 64,
    "batch_size": 8,
    "eval.batch_size": 8,
    "schedule.duration": "3 epochs",
    "schedule.warmup": "1 epochs",
    "eval.every": "1 epochs",
    "checkpoint.every": "1 epochs",
    "checkpoint.keep": 3,
}
RECIPE = Recipe(num_classes=7, mean=(0.5,) * 3, std=(0.25,) * 3, task="segmentation")


def small_config(directory, **keys):
    config = configuration.load_config(small_run.ROOT / "configs/shapes.py")
    config.update_from_flattened_dict({**SMALL, "data.dir": str(directory), **keys})
    return config


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shapes")
    write_folders({"train": 16, "validation": 5}, directory)
    return directory


def test_ignored_pixels_count_as_zero_in_the_mean_over_all():
    labels = np.array([[[0, 1], [2, 255]]], np.uint8)
    logits = np.random.RandomState(0).standard_normal((1, 2, 2, 3)).astype(np.float32)
    each = softmax_cross_entropy_with_integer_labels(logits[0].reshape(4, 3)[:3], np.arange(3))
    np.testing.assert_allclose(cross_entropy(logits, labels), each.sum() / 4, rtol=1e-6)
    assert cross_entropy(logits, np.full_like(labels, 255)) == 0


def test_logits_are_resized_to_the_labels():
    logits = jnp.zeros((1, 1, 2, 2)).at[0, 0, 0, 0].set(4.0)
    labels = np.zeros((1, 2, 4), np.uint8)
    weights = np.array([4, 3, 1, 0], np.float32)  # 4 at pixel centres of quarters: 1, 3/4, 1/4, 0
    expected = np.log1p(np.exp(-weights)).mean()
    np.testing.assert_allclose(cross_entropy(logits, labels), expected, rtol=1e-6)


def test_the_polynomial_schedule_at_its_boundaries():
    schedule = PolynomialSchedule(peak=1.0, start=0.1, end=0.2, duration=20, warmup=10, power=2.0)
    for step, rate in ((0, 0.1), (5, 0.55), (10, 1.0), (15, 0.4), (20, 0.2), (30, 0.2)):
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-6)
        np.testing.assert_allclose(schedule(step, np), rate, rtol=1e-6)


def test_the_papers_schedule_is_linear_from_the_end_of_the_warmup():
    config = configuration.load_config(small_run.ROOT / "configs/ade20k_tiny.py")
    schedule = build_schedule(config, steps_per_epoch=1263)
    for step, rate in ((0, 1e-10), (750, 5e-5), (1500, 1e-4), (80_750, 5e-5), (160_000, 0)):
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-4, atol=1e-12)


def small_state(optimizer):
    model = mambaout_jax.create_model(SMALL["model.name"], num_classes=7, channels=8)
    params = jax.jit(lambda: init_params(jax.random.key(0), model, (32, 32)))()
    return model, init_state(params, optimizer, ema=False)


def batch_of(count):
    random = np.random.RandomState(0)
    labels = random.randint(0, 8, (count, 32, 32)).astype(np.uint8)
    labels[labels == 7] = 255
    return {"image": random.randint(0, 256, (count, 32, 32, 3)).astype(np.uint8), "label": labels}


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_over_devices_equals_one_device_and_updates_the_statistics(parts):
    optimizer = optax.adamw(1e-3, weight_decay=0.1)
    model, state = small_state(optimizer)
    recipe = Recipe(**{**vars(RECIPE), "accumulate_steps": parts})
    mesh, key = make_mesh(2, jax.devices()[:4]), jax.random.key(0)
    options = {"model": model, "optimizer": optimizer, "recipe": recipe}
    batch = batch_of(8)
    single, expected = jax.jit(lambda s, b: train_step(s, b, key, **options))(state, batch)
    step = compile_train_step(model, optimizer, recipe, state_shardings(state, mesh), mesh)
    before = flatten_dict(jax.device_get(state.params))
    sharded, metrics = step(state, batch, jax.random.key_data(key))
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-3)
    # Adam's first updates are the learning rate times the gradient's sign: only the statistics,
    # which it does not touch, are compared closely.
    after = flatten_dict(jax.device_get(sharded.params))
    for path, leaf in flatten_dict(running_statistics(single.params)).items():
        np.testing.assert_allclose(after[path], leaf, rtol=1e-3, atol=1e-5)
        assert np.abs(after[path] - before[path]).max() > 0, path
    for path in before:
        moment = flatten_dict(jax.device_get(sharded.opt_state[0].mu))[path]
        assert (np.abs(moment).max() > 0) == (path[-1] not in STATISTICS), path


@pytest.mark.slow
def test_a_step_that_is_not_finite_keeps_the_statistics():
    optimizer = optax.sgd(1e-3)
    model, state = small_state(optimizer)
    recipe = Recipe(**{**vars(RECIPE), "std": (0.0,) * 3})  # divides by zero
    options = {"model": model, "optimizer": optimizer, "recipe": recipe}
    after, metrics = jax.jit(lambda s, b: train_step(s, b, jax.random.key(0), **options))(
        state, batch_of(2)
    )
    assert np.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    small_run.train(small_config(shapes), workdir)
    return workdir


def newest(workdir):
    checkpoints = epath.Path(workdir) / "checkpoints"
    return load_weights(max(checkpoints.iterdir(), key=lambda path: int(path.name)))


@pytest.mark.slow
def test_a_run_records_its_measures_and_its_best_checkpoint(shapes, trained):
    columns = (*POSITION_COLUMNS, "miou", "macc", "aacc")
    assert (trained / "metrics.csv").read_text().splitlines()[0] == ",".join(columns)
    rows = read_rows(epath.Path(trained / "metrics.csv"), columns)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(0 < row["miou"] <= 100 for row in rows)
    assert (trained / "curves.png").exists()
    assert (trained / "masks.png").exists()
    (events,) = (trained / "tensorboard").iterdir()
    assert events.read_bytes().count(b"eval/masks") == 3
    _, info = load_weights(trained)
    assert info.task == "segmentation"
    assert info.metrics["miou"] == max(row["miou"] for row in rows)
    assert info.metrics["examples"] == 5
    model, params = mambaout_jax.load_pretrained(trained)
    logits = model.apply({"params": params}, random_images(0, 1, 64))
    assert logits.shape == (1, 16, 16, 7)
    report = evaluate_workdir(small_config(shapes), epath.Path(trained), {"data.dir"})
    assert report["miou"] == pytest.approx(info.metrics["miou"], abs=0.05)
    saved = json.loads((trained / "eval.json").read_text())
    assert saved["classes"].keys() >= {"background", "striped disc"}


@pytest.mark.slow
def test_commands_and_masks_of_a_run(shapes, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    image, out = str(shapes / "images/validation/0000.png"), tmp_path / "masks"
    arguments = [image, f"--weights={trained}"]
    assert main(["predict", *arguments, f"--masks={out}"]) == 0
    with Image.open(out / "0000_mask.png") as mask:
        assert (mask.mode, mask.size) == ("P", (96, 96))
        assert max(np.unique(mask)) < 7
    assert main(["predict", *arguments]) == 1
    assert "is a network of segmentation, not of classification" in capsys.readouterr().err
    assert main(["predict", image, "--weights=test_mambaout.digits", f"--masks={out}"]) == 1
    assert "is a network of classification, not of segmentation" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "network"), f"--weights={trained}"]) == 1
    assert "is a network of segmentation, not of classification" in capsys.readouterr().err
    assert main(["push", str(trained), "someone/shapes"]) == 1
    assert "is a network of segmentation, not of classification" in capsys.readouterr().err
    options = {"eval.scales": (1.0, 0.5), "eval.flip": True}
    several = evaluate_workdir(
        small_config(shapes, **options), epath.Path(trained), {"data.dir", *options}
    )
    assert several["examples"] == 5
    window = {"eval.window": 32, "eval.stride": 32}
    parts = evaluate_workdir(
        small_config(shapes, **window), epath.Path(trained), {"data.dir", *window}
    )
    assert len({several["macc"], parts["macc"], load_weights(trained)[1].metrics["macc"]}) == 3


@pytest.mark.slow
def test_pictures_show_what_the_network_predicts(shapes, trained):
    config = small_config(shapes, **{"mesh.fsdp": 2})
    run = build_run(config)
    params, _ = load_weights(trained)
    shardings = state_shardings(params, run.mesh)
    pictures = open_pictures(run, shardings)
    predicted = pictures.predict(jax.device_put(params, shardings))
    predictor = MaskPredictor(run.model, params, pictures.class_names, build_evaluation(config))
    assert len(predicted) == 3
    for row, labels in enumerate(predicted):
        image = Image.open(shapes / f"images/validation/{2 * row:04d}.png").convert("RGB")
        assert (
            predictor.predict_image(image) == labels[: image.height, : image.width]
        ).mean() > 0.99


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_is_the_same_to_the_bit(shapes, trained, tmp_path):
    config = small_config(shapes)

    class StopAtStep3(loop.StopRequest):
        calls = 0

        def reached(self):
            self.calls += 1
            return self.calls >= 4  # once a step, and once a batch of the first evaluation

    stop = StopAtStep3()
    with stop, pytest.raises(PreemptedError, match="saved at step 3 of 6"):
        loop.train(build_run(config), epath.Path(tmp_path / "run"), stop)
    small_run.train(config, tmp_path / "run")
    (straight, _), (resumed, _) = newest(trained), newest(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    names = "metrics.csv"
    assert (tmp_path / "run" / names).read_text() == (trained / names).read_text()


@pytest.mark.slow
def test_a_classifiers_weights_become_the_backbone(shapes, trained, tmp_path):
    config = small_config(shapes, **{"init_from": "test_mambaout.digits"})
    run = build_run(config)
    params, report = loop.initial_params(run.init_from, run.model, jax.random.key(0))
    run.batches.close()
    assert "they are the backbone's, and the rest is new" in report
    digits, _ = mambaout_jax.read_weights("test_mambaout.digits")
    del digits["head"]
    jax.tree.map(np.testing.assert_array_equal, params["backbone"], digits)
    found, _ = loop.initial_params(trained, build_model_of(4), jax.random.key(0))
    whole, _ = load_weights(trained)
    assert found["decode_head"]["conv_seg"]["bias"].shape == (4,)
    assert found["auxiliary_head"]["conv_seg"]["bias"].shape == (4,)
    jax.tree.map(
        np.testing.assert_array_equal,
        found["decode_head"]["bottleneck"],
        whole["decode_head"]["bottleneck"],
    )


def build_model_of(classes):
    return mambaout_jax.create_model(SMALL["model.name"], num_classes=classes, channels=8)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"task": "classification"}, "expected 'test_mambaout', or another task"),
        ({"model.name": "test_mambaout"}, "expected 'upernet_test_mambaout', or another task"),
        ({"augment.mixup": 0.8}, "config.augment.mixup is 0.8, which config.task=segmentation"),
        ({"eval.crop_pct": 0.9}, "config.eval.crop_pct is 0.9, which config.task=segmentation"),
        ({"schedule.per": "epoch"}, "config.schedule.kind is 'poly', which moves each step"),
        ({"schedule.kind": "pol"}, "did you mean 'poly'"),
        ({"segmentation.ratio_range": (2.0, 0.5)}, "expected two rising numbers"),
        ({"eval.window": 64}, "config.eval.window is 64 and config.eval.stride 0"),
        ({"eval.stride": 8}, "config.eval.window is 0 and config.eval.stride 8"),
        ({"eval.scales": ()}, "expected numbers above 0"),
        ({"optimizer.layer_decay": 0.9}, "layer_decay is for classification"),
    ],
)
def test_bad_keys_are_sentences(shapes, keys, message):
    config = small_config(shapes, **keys)
    check = build_model if "optimizer.layer_decay" in keys else configuration.check
    with pytest.raises(UserError, match=message):
        check(config)


def test_classification_does_not_read_the_keys_of_segmentation():
    config = small_run.small_config(**{"segmentation.channels": 64})
    with pytest.raises(UserError, match=r"is 64, which config.task=classification does not"):
        configuration.check(config)
