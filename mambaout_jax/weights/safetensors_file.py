"""Reads .safetensors files. Names, types and shapes come from the header, before any data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import safe_open

from mambaout_jax.errors import UserError, first_line
from mambaout_jax.weights.identify import Shapes

# The types that both the format and numpy have; float8 and smaller ones are not among them.
_TYPES = frozenset(
    ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64")
)


def read_safetensors(path: Path, check: Callable[[Shapes], None]) -> dict[str, np.ndarray]:
    """Reads all tensors of a file.

    Args:
        path: the file.
        check: is called with the names and shapes before any tensor is read, and raises to refuse.

    Raises:
        UserError: the file is truncated or damaged, or a tensor has a type that numpy lacks.
    """
    with _damage(path), safe_open(path, framework="numpy") as file:
        headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        for name, header in headers.items():
            if header.get_dtype() not in _TYPES:
                raise UserError(
                    f"{path} holds {name} of type {header.get_dtype()}: expected F32, F16, BF16 or "
                    "F64; convert it with PyTorch first"
                )
        check({name: tuple(header.get_shape()) for name, header in headers.items()})
        return {name: file.get_tensor(name) for name in headers}


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns the errors of the safetensors library into a UserError."""
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path} does not fit into memory: {first_line(error)}") from error
    except Exception as error:
        raise UserError(
            f"{path} is truncated, damaged or not a .safetensors file: {first_line(error)}"
        ) from error
    except BaseException as error:
        # When memory runs out, the library's Rust code panics. A panic is no subclass of Exception,
        # and its class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{path} cannot be read, it may not fit into memory: {first_line(error)}"
        ) from error
