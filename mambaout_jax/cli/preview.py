"""Writes a contact sheet of a run's first training images.

python -m mambaout_jax.cli.preview --config=configs/quickstart.py --output=sheet.png
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from mambaout_jax import build_data
from mambaout_jax.cli.flags import parse_flags
from mambaout_jax.config import check
from mambaout_jax.data.preview import contact_sheet, save
from mambaout_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration file.")
_OUTPUT = flags.DEFINE_string("output", "sheet.png", "The image file to write.")
_ROWS = flags.DEFINE_integer("rows", 6, "Rows of the sheet.", lower_bound=1)
_COLUMNS = flags.DEFINE_integer("columns", 8, "Images in a row.", lower_bound=1)


def main(_: list[str]) -> None:
    """Writes the sheet that the flags ask for."""
    config = _CONFIG.value
    build_data.fill_in(config)
    check(config)
    config.data.workers = 0  # the sheet is finished before processes would have started
    batches = build_data.build_train_batches(config)
    sheet = contact_sheet(batches, _ROWS.value, _COLUMNS.value)
    batches.close()
    save(sheet, _OUTPUT.value)
    print(f"wrote {_OUTPUT.value}")


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except UserError as error:
        sys.exit(f"error: {error}")
