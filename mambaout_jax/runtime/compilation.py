"""Compiler options by platform, and the cache of compiled programs."""

import os
from pathlib import Path
from typing import Any

import jax

_BY_PLATFORM: dict[str, dict[str, Any]] = {
    # Matrix products go to cuBLAS alone: Triton's, which XLA tries beside it, make a step slower
    # and its compilation longer.
    "gpu": {"xla_gpu_enable_triton_gemm": False},
    # Products, convolutions and sums stay with XLA's own code and Eigen. YNNPACK, to which XLA
    # hands them and what surrounds them, writes out whole arrays of constants and intermediates.
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
}
# And for programs without gradients: CPUs that have vectors of 512 bits use them. In training of
# small images they make a step slower.
_OF_INFERENCE: dict[str, dict[str, Any]] = {"cpu": {"xla_cpu_prefer_vector_width": 512}}


def compiler_options(platform: str, *, inference: bool = False) -> dict[str, Any]:
    """Returns the options of `jax.jit` for a platform as `jax.Device.platform` names it.

    `inference` is for programs that compute no gradients. docs/performance.md has the figures.
    """
    inferring = _OF_INFERENCE.get(platform, {}) if inference else {}
    return {**_BY_PLATFORM.get(platform, {}), **inferring}


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in a folder, "" for none.

    "auto" is what JAX_COMPILATION_CACHE_DIR names, else a folder of the user's cache.
    """
    if folder == "auto":
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(home / "mambaout_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", folder or None)
