"""Trains or evaluates MambaOut.

    python main.py --config=configs/quickstart.py --workdir=runs/quickstart

The same command again resumes the run. Keys are changed with --config.key=value.

Exit codes: 0 the run is finished; 1 something is amiss, which the last line names; 75 the run is
saved, or another process of it was lost, and the same command resumes it.
"""

import logging
import sys

from absl import app, flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import config_flags

from mambaout_jax.config import check_command_line
from mambaout_jax.errors import PreemptedError, UserError

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
    # What Orbax cannot do is told in a sentence; its threads each log a traceback before.
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("mambaout_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    from mambaout_jax.runtime import processes
    from mambaout_jax.runtime.compilation import use_compilation_cache

    use_compilation_cache(_CONFIG.value)
    processes.join_processes()
    try:
        run()
    except PreemptedError as interruption:
        logger.info("asked to end: %s; the same command resumes the run", interruption)
        sys.exit(processes.RESUME)
    except Exception as error:
        processes.leave_after(error)
        raise


def run() -> None:
    """Trains or evaluates."""
    workdir = epath.Path(_WORKDIR.value)
    if _MODE.value == "eval":
        from mambaout_jax.inference.evaluate import evaluate_weights

        evaluate_weights(_CONFIG.value, workdir)
    else:
        from mambaout_jax.training.loop import train

        train(_CONFIG.value, workdir)


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except UserError as error:
        sys.exit(f"error: {error}")
