"""How this folder compiles its functions."""

from collections.abc import Callable

import numba


def compiled(function: Callable) -> Callable:
    """Compiles with Numba, and keeps the result for the next start if a folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return numba.njit(nogil=True)(function)
