"""Depthwise convolution with a kernel for each platform, chosen when the program is lowered.

XLA's own depthwise convolution dominates a MambaOut step on every platform; docs/performance.md
has the figures. `depthwise_conv2d` is the one public function; its implementations lie beside it.
"""

import functools
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import lax

from mambaout_jax.errors import UserError
from mambaout_jax.ops.depthwise import cpu, gpu, tpu, xla

_IMPLEMENTATIONS: dict[str, ModuleType] = {
    "xla": xla,
    "shifted": cpu,
    "pallas_gpu": gpu,
    "pallas_tpu": tpu,
}
_BY_PLATFORM: dict[str, ModuleType] = {
    "cpu": cpu,
    "cuda": gpu,
    "tpu": tpu,
}


def implementations() -> list[str]:
    """Returns the names that `depthwise_conv2d` takes as its implementation."""
    return ["auto", *_IMPLEMENTATIONS]


def depthwise_conv2d(x: jax.Array, kernel: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """Convolves each channel with its own filter: stride 1, padding k // 2, k odd.

    The kernel is rounded to x's dtype, as Flax and torch's autocast do; products are summed in
    float32 and rounded to x's dtype once. The kernel's gradient has the kernel's own dtype.
    Reverse-mode differentiation only: `jax.jvp` raises a TypeError that names `custom_vjp`.

    Args:
      x: maps, [N, H, W, C], bfloat16 or float32.
      kernel: filters, [k, k, 1, C], as `flax.linen.Conv` with `feature_group_count=C` stores them.
      implementation: one of `implementations()`; "auto" is the fastest known for the platform that
        the program is lowered for, whatever platform it is traced on.

    Returns:
      Maps of x's shape and dtype.

    Raises:
      UserError: for an unknown implementation, or shapes or dtypes other than those above.
    """
    if implementation not in implementations():
        raise UserError(
            f"Unknown depthwise implementation {implementation!r}: choose one of "
            f"{', '.join(implementations())}."
        )
    _check(x, kernel)
    return _convolve(implementation, x, kernel)


def _check(x: jax.Array, kernel: jax.Array) -> None:
    if x.ndim != 4 or x.dtype not in (jnp.bfloat16, jnp.float32):
        raise UserError(
            "depthwise_conv2d expects x to be [N, H, W, C] in bfloat16 or float32, "
            f"not {x.dtype}{list(x.shape)}: convert or reshape it."
        )
    k = kernel.shape[0] if kernel.ndim else 0
    if kernel.shape != (k, k, 1, x.shape[-1]) or k % 2 == 0:
        raise UserError(
            f"depthwise_conv2d expects a kernel [k, k, 1, {x.shape[-1]}] with odd k for x with "
            f"{x.shape[-1]} channels, not {list(kernel.shape)}: reshape or pad it."
        )
    if kernel.dtype not in (jnp.float32, x.dtype):
        raise UserError(
            f"depthwise_conv2d expects the kernel in float32 or x's {x.dtype}, not {kernel.dtype}: "
            "convert it."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(implementation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _dispatch(implementation, lambda ops: ops.forward, x, kernel.astype(x.dtype))


def _convolve_forward(implementation: str, x: jax.Array, kernel: jax.Array):
    return _convolve(implementation, x, kernel), (x, kernel)


def _convolve_backward(implementation: str, residuals, dy: jax.Array):
    x, kernel = residuals
    dx = _dispatch(implementation, lambda ops: ops.input_gradient, dy, kernel.astype(x.dtype))
    size = kernel.shape[0]
    dkernel = _dispatch(
        implementation,
        lambda ops: functools.partial(ops.filter_gradient, kernel_size=size),
        x,
        dy,
    )
    return dx, dkernel.astype(kernel.dtype)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _dispatch(
    implementation: str, function: Callable[[ModuleType], Callable], *args: jax.Array
) -> jax.Array:
    """Calls one function of the implementation, or of the lowering platform's for "auto"."""
    if implementation != "auto":
        return function(_IMPLEMENTATIONS[implementation])(*args)
    by_platform = {platform: function(ops) for platform, ops in _BY_PLATFORM.items()}
    return lax.platform_dependent(*args, default=function(xla), **by_platform)
