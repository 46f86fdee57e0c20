"""Trains or evaluates MambaOut.

    python main.py --config=configs/quickstart.py --workdir=runs/quickstart

The same command again resumes the run. Keys are changed with --config.key=value.
"""

import logging
import sys

from absl import app, flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import config_flags

from mambaout_jax.config import check_command_line
from mambaout_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's configuration.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "What to do.")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line, after a check that explains what is wrong with it."""
    check_command_line(argv)
    flags.mark_flag_as_required("workdir")
    return app.parse_flags_with_usage(argv)


def main(argv: list[str]) -> None:
    """Runs what the command line asks for."""
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is no flag: expected --flag=value")
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("mambaout_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    from mambaout_jax.training.processes import join_processes

    join_processes()
    workdir = epath.Path(_WORKDIR.value)
    if _MODE.value == "eval":
        from mambaout_jax.evaluation import evaluate_weights

        evaluate_weights(_CONFIG.value, workdir)
    else:
        from mambaout_jax.training.loop import train

        train(_CONFIG.value, workdir)


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except UserError as error:
        sys.exit(f"error: {error}")
