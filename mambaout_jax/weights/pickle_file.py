"""Reads .pth and .pt files with torch: tensors only, without running code, and checksums first."""

import argparse
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mambaout_jax.errors import UserError, first_line

ZIP_MAGIC = b"PK\x03\x04"  # torch.save writes zip files since torch 1.6


def import_torch(what: object, extra: str = "torch") -> Any:
    """Returns torch.

    Args:
        what: needs torch; named in the error.
        extra: the extra of this package that installs it.

    Raises:
        UserError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{what} needs torch, which is not installed: pip install 'mambaout_jax[{extra}]'"
        ) from error
    return torch


def read_pickle(path: Path) -> Any:
    """Returns the content of a file that torch.save wrote.

    torch reads it with `weights_only=True`, so that no code in the file runs. torch does not
    compare the checksums of a zip file; they are compared here first. A file in torch's format from
    before 1.6 has no checksums.

    Raises:
        UserError: the file is damaged, holds more than tensors and plain values, or torch is not
            installed.
    """
    torch = import_torch(path)
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    if is_zip:
        _check_zip(path)
    try:
        # Training scripts often save their flags too; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch raises errors of any type on damaged bytes
        if "Unsupported operand" in str(error):
            raise UserError(
                f"{path} is damaged, or a pickle of something other than tensors, which is never "
                "run: expected what torch.save writes of a model's state_dict()"
            ) from error
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"{path} holds more than tensors and was not read, because that would run its "
                "code: save the model's state_dict() alone"
            ) from error
        raise UserError(
            f"{path} is truncated, damaged or not a PyTorch file: {first_line(error)}"
        ) from error


def _check_zip(path: Path) -> None:
    """Checks that every member is stored without compression and has the right checksum.

    torch maps the file into memory and takes the bytes of a compressed member for numbers.

    Raises:
        UserError: names the member.
    """
    try:
        with zipfile.ZipFile(path) as file:
            compressed = [
                info.filename
                for info in file.infolist()
                if info.compress_type != zipfile.ZIP_STORED
            ]
            damaged = None if compressed else file.testzip()
    except Exception as error:  # zlib.error, struct.error and others, beside BadZipFile
        raise UserError(f"{path} is truncated or damaged: {first_line(error)}") from error
    if compressed:
        raise UserError(
            f"{path} is compressed ({compressed[0]}), and torch.save never compresses: unpack it, "
            "or load it with torch and save it again"
        )
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of {damaged} does not match")


def tensor_to_numpy(value: Any, name: str, path: Path) -> np.ndarray:
    """Returns a torch tensor's values; bfloat16, which numpy lacks, becomes float32.

    Raises:
        UserError: the value is not a dense tensor of a type that numpy has.
    """
    kind = type(value).__name__
    try:
        dtype = str(value.dtype).removeprefix("torch.")
        kind = f"{dtype} tensor ({value.layout}, on {value.device})"
        if not _fills_storage(value):
            raise UserError(f"{path} holds {name}, a view into a larger storage: save a copy of it")
        return (value.float() if dtype == "bfloat16" else value).detach().numpy()
    except (AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"{path} holds {name} as {kind}: expected a dense tensor of float32, float16, bfloat16 "
            "or float64"
        ) from error


def _fills_storage(tensor: Any) -> bool:
    """Returns whether a tensor uses each number of its storage once, in any order of axes.

    In torch's old format sizes, strides and offset are unchecked numbers; this compares them with
    the length of the data.
    """
    covered = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != covered:
            return False
        covered *= size
    return tensor.untyped_storage().nbytes() == covered * tensor.element_size()
