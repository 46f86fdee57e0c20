"""The processes of a run, one per host: joining, checks that they agree, and ending."""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from mambaout_jax.errors import AccessError, StorageError, UserError, first_line
from mambaout_jax.runtime.preemption import RESUME

logger = logging.getLogger(__name__)

FAILED = 1  # exit code: the same command fails again until the user fixes what the message names
# Seconds that a process waits for the others to start, and until one that is silent counts as dead.
JOIN_SECONDS = 300
HEARTBEAT_SECONDS = 60
MESSAGE_BYTES = 2048
LAST_SECONDS = 10  # that the first process waits after an error for the others to end
# In messages of jax errors that are caused by the end of another process.
LOST = "gloo|connection|unavailable|heartbeat|coordination service|deadline_exceeded"


def join_processes() -> None:
    """Joins the other processes of the run; to be called before anything else of jax.

    On Cloud TPUs, GKE, SLURM and Open MPI jax finds them by itself. Elsewhere
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them. If neither names
    others, the process runs alone.

    Raises:
        UserError: when the others are named, and cannot be joined. Where they do not come within
            JOIN_SECONDS, the process says so and ends.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    # jax aborts a process that waits too long for the others: this ends it earlier, with a message.
    alarm = threading.Timer(JOIN_SECONDS, end, (alone(address), RESUME))
    alarm.daemon = True
    alarm.start()
    timeouts: dict[str, Any] = {
        "initialization_timeout": JOIN_SECONDS + 30,
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": HEARTBEAT_SECONDS,
    }
    try:
        if address:
            count, index = (int(os.environ[f"JAX_{x}"]) for x in ("NUM_PROCESSES", "PROCESS_ID"))
            jax.distributed.initialize(address, count, index, **timeouts)
        else:
            jax.distributed.initialize(**timeouts)
    except KeyError as error:
        raise UserError(f"JAX_COORDINATOR_ADDRESS is set, and {error} is not: set both") from None
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise UserError(f"cannot join the other processes of the run: {error}") from None
    except RuntimeError as error:
        raise UserError(
            f"cannot join the other processes of the run: {first_line(error)}; start the "
            "same command on every host"
        ) from None
    finally:
        alarm.cancel()


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes; an error inside ends them all, see `leave_after`.

    Raises:
        UserError: see `join_processes`.
    """
    join_processes()
    try:
        yield
    except Exception as error:
        leave_after(error)
        raise


def alone(address: str | None) -> str:
    """Returns the message for processes that do not come."""
    at = f" at {address}" if address else ""
    return (
        f"the other processes of the run did not come{at} within {JOIN_SECONDS} s: start the same "
        "command on every host"
    )


def end(message: str, code: int) -> NoReturn:
    """Ends this process now, whatever its threads do."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def leave(code: int, error: Exception | None = None) -> NoReturn:
    """Ends this process, and reports an error; of several, all must call it.

    A process that runs alone does not wait for its threads: one may be compiling for minutes.
    """
    if error:
        print(f"error: {error}", file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_count() == 1:
        os._exit(code)
    sys.exit(code)


def leave_after(error: Exception) -> None:
    """Ends this process of several, saying why; one that runs alone continues.

    It does not wait for the others, as Python's own end would: they may never come. The first
    process, with which all are connected, goes last: its end would end the others before they have
    said why they go.
    """
    if jax.process_count() == 1:
        return
    if jax.process_index() == 0:
        time.sleep(LAST_SECONDS)
    if isinstance(error, UserError):
        end(str(error), FAILED)
    if isinstance(error, MemoryError):
        end(f"not enough memory on this host ({first_line(error)})", FAILED)
    if isinstance(error, jax.errors.JaxRuntimeError) and re.search(LOST, str(error), re.IGNORECASE):
        end(
            f"another process of the run has ended or cannot be reached ({first_line(error)}); its "
            "own log says why; the same command on every host resumes from the last checkpoint",
            RESUME,
        )
    traceback.print_exception(error)
    end(first_line(error), FAILED)


def gather(text: str) -> list[str]:
    """Returns the text of each process, the first's first; all processes must call it."""
    from jax.experimental import multihost_utils

    padded = np.zeros(MESSAGE_BYTES, np.uint8)
    encoded = text.encode()[:MESSAGE_BYTES]
    padded[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(-1, MESSAGE_BYTES)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Makes a UserError that one process raises inside an error of every process.

    Raises:
        UserError: this process's own, or else that of the first process that had one, of its type.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    if jax.process_count() > 1:
        messages = gather(f"{type(failure).__name__}: {failure}" if failure else "")
        index = next((index for index, message in enumerate(messages) if message), None)
        if index is not None and failure is None:
            kind, _, message = messages[index].partition(": ")
            classes = {error.__name__: error for error in (StorageError, AccessError)}
            failure = classes.get(kind, UserError)(f"process {index} of the run says: {message}")
    if failure:
        raise failure


def check_alike(**things: str) -> None:
    """Checks that the code, and these named things, are the same in all processes.

    Raises:
        UserError: names what differs, and where.
    """
    if jax.process_count() == 1:
        return
    things = {"code of mambaout_jax": code_digest(), "versions of jax": versions()} | things
    for name, thing in things.items():
        digests = gather(hashlib.sha256(thing.encode()).hexdigest())
        differing = [str(index) for index, digest in enumerate(digests) if digest != digests[0]]
        if differing:
            raise UserError(
                f"the hosts differ in the {name}: process {', '.join(differing)} from process 0; "
                "install and start the same on every host"
            )


def code_digest() -> str:
    """Returns a digest of the package's source files."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def versions() -> str:
    """Returns the versions of what computes and saves."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")
    return " ".join(f"{name}=={importlib.metadata.version(name)}" for name in names)
