"""Calls of Triton's kernels from JAX, and what several kernels share. Imports triton."""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import triton
import triton.language as tl
from jax.custom_batching import sequential_vmap

from mambaout_jax.ops.kernels import compute_capability


def launch(
    kernel: triton.JITFunction,
    *arrays: jax.Array,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    written: int | None = None,
    **constants: int | float | str,
) -> list[jax.Array]:
    """Runs a kernel in each program of a grid; `jax.vmap` of it is a loop.

    Args:
        kernel: takes pointers to the arrays, then to the results, then constants by name. If an
            array is written, the last pointer is `written_ptr`, which the kernel does not use.
        *arrays: inputs, in row-major order.
        out_shape: shapes and dtypes of the results.
        grid: numbers of programs.
        num_warps: of a program.
        written: the number of the array that becomes the last result. What the kernel does not
            write stays as it was.
        **constants: known when the kernel is compiled.

    Returns:
        The results.
    """
    triton_call = importlib.import_module("jax_triton").triton_call
    results, aliases = list(out_shape), {}
    if written is not None:
        aliases[written] = len(results)
        results.append(jax.ShapeDtypeStruct(arrays[written].shape, arrays[written].dtype))
    # Triton warns where nobody says whether a product and a sum become one operation.
    options: dict[str, Any]
    if "out_type" in inspect.signature(triton_call).parameters:
        options = {"out_type": results, "backend_options": {"enable_fp_fusion": True}}
        if written is not None:
            options["written_ptr"] = None
    else:  # before jax-triton 0.4, which passes the written array's pointer as a result's again
        options = {"out_shape": results, "enable_fp_fusion": True}
    capability = compute_capability()

    @sequential_vmap
    def call(*arrays: jax.Array) -> list[jax.Array]:
        return triton_call(
            *arrays,
            kernel=kernel,
            grid=grid,
            name=kernel.__name__,
            num_warps=num_warps,
            num_stages=1,
            compute_capability=capability and 10 * capability[0] + capability[1],
            input_output_aliases=aliases,
            **options,
            **constants,
        )

    return call(*arrays)


@triton.jit
def load(pointers, mask):
    """Returns float32 values, and 0 outside of the mask."""
    return tl.load(pointers, mask=mask, other=0).to(tl.float32)


@triton.jit
def store(pointers, values, mask):
    """Stores values in the dtype of the array."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def add_at(values, index: tl.constexpr, value):
    """Returns the list with a value added to one of its tiles."""
    return values[:index] + [values[index] + value] + values[index + 1 :]
