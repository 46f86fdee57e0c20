"""Files of PyTorch weights, read and written: .safetensors, .pth and .pt.

torch is imported for .pth and .pt only.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mambaout_jax.errors import UserError, first_line
from mambaout_jax.files import replacing
from mambaout_jax.weights.identify import Shapes
from mambaout_jax.weights.output import check_absent, check_space
from mambaout_jax.weights.pickle_file import import_torch, read_pickle, tensor_to_numpy
from mambaout_jax.weights.safetensors_file import read_safetensors

TORCH_SUFFIXES = (".pth", ".pt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
# The keys under which training scripts save the tensors; timm, too, takes the first that exists.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


@dataclasses.dataclass(frozen=True)
class StateDict:
    """The tensors of a file.

    Attributes:
        tensors: torch's names, without prefixes, to arrays of the file's own type.
        wrapper: the key that the tensors were under, "" for none.
        ignored: other keys that hold tensors, which were not taken.
        prefixes: what was removed from the names.
    """

    tensors: dict[str, np.ndarray]
    wrapper: str = ""
    ignored: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Returns one line: how many tensors, of which types, and where in the file."""
        types = collections.Counter(str(array.dtype) for array in self.tensors.values())
        line = ", ".join(f"{count} {dtype}" for dtype, count in sorted(types.items()))
        if set(types) - {"float32"}:
            line += ", converted to float32"
        if self.wrapper:
            line += f", under {self.wrapper!r}"
        if self.ignored:
            line += f" ({', '.join(map(repr, self.ignored))} ignored)"
        return line + "".join(f", prefix {prefix!r} removed" for prefix in self.prefixes)


def read_state_dict(path: Path, check: Callable[[Shapes], None] = lambda shapes: None) -> StateDict:
    """Reads the tensors of a .safetensors, .pth or .pt file.

    Args:
        path: the file.
        check: is called with the names and shapes, before a .safetensors file's data is read, and
            raises to refuse them.

    Raises:
        UserError: the file does not exist, is damaged, holds something other than tensors, or needs
            torch, which is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"cannot read {path}: expected a file that ends in {', '.join(SUFFIXES)}")
    if not path.exists():
        raise UserError(f"there is no file {path}")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file")
    if path.suffix not in TORCH_SUFFIXES:

        def check_names(shapes: Shapes) -> None:
            check(_remove_prefixes(shapes, path)[0])

        tensors, prefixes = _remove_prefixes(read_safetensors(path, check_names), path)
        return StateDict(tensors, prefixes=prefixes)
    content = read_pickle(path)
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds a {type(content).__name__}: expected a state dict, or a dict with one "
            f"under {', '.join(WRAPPERS)}"
        )
    wrappers = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
    inner = content[wrappers[0]] if wrappers else content
    values, prefixes = _remove_prefixes(inner, path)
    tensors = {name: tensor_to_numpy(value, name, path) for name, value in values.items()}
    check({name: array.shape for name, array in tensors.items()})
    return StateDict(tensors, (wrappers or [""])[0], tuple(wrappers[1:]), prefixes)


def _remove_prefixes(
    values: Mapping[Any, Any], path: Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the values under names without prefixes, and the prefixes that were removed."""
    renamed: dict[str, Any] = {}
    prefixes: dict[str, None] = {}
    for key, value in values.items():
        name = str(key)
        while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
            name = name.removeprefix(prefix)
            prefixes[prefix] = None
        if name in renamed:
            raise UserError(f"{path} holds {name} twice, with a prefix and without")
        renamed[name] = value
    return renamed, tuple(prefixes)


def write_state_dict(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors to a .safetensors, .pth or .pt file, which appears when it is complete.

    Raises:
        UserError: the file exists or cannot be written. Nothing of it is left.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"cannot write {path}: expected a name that ends in {', '.join(SUFFIXES)}")
    check_absent(path)
    check_space(path, tensors.values())
    torch = import_torch(path) if path.suffix in TORCH_SUFFIXES else None
    with replacing(path) as part:
        try:
            if torch:
                torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, part)
            else:
                save_file(dict(tensors), part, metadata={"format": "pt"})
        except (RuntimeError, SafetensorError) as error:  # raised for failed writes
            raise UserError(f"cannot write {path}: {first_line(error)}") from error
