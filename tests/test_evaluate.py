"""The evaluation engine: exact sums for any batch, devices and processes, within memory."""

import dataclasses
import functools
import io

import golden
import jax
import numpy as np
import pytest
import small_weights

import mambaout_jax
from mambaout_jax.data.loader import LoaderOptions
from mambaout_jax.data.preprocess import normalize, preprocess_image
from mambaout_jax.data.sources import Source
from mambaout_jax.errors import UserError
from mambaout_jax.inference import evaluate_weights as by_weights
from mambaout_jax.inference.evaluate import compile_eval_step, describe, eval_step, evaluate, means
from mambaout_jax.inference.evaluate_weights import evaluate_weights
from mambaout_jax.inference.ground_truth import GroundTruthSource
from mambaout_jax.runtime.sharding import make_mesh, state_shardings

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
CLASSES = 10
INFO = dataclasses.replace(small_weights.INFO, num_classes=CLASSES)
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"


def png(seed):
    file = io.BytesIO()
    small_weights.image(seed).save(file, "PNG")
    return file.getvalue()


class Noise(Source):
    """Images of noise with random labels."""

    name = "noise/validation"

    def __init__(self, count, num_classes=CLASSES):
        self.class_names = [f"class {index}" for index in range(num_classes)]
        self.labels = np.random.RandomState(0).randint(0, num_classes, count)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        name = f"ILSVRC2012_val_{index + 1:08d}.png"
        return {"image": png(index), "label": int(self.labels[index]), "name": name}


@pytest.fixture(scope="module")
def params():
    return golden.params(INFO.create_model())


@pytest.fixture(scope="module")
def logits(params):
    """Logits of the first 30 images of noise."""
    p, source = INFO.preprocessing, Noise(30)
    images = np.stack([preprocess_image(source[i]["image"], p) for i in range(30)])
    answer = jax.jit(INFO.create_model().apply)(
        {"params": params}, normalize(images, p.mean, p.std)
    )
    return np.asarray(answer, np.float64)


def expected(logits, right, classes=None):
    """Returns loss, top-1 and top-5 by numpy; `right` is a list of classes for each row."""
    if classes is not None:
        logits = np.where(np.isin(np.arange(logits.shape[1]), classes), logits, -np.inf)
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    order = np.argsort(-logits, axis=1)
    rows = [row for row in range(len(logits)) if len(right[row])]
    results = {
        "loss": np.mean([-np.log(probs[row][list(right[row])].sum()) for row in rows]),
        "top1": 100 * np.mean([order[row][0] in right[row] for row in rows]),
        "top5": 100 * np.mean([bool({*order[row][:5]} & {*right[row]}) for row in rows]),
        "examples": len(rows),
    }
    if len(classes or logits[0]) <= 5:
        del results["top5"]
    return results


def measure(params, source, batch_size=8, info=INFO, **options):
    loader = LoaderOptions(workers=0, threads=2, backend="auto")
    given = {"preprocessing": INFO.preprocessing, "batch_size": batch_size, "loader": loader}
    return evaluate_weights(params, info, source, **given, **options)


def batch_of(size, seed=0):
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (size, 32, 32, 3), np.uint8)
    return {"image": image, "label": random.integers(0, CLASSES, size).astype(np.int32)}


def limit_memory(monkeypatch, images, error):
    """Makes the compiled step fail for batches of more than `images`."""

    def compile_limited(*args, **options):
        step = compile_eval_step(*args, **options)

        def limited(params, batch):
            if len(batch["mask"]) > images:
                raise error
            return step(params, batch)

        return limited

    monkeypatch.setattr(by_weights, "compile_eval_step", compile_limited)
    monkeypatch.setattr(by_weights, "_compiled_once", by_weights._compiled_once.__wrapped__)


def test_padding_and_images_without_a_right_class_do_not_count(params):
    model = INFO.create_model()
    batch = batch_of(8)
    labels = np.stack([batch["label"], (batch["label"] + 1) % CLASSES, np.full(8, -1)], axis=1)
    labels[2] = -1  # no right class
    labels[3, 1] = -1
    mask = np.arange(8) < 5
    run = jax.jit(functools.partial(eval_step, model=model, mean=MEAN, std=STD))
    answer = jax.jit(model.apply)({"params": params}, normalize(batch["image"], MEAN, STD))
    right = [[label for label in row if label >= 0] for row in labels]
    for name, given, lists in (
        ("one label", batch["label"], [[label] for label in batch["label"]]),
        ("several labels", labels.astype(np.int32), right),
    ):
        padded = run(params, {**batch, "label": given, "mask": mask})
        cut = run(params, {"image": batch["image"][:5], "label": given[:5], "mask": mask[:5]})
        by_numpy = expected(np.asarray(answer, np.float64)[:5], lists[:5])
        assert means(padded) == pytest.approx(by_numpy, rel=1e-5), name
        assert means(cut) == pytest.approx(by_numpy, rel=1e-5), name
        assert {value.dtype for key, value in padded.items() if key != "loss"} == {
            np.dtype("int32")
        }


@pytest.mark.parametrize("fsdp", [1, 2])
def test_eight_devices_equal_one(fsdp):
    options = {"depths": (1, 1, 1, 1), "widths": (16, 32, 64, 128), "num_classes": CLASSES}
    model = mambaout_jax.create_model("test_mambaout", **options, depthwise="xla")
    params = golden.params(model)
    batches = [{**batch_of(16, seed), "mask": np.arange(16) < 16 - 5 * seed} for seed in range(2)]
    results = []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(fsdp)):
        shardings = state_shardings(params, mesh)
        step = compile_eval_step(model, shardings, mesh, mean=MEAN, std=STD)
        placed = jax.device_put(params, shardings)
        results.append(evaluate(step, placed, batches, mesh))
    assert results[0]["examples"] == 27
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(placed)) == (fsdp == 1)


@pytest.mark.parametrize("batch_size", [8, 12, 16, 64])
def test_no_batch_size_changes_the_result(params, logits, batch_size):
    """Thirty images, which none of these divides."""
    source = Noise(30)
    evaluation = measure(params, source, batch_size)
    by_numpy = expected(logits, [[label] for label in source.labels])
    assert 0 < by_numpy["top1"] < by_numpy["top5"] < 100, "the case must tell the two apart"
    assert evaluation.results == pytest.approx(by_numpy, rel=1e-5)
    assert evaluation.batch_size == -(-batch_size // 8) * 8


@pytest.mark.parametrize("subset", [None, [8, 1, 3, 0, 6, 9], [5, 1, 3]])
def test_reassessed_labels_of_a_subset(params, logits, subset):
    random = np.random.RandomState(1)
    real = [random.permutation(CLASSES)[: number % 4].tolist() for number in range(30)]
    source = GroundTruthSource(Noise(30), CLASSES, subset, real)
    right = [[label for label in row if subset is None or label in subset] for row in real]
    by_numpy = expected(logits, right, subset)
    assert by_numpy["examples"] < 30
    results = measure(params, source, classes=subset).results
    assert results == pytest.approx(by_numpy, rel=1e-5)


def test_top5_of_five_classes_is_left_out():
    assert describe({"top1": 12.345678, "top5": 50.0}, digits=2) == "top-1 12.35%, top-5 50.00%"
    assert describe({"top1": 12.345678}, digits=3) == "top-1 12.346%"
    info = dataclasses.replace(INFO, num_classes=5)
    batch = {**batch_of(8), "mask": np.ones(8, bool)}
    batch["label"] %= 5
    step = functools.partial(eval_step, model=info.create_model(), mean=MEAN, std=STD)
    assert set(jax.eval_shape(step, golden.params(info.create_model()), batch)) == {
        "loss",
        "top1",
        "examples",
    }


def test_images_without_a_right_class_are_not_decoded(params):
    class Damaged(Noise):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            return record | {"image": b"damaged"} if index == 2 else record

    real = [[index % CLASSES] for index in range(11)]
    with pytest.raises(UserError, match=r"val_00000003.png cannot be decoded"):
        measure(params, GroundTruthSource(Damaged(11), CLASSES, None, real))
    real[2] = []
    assert (
        measure(params, GroundTruthSource(Damaged(11), CLASSES, None, real)).results["examples"]
        == 10
    )


def test_no_image_to_count_is_an_error(params):
    source = GroundTruthSource(Noise(11), CLASSES, None, [[]] * 11)
    with pytest.raises(UserError, match="no image of noise/validation has a right class"):
        measure(params, source)


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError(OUT_OF_MEMORY), MemoryError()])
def test_the_batch_shrinks_until_memory_suffices(params, monkeypatch, caplog, error):
    whole = measure(params, Noise(30), 64)
    limit_memory(monkeypatch, 8, error)
    shrunk = measure(params, Noise(30), 40)
    assert shrunk.batch_size == 8
    assert shrunk.results == pytest.approx(whole.results, rel=1e-6)
    assert [record.message.split()[-1] for record in caplog.records] == ["24", "16", "8"]


def test_too_little_memory_for_one_image_per_device(params, monkeypatch):
    limit_memory(monkeypatch, 0, jax.errors.JaxRuntimeError(OUT_OF_MEMORY))
    with pytest.raises(UserError, match="not enough memory for one image per device"):
        measure(params, Noise(11), 16)


def test_other_errors_of_the_device_are_raised(params, monkeypatch):
    limit_memory(monkeypatch, 0, jax.errors.JaxRuntimeError("INTERNAL: something else"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measure(params, Noise(11))


def test_weights_without_a_head_are_refused(params):
    headless = dataclasses.replace(INFO, num_classes=0)
    with pytest.raises(UserError, match="have no classes to predict"):
        measure(params, Noise(3), info=headless)


def test_the_ground_truth_must_belong_to_the_weights():
    with pytest.raises(UserError, match="has 7 classes: expected the 10 of the weights or the 3"):
        GroundTruthSource(Noise(3, 7), CLASSES, [1, 2, 3])
    with pytest.raises(UserError, match=r"image 2 are \[3, 10\]: expected classes .* 0 to 9"):
        GroundTruthSource(Noise(3), CLASSES, None, [[1], [10, 3], []])
    with pytest.raises(UserError, match=r"val_00000003.png has no reassessed labels: .*_00000002"):
        GroundTruthSource(Noise(3), CLASSES, None, [[1], [2]])[2]
