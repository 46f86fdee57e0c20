"""What the compiler is told besides the program."""

from typing import Any

_BY_PLATFORM: dict[str, dict[str, Any]] = {
    # Matrix products go to cuBLAS alone: Triton's, which XLA tries beside it, make a step slower
    # and its compilation longer.
    "gpu": {"xla_gpu_enable_triton_gemm": False},
    # Products, convolutions and sums stay with XLA's own code and Eigen. YNNPACK, to which XLA
    # hands them and what surrounds them, writes out whole arrays of constants and intermediates.
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
}


def compiler_options(platform: str) -> dict[str, Any]:
    """Returns the options of `jax.jit` for a platform as `jax.Device.platform` names it.

    docs/performance.md has the figures.
    """
    return dict(_BY_PLATFORM.get(platform, {}))
