"""Lowering for NVIDIA GPUs, which compiles the kernels: in threads, and once for all runs.

JAX's compilation cache finds a program by its lowered form, so every run would first compile the
kernels again. This module keeps the lowered calls of kernels in the same folder.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from jax import export

from mambaout_jax.bucket import is_bucket
from mambaout_jax.errors import UserError
from mambaout_jax.files import replacing
from mambaout_jax.ops.kernels import compute_capability
from mambaout_jax.ops.lowering import Call, calls_in, lowered

logger = logging.getLogger(__name__)

_CUSTOM_CALLS = ("triton_kernel_call", "triton_kernel_call_ffi")  # of jax-triton 0.3 and 0.4
_DIGEST = hashlib.sha256().digest_size


def lower_in_threads(
    traced: jax.stages.Traced, platforms: tuple[str, ...] | None = None
) -> jax.stages.Lowered:
    """Lowers the distinct calls of kernels in several threads, and then the traced program.

    Calls that an earlier run lowered are read from the folder `kernels` in JAX's compilation cache,
    if the cache is on a disk and flatbuffers, which the files need, is installed.

    Args:
        traced: a program.
        platforms: as `lowering_platforms` of `traced.lower`.
    """
    capability = compute_capability()
    calls = dict.fromkeys(calls_in(traced.jaxpr.jaxpr) if capability else ())
    # Python 3.11's `ast.parse` may fail in two threads.
    threads = os.cpu_count() if sys.version_info >= (3, 12) else 1
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(functools.partial(_lower_call, capability), calls))
    return traced.lower(lowering_platforms=platforms)


def _lower_call(capability: Any, call: Call) -> None:
    if call in lowered:
        return
    try:
        file = _file(capability, call)
    except _NamelessError:  # no kernel, but a part of the network
        return
    known = file and _load(file)
    lowered[call] = known or _export(call)
    if file and not known:
        _store(file, lowered[call])


def _export(call: Call) -> export.Exported:
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in _CUSTOM_CALLS]
    exporting = export.export(jax.jit(call), platforms=("cuda",), disabled_checks=checks)
    return exporting(*call.shapes)


def _file(*key: Any) -> Path | None:
    """Returns where a key's file is, None without a cache."""
    parts = (_versions(), jax.config.jax_enable_x64, _name(key))  # type: ignore[attr-defined]
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not folder or is_bucket(folder):
        return None
    return Path(folder) / "kernels" / hashlib.sha256(repr(parts).encode()).hexdigest()


class _NamelessError(Exception):
    """A function that no import finds."""


def _name(value: Any) -> Any:
    """Returns what has the same `repr` in every process."""
    if isinstance(value, tuple | list):
        return [_name(each) for each in value]
    if isinstance(value, jax.ShapeDtypeStruct):
        return (value.shape, value.dtype.name)
    if isinstance(value, ModuleType):
        return value.__name__
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [_name(getattr(value, field.name)) for field in dataclasses.fields(value)]
        return (_name(type(value)), fields)
    if callable(value):
        name = getattr(value, "__qualname__", "<")
        if "<" in name:  # "<locals>", "<lambda>"
            raise _NamelessError
        return (value.__module__, name)
    return value


@functools.cache
def _versions() -> tuple[str, ...]:
    """Returns the versions of what lowers, and a digest of this package's operations."""
    found = [sys.version]
    for package in ("jax", "jaxlib", "jax-triton", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        sources.update(path.read_bytes())
    return (*found, sources.hexdigest())


def _load(file: Path) -> export.Exported | None:
    try:
        content = file.read_bytes()
        digest, serialized = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(serialized).digest() == digest:
            return export.deserialize(bytearray(serialized))
    except (OSError, ImportError):
        pass
    return None


def _store(file: Path, exported: export.Exported) -> None:
    try:
        serialized = bytes(exported.serialize())
        os.makedirs(file.parent, exist_ok=True)
        with replacing(file) as part:
            part.write_bytes(hashlib.sha256(serialized).digest() + serialized)
    except (ImportError, OSError, UserError) as error:
        _warn_once(f"compiled kernels are not kept for the next run: {error}")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
