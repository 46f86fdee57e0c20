"""How the processes of a run, one a host, find each other."""

import os

import jax

from mambaout_jax.errors import UserError


def join_processes() -> None:
    """Joins the other processes of the run; to be called before anything else of jax.

    On Cloud TPUs, GKE, SLURM and Open MPI jax finds them by itself. Elsewhere
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them. Where neither tells of
    others, the process runs alone.

    Raises:
        UserError: when the others are named, and cannot be joined.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        if address:
            count, index = (int(os.environ[f"JAX_{x}"]) for x in ("NUM_PROCESSES", "PROCESS_ID"))
            jax.distributed.initialize(address, count, index)
        else:
            jax.distributed.initialize()
    except KeyError as error:
        raise UserError(f"JAX_COORDINATOR_ADDRESS is set, and {error} is not: set both") from None
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise UserError(f"cannot join the other processes of the run: {error}") from None
    except RuntimeError as error:
        raise UserError(
            f"cannot join the other processes of the run: {str(error).splitlines()[0]}; start the "
            "same command on every host"
        ) from None
