"""Results in files: CSV and JSON, one row for each evaluation."""

import argparse
import csv
import io
import os
from pathlib import Path

from mambaout_jax.errors import UserError

Row = dict[str, str | int | float | None]


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --csv and --json."""
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the results here as CSV")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here as JSON")


def check_outputs(args: argparse.Namespace) -> None:
    """Checks that the results can be written.

    Raises:
        UserError: they cannot.
    """
    for path in filter(None, (args.csv, args.json)):
        exists_as_other = path.exists() and not path.is_file()
        if exists_as_other or not os.access(path.resolve().parent, os.W_OK):
            raise UserError(f"cannot write {path}: expected a file in a writable folder")


def write_rows(args: argparse.Namespace, rows: list[Row]) -> None:
    """Writes the rows so far, so that a long list may be interrupted."""
    from mambaout_jax.files import write_file, write_json

    if args.csv:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        write_file(args.csv.resolve(), table.getvalue())
    if args.json:
        write_json(args.json.resolve(), rows)
