"""The command line: python -m mambaout_jax COMMAND."""

import argparse
import importlib
import logging
import sys
import warnings
from collections.abc import Sequence

from mambaout_jax.errors import UserError

# Each has a file of its name in mambaout_jax/cli: SUMMARY, add_arguments(parser) and
# run(args) -> exit status. What is heavy is imported in run.
COMMANDS = ("predict", "models", "summary", "validate", "export", "flops")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status; a user's mistake is told in one line."""
    parser = argparse.ArgumentParser(prog="python -m mambaout_jax", description="Uses MambaOut.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: importlib.import_module(f"mambaout_jax.cli.{name}") for name in COMMANDS}
    for name, module in modules.items():
        subparser = subparsers.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(subparser)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    # Of a large picture; one that is too large is an error.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    try:
        return modules[args.command].run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has gone
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
