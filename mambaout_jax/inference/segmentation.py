"""Results of semantic segmentation: counted pixels of each label and prediction, and their means.

Predictions have the size of the labels, as in mmsegmentation: logits are resized to the input,
padding is cut off, the rest is resized to the original size, and then the largest logit wins.
Confusion matrices of batches and processes are summed, and divided once at the end.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mambaout_jax.data.segmentation.masks import IGNORED
from mambaout_jax.errors import UserError
from mambaout_jax.inference.linear_resize import product, resize_matrix, resizes
from mambaout_jax.inference.views import View

Batch = Mapping[str, jax.Array]

_ROWS = 32  # of the labels that are predicted at a time; divides their padded height


def confusion(
    logits: jax.Array | Sequence[jax.Array], batch: Batch, seen: Sequence[View] | None = None
) -> jax.Array:
    """Counts the pixels of a batch by label and prediction.

    Args:
        logits: float32 [N, h, w, C] at any stride of the padded image; with `seen`, of each view.
        batch: of `data.segmentation.whole.PaddedImages`; "mask" bool [N] is False for padding.
        seen: the views that the logits belong to; None: the image at its first scale.

    Returns:
        int32 [C, C]: a row is a label, a column a prediction. IGNORED and padding are left out.
    """
    counted = jnp.where(batch["mask"][:, None, None], batch["label"], IGNORED)
    predict_rows, classes = _row_predictor(logits, batch, seen, counted.shape[2])

    def count(total: jax.Array, strip: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        labels, start = strip
        # A label beyond the classes has a vector of zeros. The counts in float32 are exact: an
        # image has fewer than 2**24 pixels in a strip.
        pairs = jnp.einsum(
            "nhwc,nhwd->ncd",
            jax.nn.one_hot(labels, classes),
            jax.nn.one_hot(predict_rows(start), classes),
        )
        return total + pairs.astype(jnp.int32), None

    strips = counted.reshape(len(counted), -1, _ROWS, counted.shape[2]).swapaxes(0, 1)
    zeros = jnp.zeros((len(counted), classes, classes), jnp.int32)
    starts = jnp.arange(len(strips)) * _ROWS
    return jax.lax.scan(count, zeros, (strips, starts))[0].sum(axis=0)


def predict_labels(
    logits: jax.Array | Sequence[jax.Array],
    batch: Batch,
    shape: tuple[int, int],
    seen: Sequence[View] | None = None,
) -> jax.Array:
    """Returns the predicted labels at the original size.

    Args:
        logits: see `confusion`.
        batch: "image" [N, H, W, 3], of which the shape counts, "input_size" and "label_size".
        shape: (OH, OW) of the result, at least the largest "label_size".
        seen: see `confusion`.

    Returns:
        int32 [N, OH, OW]. What is outside of "label_size" has no meaning.
    """
    predict_rows, _ = _row_predictor(logits, batch, seen, shape[1])
    starts = jnp.arange(-(-shape[0] // _ROWS)) * _ROWS
    strips = jax.lax.map(predict_rows, starts)
    count = strips.shape[1]
    return strips.swapaxes(0, 1).reshape(count, -1, shape[1])[:, : shape[0]]


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


def _row_predictor(
    logits: jax.Array | Sequence[jax.Array], batch: Batch, seen: Sequence[View] | None, width: int
) -> tuple[Callable[[jax.Array], jax.Array], int]:
    """Returns a function that predicts _ROWS rows of the labels, and the number of classes."""
    if seen is None:
        assert isinstance(logits, jax.Array)
        logits, seen = [logits], [View(batch["image"], batch["input_size"], False)]
    resizers = [
        _row_resizer(each, view, batch["label_size"], width)
        for each, view in zip(logits, seen, strict=True)
    ]

    def predict_rows(start: jax.Array) -> jax.Array:
        resized = [resize(start) for resize in resizers]
        if len(resized) > 1:  # the views' mean probabilities, but for a factor
            resized = [functools.reduce(jnp.add, map(jax.nn.softmax, resized))]
        return resized[0].argmax(axis=-1)

    return predict_rows, logits[0].shape[-1]


def _row_resizer(
    logits: jax.Array, view: View, label_size: jax.Array, width: int
) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that resizes logits to _ROWS rows of the labels.

    The two resizes are one matrix for the rows and one for the columns. All of [N, OH, OW, C] would
    not fit into the memory of a device.
    """
    _, height, padded_width, _ = view.image.shape
    to_rows = resize_matrix(height, logits.shape[1])
    to_columns = resize_matrix(padded_width, logits.shape[2])
    sizes = view.input_size[:, 1], label_size[:, 1]
    resized_columns = resizes(0, width, *sizes, padded_width, view.mirrored)
    columns = product("now,wv->nov", resized_columns, to_columns)

    def resize_rows(start: jax.Array) -> jax.Array:
        resized = resizes(start, _ROWS, view.input_size[:, 0], label_size[:, 0], height)
        rows = product("noh,hu->nou", resized, to_rows)
        resized = product("nou,nuvc->novc", rows, logits)
        return product("nov,nrvc->nroc", columns, resized)

    return resize_rows
