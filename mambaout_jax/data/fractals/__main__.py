"""Writes the fractals dataset.

    python -m mambaout_jax.data.fractals --output=fractals

Writes DIR/fractals/1.0.0, a TFDS dataset in ArrayRecord form: train with

    --config.data.name=fractals --config.data.dir=DIR --config.data.num_classes=100

With --folders it writes DIR/train/CLASS/IMAGE.jpg and DIR/validation/CLASS/IMAGE.jpg instead.
"""

import argparse
import sys
import time
from pathlib import Path

from mambaout_jax.data.fractals.images import CLASSES, SPLITS
from mambaout_jax.data.fractals.making import Plan, write_folders
from mambaout_jax.data.parallel import usable_cores
from mambaout_jax.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser("python -m mambaout_jax.data.fractals", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--folders", action="store_true", help="class folders, not TFDS")
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--train", type=int, default=SPLITS["train"], help="images of a class")
    parser.add_argument("--validation", type=int, default=SPLITS["validation"])
    parser.add_argument("--processes", type=int, default=usable_cores())
    options = parser.parse_args(argv)
    if not 2 <= options.classes <= CLASSES or min(options.train, options.validation) < 1:
        raise UserError(
            f"--classes={options.classes} --train={options.train} "
            f"--validation={options.validation}: expected 2 to {CLASSES} classes, and an image or "
            "more in each"
        )
    images = {"train": options.train, "validation": options.validation}
    plan, output = Plan(options.classes, images, options.processes), options.output.expanduser()
    start = time.monotonic()
    if options.folders:
        written = output
        if any((output / split).exists() for split in images):
            raise UserError(f"{output} has a train or validation folder: choose another --output")
        write_folders(plan, output)
    else:
        written = output / "fractals" / "1.0.0"
        if written.exists():
            raise UserError(f"{written} exists: remove it, or choose another --output")
        from mambaout_jax.data.fractals.fractals_dataset_builder import Builder

        builder = Builder(plan=plan, data_dir=str(output), file_format="array_record")
        builder.download_and_prepare()
    count, size = options.classes * sum(images.values()), folder_size(written)
    print(f"{count:,} images in {written}, {size / 1e6:.0f} MB, {time.monotonic() - start:.0f} s")


def folder_size(folder: Path) -> int:
    """Returns the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
