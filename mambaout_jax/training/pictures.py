"""masks.png: what a network of segmentation predicts for a few held-out images."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from mambaout_jax.data.buffers import Batch
from mambaout_jax.data.segmentation.drawing import overlay, palette
from mambaout_jax.data.segmentation.masks import IGNORED
from mambaout_jax.inference.evaluate_masks import predict_step
from mambaout_jax.models.mambaout import on_device
from mambaout_jax.runtime.compilation import compiler_options
from mambaout_jax.runtime.sharding import over_mesh
from mambaout_jax.training.run import Run

_SHOWN = 4  # images
_COLUMNS = ("image", "labels", "prediction")
_SIDE = 2.6  # inches of a picture
_LEGEND = 16  # classes that are named, those of the most pixels


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A few held-out images, and what predicts their labels.

    Attributes:
        batch: of `EvalBatches.some`, the same in every process.
        class_names: in the order of the labels.
        predict: parameters on the mesh to labels [N, OH, OW]; all processes must call it.
    """

    batch: Batch
    class_names: Sequence[str]
    predict: Callable[[Any], np.ndarray]


def open_pictures(run: Run, shardings: Any) -> Pictures | None:
    """Returns the pictures of a run, None where its task or its data has none.

    The program is compiled at the first prediction. Each device predicts all of the images.

    Args:
        run: its model, data, recipe and mesh.
        shardings: of the parameters.
    """
    batch = run.eval_batches.some(_SHOWN) if run.task.dense else None
    if batch is None:
        return None
    device, whole = run.mesh.devices.flat[0], NamedSharding(run.mesh, P())
    parts = {"model": on_device(run.model, device), "mean": run.recipe.mean, "std": run.recipe.std}
    predict = jax.jit(
        over_mesh(predict_step, run.mesh, **parts, shape=batch["label"].shape[1:]),
        in_shardings=(shardings, whole),
        out_shardings=whole,
        compiler_options=compiler_options(device.platform),
    )
    inputs = {
        name: jax.make_array_from_process_local_data(whole, batch[name], batch[name].shape)
        for name in ("image", "input_size", "label_size")
    }
    names = run.eval_batches.class_names
    return Pictures(batch, names, lambda params: np.asarray(predict(params, inputs)))


def draw(pictures: Pictures, predicted: np.ndarray, title: str) -> bytes:
    """Draws images beside their labels and predictions, with the names of the classes.

    Args:
        pictures: the images.
        predicted: of them, int [N, OH, OW].
        title: of the whole.

    Returns:
        A PNG file.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    batch, class_names = pictures.batch, pictures.class_names
    count = len(batch["image"])
    figure = Figure(figsize=(_SIDE * 3 + 1.8, _SIDE * count + 0.4), layout="constrained")
    figure.suptitle(_printable(title), fontsize="medium", parse_math=False)
    rows = figure.subplots(count, len(_COLUMNS), squeeze=False)
    pixels = np.zeros(256, np.int64)
    for row, axes in enumerate(rows):
        height, width = batch["label_size"][row]
        input_height, input_width = batch["input_size"][row]
        resized = Image.fromarray(batch["image"][row, :input_height, :input_width])
        image = np.asarray(resized.resize((int(width), int(height)), Image.Resampling.BILINEAR))
        labels = batch["label"][row, :height, :width]
        guess = predicted[row, :height, :width].astype(np.uint8)
        pixels += np.bincount(labels.ravel(), minlength=256)
        pixels += np.bincount(guess.ravel(), minlength=256)
        shown = (image, *(overlay(image, mask, len(class_names)) for mask in (labels, guess)))
        for axis, picture, name in zip(axes, shown, _COLUMNS, strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(name)
    pixels[IGNORED] = 0
    classes = [label for label in np.argsort(-pixels, kind="stable")[:_LEGEND] if pixels[label]]
    colours = palette(len(class_names)) / 255
    figure.legend(
        [Patch(color=colours[label]) for label in classes],
        [_printable(class_names[label]).replace("$", r"\$") for label in classes],
        loc="outside right center",
    )
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()


def _printable(text: str) -> str:
    """Returns a text without the bytes that are not UTF-8, which names of files may have."""
    return text.encode(errors="replace").decode()
