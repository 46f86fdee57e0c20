"""Checks of an output before the work starts: it must be new, and the disk must have room."""

import shutil
from collections.abc import Iterable

import numpy as np
from etils import epath

from mambaout_jax.bucket import is_bucket
from mambaout_jax.errors import UserError


def check_absent(path: epath.PathLike) -> None:
    """Checks that the output does not exist.

    Raises:
        UserError: it does.
    """
    if epath.Path(path).exists():
        raise UserError(f"the output {path} exists: choose another name or remove it")


def check_space(path: epath.PathLike, arrays: Iterable[np.ndarray]) -> None:
    """Checks that a local disk has room for the arrays; Orbax and torch fail midway without it.

    Raises:
        UserError: it has not.
    """
    if is_bucket(path):
        return
    needed = sum(array.nbytes for array in arrays)
    parents = epath.Path(path).absolute().parents
    free = shutil.disk_usage(next(parent for parent in parents if parent.exists())).free
    if free < needed:
        raise UserError(
            f"cannot write {path}: it needs {needed / 1e6:,.1f} MB, and "
            f"{free / 1e6:,.1f} MB are free"
        )
