"""What the compiler is told besides the program."""

from typing import Any


def compiler_options(platform: str) -> dict[str, Any]:
    """Returns the options of `jax.jit` for a platform as `jax.Device.platform` names it.

    On GPUs matrix products go to cuBLAS alone: Triton's, which XLA tries beside it, make a step
    slower and its compilation longer; docs/performance.md has the figures.
    """
    return {"xla_gpu_enable_triton_gemm": False} if platform == "gpu" else {}
