"""PyTorch's files of weights, in and out: .safetensors by safetensors, .pth and .pt by torch.

torch is imported for .pth and .pt alone, which it reads with `weights_only=True`: no code of a
pickle runs. The checksums of a .pth are checked first, as torch does not; a .safetensors file has
none, and neither has a .pth of torch's old format: what can be checked of these is their structure.
"""

import argparse
import collections
import dataclasses
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mambaout_jax.errors import UserError

TORCH_SUFFIXES = (".pth", ".pt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
# Where training scripts put the tensors; the first that is there is taken, as timm does it.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
ZIP_MAGIC = b"PK\x03\x04"  # of torch's format since 1.6
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile


@dataclasses.dataclass(frozen=True)
class StateDict:
    """The tensors of a file.

    Attributes:
        tensors: torch's names, without prefixes, to arrays of the file's own type.
        wrapper: the key that the tensors stood under, "" for none.
        ignored: further keys with tensors that were not taken.
        prefixes: what was taken off the names.
    """

    tensors: dict[str, np.ndarray]
    wrapper: str = ""
    ignored: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Returns one line: how many tensors, of what types, and where in the file."""
        types = collections.Counter(str(array.dtype) for array in self.tensors.values())
        line = ", ".join(f"{count} {dtype}" for dtype, count in sorted(types.items()))
        if set(types) - {"float32"}:
            line += ", converted to float32"
        if self.wrapper:
            line += f", under {self.wrapper!r}"
        if self.ignored:
            line += f" ({', '.join(map(repr, self.ignored))} left aside)"
        return line + "".join(f", prefix {prefix!r} removed" for prefix in self.prefixes)


def read_state_dict(path: Path) -> StateDict:
    """Reads the tensors of a .safetensors, .pth or .pt file.

    Raises:
        UserError: when the file is absent, damaged, holds no tensors or carries code, or when it
            takes torch to read it and torch is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"cannot read {path}: expected a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix in TORCH_SUFFIXES:
        return _unwrap(_read_pickle(path), path)
    return _unwrap(_read_safetensors(path), path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is truncated, damaged or no .safetensors file: {_line(error)}"
        ) from error


def _read_pickle(path: Path) -> Any:
    torch = import_torch(path)
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    if is_zip:
        _check_zip(path)
    try:
        # A training script's checkpoint often holds its flags: a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # whatever torch's parsers raise of bytes that are anything
        if "Unsupported operand" in str(error):
            raise UserError(
                f"{path} is damaged, or a pickle of something else than tensors, which is never "
                "run: expected what torch.save writes of a model's state_dict()"
            ) from error
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"{path} holds more than tensors and was not read, as that would run its code: "
                "save the model's state_dict() alone"
            ) from error
        raise UserError(
            f"{path} is truncated, damaged or no PyTorch file: {_line(error)}"
        ) from error


def _check_zip(path: Path) -> None:
    """Raises UserError when a member of the file does not have the checksum that it should."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except Exception as error:  # zlib.error, struct.error and others, beside BadZipFile
        raise UserError(f"{path} is truncated or damaged: {_line(error)}") from error
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of {damaged} does not match")


def import_torch(what: object, extra: str = "torch") -> Any:
    """Returns torch, for `what`; `extra` of this package brings it along.

    Raises:
        UserError: when it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{what} takes torch, which is not installed: pip install 'mambaout_jax[{extra}]'"
        ) from error
    return torch


def _unwrap(content: Any, path: Path) -> StateDict:
    """Finds the tensors in what a file held."""
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds a {type(content).__name__}: expected a state dict, or a dict that has "
            f"one under {', '.join(WRAPPERS)}"
        )
    wrappers = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
    inner = content[wrappers[0]] if wrappers else content
    tensors: dict[str, np.ndarray] = {}
    prefixes: dict[str, None] = {}
    for key, value in inner.items():
        name = str(key)
        while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
            name = name.removeprefix(prefix)
            prefixes[prefix] = None
        if name in tensors:
            raise UserError(f"{path} holds {name} twice, with a prefix and without")
        tensors[name] = _as_numpy(value, name, path)
    return StateDict(tensors, (wrappers or [""])[0], tuple(wrappers[1:]), tuple(prefixes))


def _as_numpy(value: Any, name: str, path: Path) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    try:
        if not _fills_storage(value):
            raise UserError(f"{path} holds {name}, a view into a larger storage: save a copy of it")
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        return value.detach().numpy()
    except (AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"{path} holds {name}, a {type(value).__name__} that is no plain tensor: expected a "
            "state dict of tensors"
        ) from error


def _fills_storage(tensor: Any) -> bool:
    """Tells whether a torch tensor uses each number of its storage once, in any order of axes.

    Sizes, strides and offset are bare numbers in a file of the old format; this ties them to the
    length of the data.
    """
    covered = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != covered:
            return False
        covered *= size
    return tensor.untyped_storage().nbytes() == covered * tensor.element_size()


def write_state_dict(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors to a .safetensors, .pth or .pt file; the file appears when it is whole.

    Raises:
        UserError: when the file exists or cannot be written; nothing of it is left then.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"cannot write {path}: expected a name that ends in {', '.join(SUFFIXES)}")
    check_absent(path)
    check_space(path, tensors.values())
    torch = import_torch(path) if path.suffix in TORCH_SUFFIXES else None
    half = None
    try:
        handle, half = tempfile.mkstemp(path.suffix, f".{path.name}.", path.parent)
        os.close(handle)
        if torch:
            torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, half)
        else:
            save_file(dict(tensors), half, metadata={"format": "pt"})
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(half, 0o666 & ~umask)
        os.replace(half, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the output {path} cannot be written: {_line(error)}") from error
    finally:
        if half:
            Path(half).unlink(missing_ok=True)


def check_absent(path: epath.PathLike) -> None:
    """Raises UserError when the output is there already."""
    if epath.Path(path).exists():
        raise UserError(f"the output {path} exists: name another or remove it")


def check_space(path: epath.PathLike, arrays: Iterable[np.ndarray]) -> None:
    """Raises UserError when a local disk has no room for the arrays.

    Orbax and torch would notice midway, and could not say it.
    """
    path = epath.Path(path)
    if "://" in os.fspath(path):
        return
    needed = sum(array.nbytes for array in arrays)
    free = shutil.disk_usage(
        next(above for above in path.absolute().parents if above.exists())
    ).free
    if free < needed:
        raise UserError(
            f"the output {path} cannot be written: it takes {needed / 1e6:,.1f} MB and "
            f"{free / 1e6:,.1f} MB are free"
        )


def _line(error: BaseException) -> str:
    """Returns an error's first line, cut to a readable length."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
