"""Writes the shapes dataset: images with masks of 7 classes.

    python -m mambaout_jax.data.shapes --output=DIR

Writes DIR/shapes/1.0.0, a TFDS dataset in ArrayRecord form. With --folders it writes
DIR/images/SPLIT/NAME.png, DIR/annotations/SPLIT/NAME.png and DIR/classes.txt instead, for the
splits "train" and "validation".
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from mambaout_jax.data.shapes.images import CLASSES, SPLITS, make_files, name_of
from mambaout_jax.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser("python -m mambaout_jax.data.shapes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--folders", action="store_true", help="folders of files, not TFDS")
    parser.add_argument("--train", type=int, default=SPLITS["train"], help="images")
    parser.add_argument("--validation", type=int, default=SPLITS["validation"], help="images")
    options = parser.parse_args(argv)
    if min(options.train, options.validation) < 1:
        raise UserError(
            f"--train={options.train} --validation={options.validation}: expected an image or more "
            f"in each"
        )
    images = {"train": options.train, "validation": options.validation}
    output, start = options.output.expanduser(), time.monotonic()
    written = output if options.folders else output / "shapes" / "1.0.0"
    if (output / "images").exists() if options.folders else written.exists():
        raise UserError(f"{written} exists: remove it, or choose another --output")
    if options.folders:
        write_folders(images, output)
    else:
        from mambaout_jax.data.shapes.shapes_dataset_builder import Builder

        builder = Builder(images=images, data_dir=str(output), file_format="array_record")
        builder.download_and_prepare()
    print(f"{sum(images.values())} images in {written}, {time.monotonic() - start:.0f} s")


def write_folders(images: Mapping[str, int], output: Path) -> None:
    """Writes a number of images of each split as folders of files.

    `segmentation.sources.FolderMaskSource` reads them.
    """
    for split, count in images.items():
        for part in ("images", "annotations"):
            (output / part / split).mkdir(parents=True)
        for index in range(count):
            for part, file in zip(("images", "annotations"), make_files(split, index), strict=True):
                (output / part / split / f"{name_of(index)}.png").write_bytes(file)
    (output / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
