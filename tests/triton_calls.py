"""Triton's kernels without a GPU: recorded for the compiler, or run by Triton's interpreter."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mambaout_jax.ops import norm_triton
from mambaout_jax.ops.depthwise import triton_kernels as depthwise
from mambaout_jax.ops.first_conv import triton_kernels as first_conv
from mambaout_jax.ops.gated_conv import dense_triton, gate_triton
from mambaout_jax.ops.selective_scan import triton_kernels as selective_scan

MODULES = norm_triton, depthwise, dense_triton, gate_triton, first_conv, selective_scan
GRID = 65535  # CUDA's limit of the second axis
_TYPES = {"float32": "*fp32", "bfloat16": "*bf16"}


@dataclasses.dataclass(frozen=True)
class Call:
    """A kernel, its arguments' types and the constants that it is compiled for."""

    kernel: Any
    pointers: tuple[str, ...]
    num_warps: int
    constants: dict

    def compile(self, capability: int):
        """Returns what Triton makes of it for a compute capability, such as 90."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        signature = dict(zip(names, self.pointers, strict=False))
        signature |= dict.fromkeys(self.constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(self.pointers))}
        return triton.compile(
            ASTSource(self.kernel, signature, self.constants, aligned),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": self.num_warps, "num_stages": 1},
        )


def recorded(monkeypatch, function, args) -> list[Call]:
    """Returns the kernels that a function of arrays of these shapes would launch."""
    calls = []

    def launch(kernel, *arrays, out_shape, grid, num_warps, written=None, **constants):
        assert all(size <= GRID for size in grid[1:])
        results = [*out_shape, *([] if written is None else [arrays[written]])]
        pointers = tuple(_TYPES[array.dtype.name] for array in (*arrays, *results))
        calls.append(Call(kernel, pointers, num_warps, constants))
        return [jnp.zeros(shape.shape, shape.dtype) for shape in results]

    for module in MODULES:
        monkeypatch.setattr(module, "launch", launch)
    jax.eval_shape(lambda *args: function(*args), *args)  # traced anew, whatever jax has cached
    return calls


def interpret(kernel, *arrays, out_shape, grid, num_warps, written=None, **constants):
    """As `launch`, in Triton's interpreter, on concrete arrays."""
    import torch

    del num_warps
    inputs = [_to_torch(np.array(array)) for array in arrays]
    # What a kernel leaves out is not a number.
    results = [
        torch.full(shape.shape, torch.nan, dtype=getattr(torch, shape.dtype.name))
        for shape in out_shape
    ]
    shapes = [*out_shape]
    if written is not None:
        results.append(inputs[written])
        shapes.append(arrays[written])
    kernel[grid](*inputs, *results, **constants)
    return [
        jnp.asarray(result.float().numpy(), shape.dtype)
        for result, shape in zip(results, shapes, strict=True)
    ]


def _to_torch(array):
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    return tensor.to(getattr(torch, array.dtype.name))
