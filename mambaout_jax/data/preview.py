"""A contact sheet of training pictures as the host's augmentation leaves them, with their labels.

python -m mambaout_jax.data.preview --config=configs/quickstart.py --output=sheet.png
"""

import sys

from absl import app, flags
from ml_collections import config_flags
from PIL import Image, ImageDraw

from mambaout_jax.config import check_command_line
from mambaout_jax.data.loader import TrainBatches
from mambaout_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration file.")
_OUTPUT = flags.DEFINE_string("output", "sheet.png", "The picture file to write.")
_ROWS = flags.DEFINE_integer("rows", 6, "Rows of the sheet.", lower_bound=1)
_COLUMNS = flags.DEFINE_integer("columns", 8, "Pictures in a row.", lower_bound=1)

_SMALLEST = 96  # pixels of a picture's side on the sheet
_CAPTION = 16  # pixels below a picture


def contact_sheet(batches: TrainBatches, rows: int, columns: int) -> Image.Image:
    """Draws the first pictures of a run's order, each above its class name.

    Args:
      batches: where the pictures come from.
      rows: of the sheet.
      columns: pictures in a row.

    Returns:
      The sheet, mode RGB.
    """
    pictures: list[tuple[Image.Image, int]] = []
    while len(pictures) < rows * columns:
        batch = next(batches)
        for pixels, label in zip(batch["image"], batch["label"], strict=True):
            pictures.append((Image.fromarray(pixels), int(label)))
    side = pictures[0][0].width
    side *= max(1, _SMALLEST // side)
    sheet = Image.new("RGB", (columns * side, rows * (side + _CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, label) in enumerate(pictures[: rows * columns]):
        left, top = index % columns * side, index // columns * (side + _CAPTION)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
        draw.text((left + 2, top + side + 2), batches.class_names[label], fill="black")
    return sheet


def save(sheet: Image.Image, output: str) -> None:
    """Writes the sheet, or raises a UserError that says why it cannot."""
    try:
        sheet.save(output)
    except ValueError as error:
        raise UserError(f"--output is {output}; it ends in .png, .jpg or .webp.") from error
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}.") from error


def main(_: list[str]) -> None:
    """Writes the sheet that the flags ask for."""
    config = _CONFIG.value
    config.data.workers = 0  # a sheet is made sooner than processes start
    batches = TrainBatches(config)
    sheet = contact_sheet(batches, _ROWS.value, _COLUMNS.value)
    batches.close()
    save(sheet, _OUTPUT.value)
    print(f"wrote {_OUTPUT.value}")


def _parse_flags(argv: list[str]) -> list[str]:
    check_command_line(argv)
    flags.mark_flag_as_required("config")
    return app.parse_flags_with_usage(argv)


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=_parse_flags)
    except UserError as error:
        sys.exit(f"error: {error}")
