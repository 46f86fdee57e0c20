"""Confusion matrices, the means of them, and pictures of masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

from mambaout_jax.data.segmentation import drawing
from mambaout_jax.errors import UserError
from mambaout_jax.inference.segmentation import (
    class_table,
    confusion,
    per_class,
    predict_labels,
    results,
)
from mambaout_jax.inference.views import slide, views
from mambaout_jax.runtime.sharding import BATCH, make_mesh

CLASSES = 5
INPUT_SIZES = [(64, 96), (50, 96), (64, 70), (13, 31), (64, 96), (7, 9), (33, 96), (60, 90)]
LABEL_SIZES = [(64, 96), (100, 128), (40, 44), (128, 120), (1, 2), (96, 128), (33, 5), (61, 90)]


def resize(array, height, width):
    """Bilinear with align_corners=False, [h, w, C] to [height, width, C], one axis at a time."""
    for axis, size in ((0, height), (1, width)):
        length = array.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(place).astype(int)
        part = np.expand_dims(place - low, tuple({0, 1, 2} - {axis}))
        below = np.take(array, low, axis)
        above = np.take(array, np.minimum(low + 1, length - 1), axis)
        array = below + (above - below) * part
    return array


@pytest.fixture(scope="module")
def case():
    """Eight images, of which the last row is padding: (logits, batch, expected predictions)."""
    rng = np.random.default_rng(0)
    count = len(INPUT_SIZES)
    logits = rng.normal(size=(count, 16, 24, CLASSES)).astype(np.float32)
    labels = np.full((count, 128, 128), 255, np.uint8)
    predictions = []
    for row, (inputs, outputs) in enumerate(zip(INPUT_SIZES, LABEL_SIZES, strict=True)):
        labels[row, : outputs[0], : outputs[1]] = rng.choice([0, 1, 2, 3, 255], outputs)
        whole = resize(logits[row].astype(np.float64), 64, 96)[: inputs[0], : inputs[1]]
        predictions.append(resize(whole, *outputs).argmax(-1))
    batch = {
        "image": np.zeros((count, 64, 96, 3), np.uint8),
        "label": labels,
        "input_size": np.array(INPUT_SIZES, np.int32),
        "label_size": np.array(LABEL_SIZES, np.int32),
        "mask": np.array([True] * (count - 1) + [False]),
    }
    return logits, batch, predictions


def expected_matrix(batch, predictions):
    pairs = []
    for row in np.flatnonzero(batch["mask"]):
        height, width = batch["label_size"][row]
        labels = batch["label"][row, :height, :width]
        pairs.append((labels[labels != 255], predictions[row][labels != 255]))
    labels, predicted = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return confusion_matrix(labels, predicted, labels=range(CLASSES)), labels, predicted


def test_predictions_have_the_size_of_the_labels(case):
    logits, batch, predictions = case
    predicted = jax.jit(functools.partial(predict_labels, shape=(128, 128)))(logits, batch)
    for row, expected in enumerate(predictions):
        height, width = LABEL_SIZES[row]
        np.testing.assert_array_equal(predicted[row, :height, :width], expected)
    few = predict_labels(jnp.array(logits), batch, (50, 128))
    np.testing.assert_array_equal(few, predicted[:, :50])


def test_torch_resizes_alike(case):
    functional = pytest.importorskip("torch.nn.functional")
    import torch

    logits, _, predictions = case
    for row, expected in enumerate(predictions):
        bilinear = functools.partial(functional.interpolate, mode="bilinear", align_corners=False)
        whole = bilinear(torch.tensor(logits[row]).permute(2, 0, 1)[None], size=(64, 96))
        height, width = INPUT_SIZES[row]
        resized = bilinear(whole[:, :, :height, :width], size=LABEL_SIZES[row])
        differing = (resized[0].argmax(0).numpy() != expected).mean()
        assert differing <= 1e-3, row  # float32 decides where two classes are as good


def test_the_matrix_is_that_of_scikit_learn(case):
    logits, batch, predictions = case
    matrix = jax.jit(confusion)(logits, batch)
    expected, labels, predicted = expected_matrix(batch, predictions)
    assert matrix.dtype == jnp.int32
    np.testing.assert_array_equal(matrix, expected)
    assert expected[4].sum() == 0  # a class without labels, which is predicted
    found = results(matrix)
    iou = jaccard_score(labels, predicted, labels=range(CLASSES), average=None)
    accuracy = np.diagonal(expected)[:4] / expected.sum(axis=1)[:4]
    assert found["miou"] == pytest.approx(100 * iou.mean())
    assert found["macc"] == pytest.approx(100 * accuracy.mean())
    assert found["aacc"] == pytest.approx(100 * (labels == predicted).mean())


def test_a_batch_over_eight_devices_is_counted_alike(case):
    logits, batch, _ = case
    sharding = NamedSharding(make_mesh(), BATCH)
    assert sharding.mesh.size == 8
    sharded = jax.device_put((logits, batch), sharding)
    np.testing.assert_array_equal(jax.jit(confusion)(*sharded), confusion(*map_jnp(case[:2])))


def map_jnp(tree):
    return jax.tree.map(jnp.asarray, tree)


def test_labels_beyond_the_logits_classes_are_not_counted(case):
    logits, batch, _ = map_jnp(case)
    whole = confusion(logits, batch)
    fewer = confusion(logits[..., :2], batch)
    np.testing.assert_array_equal(fewer.sum(axis=1), whole.sum(axis=1)[:2])


@pytest.mark.slow
def test_views_are_averaged_at_the_original_size(case):
    logits, batch, _ = case
    rng = np.random.default_rng(1)
    batch = batch | {
        "image": rng.integers(0, 256, batch["image"].shape, np.uint8),
        "image_1": rng.integers(0, 256, (8, 32, 64, 3), np.uint8),
        "input_size_1": np.maximum(batch["input_size"] // 2, 1),
    }
    seen = views(map_jnp(batch), flip=True)
    assert [(view.image.shape[1], view.mirrored) for view in seen] == [
        (64, False), (64, True), (32, False), (32, True)
    ]  # fmt: skip
    all_logits = [logits, logits[::-1], *rng.normal(size=(2, 8, 8, 16, CLASSES))]
    predictions = []
    for row, outputs in enumerate(LABEL_SIZES):
        total = 0
        for view, each in zip(seen, all_logits, strict=True):
            height, width = np.asarray(view.input_size)[row]
            name = "image" if view.image.shape[1] == 64 else "image_1"
            image = batch[name][row, :height, :width]
            expected = image[:, ::-1] if view.mirrored else image
            np.testing.assert_array_equal(view.image[row, :height, :width], expected)
            whole = resize(each[row].astype(np.float64), *view.image.shape[1:3])
            resized = resize(whole[:height, :width], *outputs)
            resized = resized[:, ::-1] if view.mirrored else resized
            exponents = np.exp(resized)
            total = total + exponents / exponents.sum(axis=-1, keepdims=True)
        predictions.append(total.argmax(axis=-1))
    arrays = map_jnp([each.astype(np.float32) for each in all_logits])
    matrix = jax.jit(confusion)(arrays, map_jnp(batch), seen)
    np.testing.assert_array_equal(matrix, expected_matrix(batch, predictions)[0])
    predicted = predict_labels(arrays, map_jnp(batch), (128, 128), seen)
    for row, (height, width) in enumerate(LABEL_SIZES):
        np.testing.assert_array_equal(predicted[row, :height, :width], predictions[row])


@pytest.mark.parametrize("shape", [(32, 50), (20, 32), (33, 64)])
def test_windows_are_averaged_as_in_mmsegmentation(shape):
    images = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
    window, stride = 32, 21

    def apply(part):  # a network that sees the whole window, at stride 4
        coarse = part[:, ::4, ::4]
        return coarse * (1 + part.mean(axis=(1, 2, 3), keepdims=True))

    height, width = shape
    total, count = np.zeros((2, *shape, 3)), np.zeros(shape)
    for row in range(max(height - window + stride - 1, 0) // stride + 1):
        for column in range(max(width - window + stride - 1, 0) // stride + 1):
            bottom = min(row * stride + window, height)
            right = min(column * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            logits = apply(images[:, top:bottom, left:right])
            resized = [resize(each, bottom - top, right - left) for each in logits]
            total[:, top:bottom, left:right] += resized
            count[top:bottom, left:right] += 1
    assert count.max() > 1 or shape == (20, 32)
    found = jax.jit(functools.partial(slide, apply, window=window, stride=stride))(images)
    np.testing.assert_allclose(found, total / count[..., None], atol=1e-5)


def test_classes_without_pixels_are_left_out():
    matrix = np.diag([6, 2, 0, 0])
    matrix[0, 1] = matrix[0, 3] = 1
    found = results(matrix)
    assert found["miou"] == pytest.approx(100 * (6 / 8 + 2 / 3 + 0) / 3)
    assert found["macc"] == pytest.approx(100 * (6 / 8 + 1) / 2)
    assert found["aacc"] == pytest.approx(80)
    iou, accuracy = per_class(matrix)
    assert np.isnan(iou).tolist() == [False, False, True, False]
    assert np.isnan(accuracy).tolist() == [False, False, True, True]
    assert class_table(matrix, ["sky", "a long name", "none", "never"]).splitlines() == [
        "class           IoU     acc  pixels",
        "sky           75.00   75.00   80.00",
        "a long name   66.67  100.00   20.00",
        "none              -       -    0.00",
        "never          0.00       -    0.00",
    ]


def test_an_evaluation_without_labels_is_an_error():
    with pytest.raises(UserError, match="no pixel of the evaluation has the label of a class"):
        results(np.zeros((3, 3), np.int64))


def test_the_palette_is_that_of_pascal_voc():
    colours = drawing.palette(255)
    assert colours[:4].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert colours[19].tolist() == [0, 64, 128]  # the monitor of VOC
    assert len({tuple(colour) for colour in colours.tolist()}) == 255


def test_a_legend_has_the_classes_that_appear():
    labels = np.array([[2, 2, 0, 255], [2, 2, 0, 4]], np.uint8)
    entries = drawing.legend(labels, ["sea", "sky", "sand", "rock", "sea"])
    assert [(entry.name, entry.share) for entry in entries] == [
        ("sand", 0.5), ("sea", 0.25), ("sea", 0.125),
    ]  # fmt: skip
    assert [entry.colour for entry in entries] == [tuple(drawing.palette(5)[k]) for k in (2, 0, 4)]
    assert drawing.legend(np.full((2, 2), 255, np.uint8), ["sea"]) == []


def test_palette_files_keep_the_labels(tmp_path):
    labels = np.array([[0, 1, 255], [2, 3, 4]], np.uint8)
    drawing.palette_image(labels, 5).save(tmp_path / "mask.png")
    image = Image.open(tmp_path / "mask.png")
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), labels)
    coloured = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(coloured[0], [[128, 0, 0], [0, 128, 0], [0, 0, 0]])


def test_overlays_are_half_the_image_and_half_the_colour():
    image = np.full((2, 3, 3), 100, np.uint8)
    labels = np.array([[0, 1, 255], [1, 1, 1]], np.uint8)
    over = drawing.overlay(image, labels, 2)
    np.testing.assert_array_equal(over[0], [[114, 50, 50], [50, 114, 50], [100, 100, 100]])
