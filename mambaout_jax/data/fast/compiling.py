"""How this folder compiles its functions."""

from collections.abc import Callable

import numba


def compiled(function: Callable) -> Callable:
    """Compiles with Numba, and keeps the result for the next start where there is a place to."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's own can be written to
        return numba.njit(nogil=True)(function)
