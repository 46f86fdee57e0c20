"""Distillation: the losses, the teacher in the compiled step, resumed runs, and mistakes."""

import dataclasses
import zipfile

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run
import small_weights
from etils import epath

import mambaout_jax
from mambaout_jax.build import build_run
from mambaout_jax.data.preprocess import Preprocessing, normalize
from mambaout_jax.errors import UserError
from mambaout_jax.inference.export import export_model
from mambaout_jax.runtime.sharding import global_batch, make_mesh, state_shardings
from mambaout_jax.training import distillation
from mambaout_jax.training.classification import loss
from mambaout_jax.training.metrics import LossMeter
from mambaout_jax.training.recipe import Recipe
from mambaout_jax.training.state import init_state
from mambaout_jax.training.step import augment, compile_train_step
from mambaout_jax.training.teacher import read_teacher
from mambaout_jax.weights.load import read_weights
from mambaout_jax.weights.store import load_weights

KEY = jax.random.key(0)
NAMES = tuple("0123456789")
RECIPE = Recipe(
    num_classes=10,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    distillation_weight=0.3,
    distillation_temperature=2.5,
)
OPTIONS = {"classes": NAMES, "image_size": 32, "mean": RECIPE.mean, "std": RECIPE.std,
           "dtype": "float32", "device": jax.devices()[0]}  # fmt: skip
HALF = Preprocessing(size=32, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint of the ten digits with a normalisation of its own."""
    path = tmp_path_factory.mktemp("teacher") / "weights"
    return small_weights.write(path, 3, num_classes=10, class_names=NAMES, preprocessing=HALF)


@pytest.fixture(scope="module")
def exported(teacher):
    params, info = read_weights(teacher)
    path = teacher.with_name("network.zip")
    export_model(path, info.create_model(), params, info, platforms=["cpu"])
    return path


def batch_of(size):
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (size, 32, 32, 3), np.uint8)
    return {"image": images, "label": random.randint(0, 10, size).astype(np.int32)}


def taught(kind, logits, teacher, temperature):
    """Returns each example's loss by hand."""
    logits, teacher = (np.asarray(x, np.float64) for x in (logits, teacher))
    if kind == "hard":
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -log_probs[np.arange(len(logits)), teacher.argmax(axis=1)]
    p, q = (
        np.exp(x / temperature) / np.exp(x / temperature).sum(axis=1, keepdims=True)
        for x in (teacher, logits)
    )
    return temperature**2 * (p * np.log(p / q)).sum(axis=1)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_each_option_acts_on_the_loss(kind):
    random = np.random.RandomState(1)
    logits, teacher = random.standard_normal((2, 6, 10)).astype(np.float32)
    target = np.eye(10, dtype=np.float32)[:6]
    for weight, temperature in ((0.0, 1.0), (0.3, 1.0), (0.3, 4.0), (1.0, 1.0)):
        recipe = dataclasses.replace(
            RECIPE,
            distillation=kind,
            distillation_weight=weight,
            distillation_temperature=temperature,
        )
        own = -(jax.nn.log_softmax(logits) * target).sum(axis=1).mean()
        expected = (1 - weight) * own + weight * taught(kind, logits, teacher, temperature).mean()
        inputs = {"target": target, "teacher": teacher}
        np.testing.assert_allclose(loss(logits, inputs, recipe), expected, rtol=1e-5)
        np.testing.assert_allclose(loss(logits, {"target": target}, recipe), own, rtol=1e-6)
    assert float(distillation.soft(logits, jnp.array(logits), 2.0).max()) < 1e-6


@pytest.mark.parametrize(
    ("kind", "parts"), [("soft", 1), pytest.param("hard", 2, marks=pytest.mark.slow)]
)
def test_the_compiled_step_learns_from_the_teacher(kind, parts, teacher, exported):
    """On eight devices; soft from weights, hard from an exported network."""
    path = {"soft": teacher, "hard": exported}[kind]
    read = read_teacher(str(path), **OPTIONS)
    network, params = mambaout_jax.load_pretrained(teacher)
    batch = batch_of(16)
    recipe = dataclasses.replace(RECIPE, distillation=kind, accumulate_steps=parts)
    model = small_weights.INFO.create_model(num_classes=10)
    state = init_state(golden.params(model), optax.sgd(0.1), ema=False)

    @jax.jit
    def by_hand():
        inputs = augment(KEY, state.step, batch, recipe)["image"]
        theirs = network.apply({"params": params}, normalize(batch["image"], HALF.mean, HALF.std))
        return (
            model.apply({"params": state.params}, inputs),
            theirs,
            read.logits(read.params, inputs),
        )

    logits, theirs, given = by_hand()
    # An exported network gets the same pixels again.
    np.testing.assert_allclose(given, theirs, atol=1e-4)
    own = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    expected = 0.7 * own + 0.3 * taught(kind, logits, theirs, 2.5).mean()
    assert abs(expected - own) > 0.05
    mesh = make_mesh()
    assert mesh.size == 8
    shardings = state_shardings(state, mesh)
    step = compile_train_step(model, optax.sgd(0.1), recipe, shardings, mesh, read)
    placed = jax.device_put(state, shardings), global_batch(batch, mesh), jax.random.key_data(KEY)
    after, metrics = step(*placed, read.params)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), after.params, golden.params(model))
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    keys = {"distillation.teacher": "test_mambaout.digits", "checkpoint.every": "6 steps"}
    config = small_run.small_config(**keys)
    small_run.train(config, tmp_path / "straight")
    small_run.train(small_run.small_config(), tmp_path / "alone")
    push = LossMeter.push

    def crash_at_ten(losses, step, loss):
        if step == 10:
            raise RuntimeError("crashed")
        push(losses, step, loss)

    monkeypatch.setattr(LossMeter, "push", crash_at_ten)
    with pytest.raises(RuntimeError, match="crashed"):
        small_run.train(config, tmp_path / "stopped")
    monkeypatch.undo()
    small_run.train(config, tmp_path / "stopped")
    rows = {path.name: (path / "metrics.csv").read_text() for path in tmp_path.iterdir()}
    assert rows["stopped"] == rows["straight"] != rows["alone"]
    expected, got = (
        load_weights(epath.Path(tmp_path / name / "checkpoints/12"))[0]
        for name in ("straight", "stopped")
    )
    jax.tree.map(np.testing.assert_array_equal, expected, got)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": NAMES[:9]}, "has 10 classes, and the data 9: expected a teacher of the same"),
        ({"classes": NAMES[::-1]}, "class 0 of the teacher .* is '0', and of the data '9'"),
        ({"image_size": 31}, "the teacher .*: expected images .* at least 32 pixels"),
        ({"name": "nothing.zip"}, "nothing.zip cannot be read as an exported network: .*No such"),
        ({"name": "nothing"}, "there are no weights 'nothing'"),
        ({"name": "exported", "image_size": 64}, "takes images of 32x32 pixels: expected --config"),
        ({"name": "exported", "classes": NAMES[:9]}, "has 10 classes, and the data 9"),
        ({"name": "damaged"}, "damaged.zip cannot be read as an exported network: "),
        ({"name": "other"}, "other.zip cannot be read as an exported network: .*network.json"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes(change, message, teacher, exported, tmp_path):
    options = OPTIONS | {"name": str(teacher)} | change
    damaged, other = tmp_path / "damaged.zip", tmp_path / "other.zip"
    damaged.write_bytes(exported.read_bytes()[:-100])
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme", "no network")
    names = {"exported": exported, "damaged": damaged, "other": other}
    options["name"] = str(names.get(options["name"], options["name"]))
    with pytest.raises(UserError, match=message):
        read_teacher(**options)


def test_a_run_has_the_teacher_of_its_config(teacher):
    run = build_run(small_run.small_config(**{"distillation.teacher": str(teacher)}))
    params, _ = read_weights(teacher)
    jax.tree.map(np.testing.assert_array_equal, run.teacher.params, params)
    assert build_run(small_run.small_config()).teacher is None
    with pytest.raises(UserError, match="'sof'; did you mean 'soft'"):
        build_run(small_run.small_config(**{"distillation.kind": "sof"}))
