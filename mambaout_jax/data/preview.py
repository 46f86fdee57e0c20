"""A contact sheet of training images after the host's augmentation, with their labels."""

import runpy

import numpy as np
from PIL import Image, ImageDraw

from mambaout_jax.data.loader import TrainBatches
from mambaout_jax.data.segmentation.drawing import overlay
from mambaout_jax.data.segmentation.masks import IGNORED
from mambaout_jax.errors import UserError, first_line

_SMALLEST = 96  # pixels of an image's side on the sheet
_CAPTION = 16  # pixels below an image


def contact_sheet(batches: TrainBatches, rows: int, columns: int) -> Image.Image:
    """Draws the first images of a run's order, each above its class name.

    Masks are drawn over their images, above the names of their classes, the largest first.

    Args:
      batches: the source of the images.
      rows: of the sheet.
      columns: images in a row.

    Returns:
      The sheet, mode RGB.
    """
    images: list[tuple[Image.Image, str]] = []
    while len(images) < rows * columns:
        batch = next(batches)
        for pixels, label in zip(batch["image"], batch["label"], strict=True):
            images.append(_tile(pixels, label, batches.class_names))
    side = images[0][0].width
    side *= max(1, _SMALLEST // side)
    sheet = Image.new("RGB", (columns * side, rows * (side + _CAPTION)), "white")
    for index, (image, name) in enumerate(images[: rows * columns]):
        left, top = index % columns * side, index // columns * (side + _CAPTION)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top))
        caption = Image.new("RGB", (side, _CAPTION), "white")
        ImageDraw.Draw(caption).text((2, 2), name, fill="black")
        sheet.paste(caption, (left, top + side))
    return sheet


def _tile(pixels: np.ndarray, label: np.ndarray, names: list[str]) -> tuple[Image.Image, str]:
    """Returns a training image as it is drawn, and the text below it."""
    if not label.ndim:
        return Image.fromarray(pixels), names[int(label)]
    counts = np.bincount(label.ravel(), minlength=IGNORED + 1)[: len(names)]
    largest = [names[index] for index in np.argsort(-counts, stable=True) if counts[index]]
    return Image.fromarray(overlay(pixels, label, len(names))), ", ".join(largest)


def save(sheet: Image.Image, output: str) -> None:
    """Writes the sheet.

    Raises:
      UserError: it cannot be written.
    """
    try:
        sheet.save(output)
    except ValueError as error:
        raise UserError(f"--output is {output}: expected a .png, .jpg or .webp file") from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"--output {output} cannot be written: {reason}") from error


if __name__ == "__main__":  # the former name of the command
    runpy.run_module("mambaout_jax.cli.preview", run_name="__main__", alter_sys=True)
