"""Trains or evaluates MambaOut.

    python main.py --config=configs/quickstart.py --workdir=runs/quickstart
    mambaout-jax train --config=quickstart --workdir=runs/quickstart  # without a checkout

The same command again resumes the run. Keys are changed with --config.key=value.

Exit codes: 0 the run is finished; 1 the last line says what to fix; 75 the run is saved, or another
process was lost, and the same command resumes it; 130 a second Ctrl-C ended it at once.
"""

import logging
import os
import signal
import sys
from types import FrameType


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """Ends the process on a signal: there is nothing to save yet."""
    name = signal.Signals(number).name
    print(f"stopped by {name}: the same command starts or resumes the run", file=sys.stderr)
    sys.stderr.flush()
    os._exit(os.EX_TEMPFAIL)


if __name__ == "__main__":
    # Until `StopRequest` notices signals: the imports below take seconds.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, stop_at_once)

import jax
from absl import app, flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import config_flags

from mambaout_jax.cli.flags import parse_flags
from mambaout_jax.config import given_keys
from mambaout_jax.errors import PreemptedError, StorageError, UserError
from mambaout_jax.runtime.event_loops import hide_later_errors
from mambaout_jax.runtime.preemption import RESUME, StopRequest

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or bucket path of the run.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "What to do.")


def parse_run_flags(argv: list[str]) -> list[str]:
    """Parses the command line; a mistake is a UserError."""
    arguments = parse_flags(argv)
    if not _WORKDIR.value:
        raise UserError("no workdir: expected --workdir=DIR, such as --workdir=runs/tiny")
    return arguments


def log_to_stderr() -> None:
    """Logs the package's messages with the time of day; of other packages, only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    # Orbax's threads log a traceback of each error that a UserError reports.
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    hide_later_errors()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("mambaout_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def main(argv: list[str]) -> None:
    """Joins the other processes of the run, and does what the command line asks for."""
    del argv
    log_to_stderr()
    from mambaout_jax.data.workers import WorkerLostError
    from mambaout_jax.runtime import processes
    from mambaout_jax.runtime.compilation import use_compilation_cache

    use_compilation_cache(_CONFIG.value.compilation_cache)
    with StopRequest() as stop:
        processes.join_processes()
        stop.join_service()
        logger = logging.getLogger("mambaout_jax")
        if jax.process_index():  # the first process logs for all
            logger.setLevel(logging.WARNING)
        try:
            run(epath.Path(_WORKDIR.value), stop)
        except PreemptedError as interruption:
            logger.warning("%s; the same command resumes it", interruption)
            processes.leave(RESUME)
        except (StorageError, WorkerLostError) as error:
            processes.leave(RESUME, error)
        except Exception as error:
            processes.leave_after(error)
            if isinstance(error, UserError):
                # Not as Python ends: threads of a failed save would log their errors after this.
                processes.leave(processes.FAILED, error)
            raise
        # Skips Python's finalization: a C++ thread that waits for the GIL would abort the process.
        processes.leave(0)


def run(workdir: epath.Path, stop: StopRequest) -> None:
    """Trains or evaluates."""
    from mambaout_jax.runtime.memory import host_memory_for
    from mambaout_jax.training.out_of_memory import host_message

    with host_memory_for(host_message):
        if _MODE.value == "eval":
            from mambaout_jax.evaluate_run import evaluate_workdir

            evaluate_workdir(_CONFIG.value, workdir, given_keys(sys.argv))
            return
        from mambaout_jax.build import build_run
        from mambaout_jax.training.loop import train

        train(build_run(_CONFIG.value), workdir, stop)


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_run_flags)
    except UserError as error:
        sys.exit(f"error: {error}")
