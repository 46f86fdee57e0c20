"""A contact sheet of training images after the host's augmentation, with their labels."""

import runpy

from PIL import Image, ImageDraw

from mambaout_jax.data.loader import TrainBatches
from mambaout_jax.errors import UserError, first_line

_SMALLEST = 96  # pixels of an image's side on the sheet
_CAPTION = 16  # pixels below an image


def contact_sheet(batches: TrainBatches, rows: int, columns: int) -> Image.Image:
    """Draws the first images of a run's order, each above its class name.

    Args:
      batches: the source of the images.
      rows: of the sheet.
      columns: images in a row.

    Returns:
      The sheet, mode RGB.
    """
    images: list[tuple[Image.Image, int]] = []
    while len(images) < rows * columns:
        batch = next(batches)
        for pixels, label in zip(batch["image"], batch["label"], strict=True):
            images.append((Image.fromarray(pixels), int(label)))
    side = images[0][0].width
    side *= max(1, _SMALLEST // side)
    sheet = Image.new("RGB", (columns * side, rows * (side + _CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, label) in enumerate(images[: rows * columns]):
        left, top = index % columns * side, index // columns * (side + _CAPTION)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top))
        draw.text((left + 2, top + side + 2), batches.class_names[label], fill="black")
    return sheet


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
