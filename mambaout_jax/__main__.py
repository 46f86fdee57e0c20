"""The command line: python -m mambaout_jax COMMAND, or mambaout-jax COMMAND."""

import argparse
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Sequence

from mambaout_jax.cli.train import EXAMPLE, SUMMARIES, run_main
from mambaout_jax.errors import UserError, first_line
from mambaout_jax.version import __version__

# Each command is a module in mambaout_jax/cli with SUMMARY, EXAMPLE, add_arguments(parser) and
# run(args) -> exit status. Slow imports happen in run.
COMMANDS = (
    "predict",
    "models",
    "summary",
    "validate",
    "benchmark",
    "probe",
    "export",
    "flops",
    "push",
)
PROGRAM = "python -m mambaout_jax"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status; a user's mistake is printed as one line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in SUMMARIES:
        try:
            return run_main(argv[0], argv[1:])
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    parser = make_parser()
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Pillow's warning about large images; one that is too large is an error.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be valid UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return importlib.import_module(f"mambaout_jax.cli.{args.command}").run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:
        reason = first_line(error)
        print(
            f"error: not enough memory on this host ({reason}): free some, or try a smaller "
            "--batch-size if the command has one",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        sys.stderr.close()
        return 0


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands; each --help ends with an example."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="MambaOut: trains, evaluates and exports networks, and classifies images.",
        epilog=f"example:\n  {PROGRAM} predict photo.jpg --weights=mambaout_tiny",
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in SUMMARIES.items():  # `main` passes their flags to main.py
        subparsers.add_parser(name, help=f"{summary} Example: {name} {EXAMPLE}")
    for name in COMMANDS:
        module = importlib.import_module(f"mambaout_jax.cli.{name}")
        subparser = subparsers.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY,
            epilog=f"example:\n  {PROGRAM} {name} {module.EXAMPLE}",
            formatter_class=raw,
        )
        module.add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
