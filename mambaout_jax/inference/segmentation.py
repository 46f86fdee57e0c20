"""Results of semantic segmentation: counted pixels of each label and prediction, and their means.

Predictions have the size of the labels, as in mmsegmentation: logits are resized to the input,
padding is cut off, the rest is resized to the original size, and then the largest logit wins.
Confusion matrices of batches and processes are summed, and divided once at the end.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mambaout_jax.data.segmentation.masks import IGNORED
from mambaout_jax.errors import UserError

_ROWS = 32  # of the labels that are predicted at a time; divides their padded height


def confusion(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Counts the pixels of a batch by label and prediction.

    Args:
        logits: float32 [N, h, w, C] at any stride of the padded image.
        batch: of `data.segmentation.whole.PaddedImages`; "mask" bool [N] is False for padding.

    Returns:
        int32 [C, C]: a row is a label, a column a prediction. IGNORED and padding are left out.
    """
    classes = logits.shape[-1]
    counted = jnp.where(batch["mask"][:, None, None], batch["label"], IGNORED)
    # A label beyond the classes has a one-hot vector of zeros.
    strips = counted.reshape(len(logits), -1, _ROWS, counted.shape[2]).swapaxes(0, 1)

    def count(total: jax.Array, strip: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        labels, start = strip
        predicted = predict_rows(start)
        # Per image, float32 counts are exact: there are fewer than 2**24 pixels.
        pairs = jnp.einsum(
            "nhwc,nhwd->ncd", jax.nn.one_hot(labels, classes), jax.nn.one_hot(predicted, classes)
        )
        return total + pairs.astype(jnp.int32), None

    predict_rows = _row_predictor(logits, batch, counted.shape[2])
    starts = jnp.arange(len(strips)) * _ROWS
    zeros = jnp.zeros((len(logits), classes, classes), jnp.int32)
    return jax.lax.scan(count, zeros, (strips, starts))[0].sum(axis=0)


def predict_labels(
    logits: jax.Array, batch: Mapping[str, jax.Array], shape: tuple[int, int]
) -> jax.Array:
    """Returns the predicted labels at the original size.

    Args:
        logits: float32 [N, h, w, C] at any stride of the padded image.
        batch: "image" [N, H, W, 3], of which the shape counts, "input_size" and "label_size".
        shape: (OH, OW) of the result, at least the largest "label_size".

    Returns:
        int32 [N, OH, OW]. What is outside of "label_size" has no meaning.
    """
    predict_rows = _row_predictor(logits, batch, shape[1])
    starts = jnp.arange(-(-shape[0] // _ROWS)) * _ROWS
    strips = jax.lax.map(predict_rows, starts)
    return strips.swapaxes(0, 1).reshape(len(logits), -1, shape[1])[:, : shape[0]]


def results(matrix: np.ndarray) -> dict[str, float]:
    """Returns the means over classes and pixels of a confusion matrix.

    Args:
        matrix: [C, C], a row is a label, a column a prediction.

    Returns:
        In percent: "miou" (mean intersection over union), "macc" (mean accuracy of the classes) and
        "aacc" (accuracy of all pixels). A class that is neither a label nor predicted is not in
        "miou", and one that is no label not in "macc", as in mmsegmentation.

    Raises:
        UserError: no pixel was counted.
    """
    matrix = np.asarray(matrix, np.int64)
    if not matrix.any():
        raise UserError(
            "no pixel of the evaluation has the label of a class: check the masks and "
            "reduce_zero_label"
        )
    iou, accuracy = per_class(matrix)
    return {
        "miou": float(np.nanmean(iou)),
        "macc": float(np.nanmean(accuracy)),
        "aacc": 100 * float(np.trace(matrix) / matrix.sum()),
    }


def per_class(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns intersection over union and accuracy of each class in percent, NaN for 0 / 0."""
    matrix = np.asarray(matrix, np.int64)
    hits, labels = np.diagonal(matrix), matrix.sum(axis=1)
    union = labels + matrix.sum(axis=0) - hits
    with np.errstate(invalid="ignore"):
        return 100 * hits / union, 100 * hits / labels


def class_table(matrix: np.ndarray, class_names: Sequence[str]) -> str:
    """Returns the results of each class as lines of text; "-" where a class has no pixels."""
    iou, accuracy = per_class(matrix)
    pixels = np.asarray(matrix, np.int64).sum(axis=1)
    width = max(len("class"), *map(len, class_names))
    lines = [f"{'class':<{width}}  {'IoU':>6}  {'acc':>6}  {'pixels':>6}"]
    for name, *numbers in zip(class_names, iou, accuracy, 100 * pixels / pixels.sum(), strict=True):
        columns = ["-" if np.isnan(number) else f"{number:.2f}" for number in numbers]
        lines.append("  ".join([f"{name:<{width}}", *(f"{column:>6}" for column in columns)]))
    return "\n".join(lines)


def _row_predictor(logits: jax.Array, batch: Mapping[str, jax.Array], width: int) -> Any:
    """Returns a function that predicts _ROWS rows of the labels of all images.

    The two resizes are one matrix for the rows and one for the columns. All of [N, OH, OW, C] would
    not fit into the memory of a device.
    """
    inputs, outputs = batch["input_size"], batch["label_size"]
    _, height, padded_width, _ = batch["image"].shape
    to_rows = _resize_matrix(height, logits.shape[1])
    to_columns = _resize_matrix(padded_width, logits.shape[2])
    columns = _product(
        "now,wv->nov", _resizes(0, width, inputs[:, 1], outputs[:, 1], padded_width), to_columns
    )

    def predict_rows(start: jax.Array) -> jax.Array:
        resizes = _resizes(start, _ROWS, inputs[:, 0], outputs[:, 0], height)
        rows = _product("noh,hu->nou", resizes, to_rows)
        resized = _product("nou,nuvc->novc", rows, logits)
        return _product("nov,nrvc->nroc", columns, resized).argmax(axis=-1)

    return predict_rows


def _resizes(
    start: jax.Array | int, count: int, inputs: jax.Array, outputs: jax.Array, length: int
) -> jax.Array:
    """Returns, for each image, the matrix of a linear resize from `inputs` to `outputs` pixels.

    Its rows are the output pixels from `start` on, [N, count, length]: align_corners=False, without
    antialiasing.
    """
    scale = inputs / jnp.maximum(outputs, 1)
    place = (jnp.arange(count) + start + 0.5)[None] * scale[:, None] - 0.5
    place = jnp.clip(place, 0, jnp.maximum(inputs - 1, 0)[:, None])
    return jnp.maximum(1 - jnp.abs(place[:, :, None] - jnp.arange(length)[None, None]), 0)


def _resize_matrix(outputs: int, inputs: int) -> jax.Array:
    """Returns the matrix of a linear resize, [outputs, inputs]."""
    sizes = jnp.array([inputs]), jnp.array([outputs])
    return _resizes(0, outputs, *sizes, inputs)[0]


def _product(equation: str, *factors: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *factors, precision=jax.lax.Precision.HIGHEST)
