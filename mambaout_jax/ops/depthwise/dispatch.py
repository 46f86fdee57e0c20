"""Depthwise convolution with a kernel for each platform, chosen when the program is lowered.

XLA's own depthwise convolution dominates a MambaOut step on every platform; docs/performance.md
has the figures. Each implementation is a module of this folder with the functions `forward`,
`input_gradient` and `filter_gradient`, which one device calls; it is imported when it is used.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mambaout_jax.errors import UserError, did_you_mean
from mambaout_jax.ops.depthwise import xla
from mambaout_jax.ops.kernels import enough_images, kernels_usable, why_unusable
from mambaout_jax.ops.lowering import Target, call_for_target
from mambaout_jax.ops.sharded import on_parts

_MODULES = {"xla": "xla", "shifted": "cpu", "triton": "gpu", "pallas_tpu": "tpu"}
_KERNELS = {"triton": "cuda", "pallas_tpu": "tpu"}  # and their platforms
_FASTEST = {"cpu": "shifted", "cuda": "triton", "tpu": "pallas_tpu"}


def implementations() -> list[str]:
    """Returns the names that `depthwise_conv2d` takes as its implementation."""
    return ["auto", *_MODULES]


def depthwise_conv2d(x: jax.Array, kernel: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """Convolves each channel with its own filter: stride 1, padding k // 2, k odd.

    The kernel is rounded to x's dtype, as Flax and torch's autocast do; products are summed in
    float32 and rounded to x's dtype once. The kernel's gradient has the kernel's own dtype.
    Reverse-mode differentiation only: `jax.jvp` raises a TypeError that names `custom_vjp`.

    Args:
        x: maps, [N, H, W, C], bfloat16 or float32.
        kernel: filters, [k, k, 1, C], as in `flax.linen.Conv` with `feature_group_count=C`.
        implementation: one of `implementations()`. "auto" is the fastest known for the platform
            that the program is lowered for, "xla" on TPUs with fewer than 8 images a device, and
            "xla", with a warning, where the fastest cannot be used. "pallas_tpu" runs in Pallas'
            interpreter, slowly, on other platforms than TPUs.

    Returns:
        Maps of x's shape and dtype.

    Raises:
        UserError: for an unknown implementation, for shapes or dtypes other than those above, and
            while lowering, when a kernel that is chosen by name cannot be used, as "triton" for
            other platforms than NVIDIA GPUs.
    """
    if implementation not in implementations():
        raise UserError(
            f"unknown depthwise implementation {implementation!r}"
            f"{did_you_mean(implementation, implementations())} "
            f"(known: {', '.join(implementations())})"
        )
    _check(x, kernel)
    return _convolve(implementation, x, kernel)


def _check(x: jax.Array, kernel: jax.Array) -> None:
    if x.ndim != 4 or x.dtype not in (jnp.bfloat16, jnp.float32):
        raise UserError(
            "depthwise_conv2d expects x to be [N, H, W, C] in bfloat16 or float32, "
            f"not {x.dtype}{list(x.shape)}: convert or reshape it"
        )
    k = kernel.shape[0] if kernel.ndim else 0
    if kernel.shape != (k, k, 1, x.shape[-1]) or k % 2 == 0:
        raise UserError(
            f"depthwise_conv2d expects a kernel [k, k, 1, {x.shape[-1]}] with odd k for x with "
            f"{x.shape[-1]} channels, not {list(kernel.shape)}: reshape or pad it"
        )
    if kernel.dtype not in (jnp.float32, x.dtype):
        raise UserError(
            f"depthwise_conv2d expects the kernel in float32 or x's {x.dtype}, not {kernel.dtype}: "
            "convert it"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(implementation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    forward = _function(implementation, "forward")
    (y,) = on_parts(forward, (True, False), (True,))(x, kernel.astype(x.dtype))
    return y


def _convolve_forward(implementation: str, x: jax.Array, kernel: jax.Array):
    return _convolve(implementation, x, kernel), (x, kernel)


def _convolve_backward(implementation: str, residuals: tuple[jax.Array, ...], dy: jax.Array):
    x, kernel = residuals
    input_gradient = _function(implementation, "input_gradient")
    filter_gradient = _function(implementation, "filter_gradient", kernel_size=kernel.shape[0])
    (dx,) = on_parts(input_gradient, (True, False), (True,))(dy, kernel.astype(x.dtype))
    (dkernel,) = on_parts(filter_gradient, (True, True), (False,))(x, dy)
    return dx, dkernel.astype(kernel.dtype)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _function(implementation: str, name: str, **options: int) -> Callable:
    """Returns a function of the implementation, which is chosen and imported at lowering."""

    def call(*args: jax.Array) -> tuple[jax.Array]:
        choose = _Choice(implementation, name, enough_images(args[0]))
        return (call_for_target(choose, getattr(xla, name), *args, **options),)

    return call


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Chooses a function's implementation for a target."""

    implementation: str
    function: str
    enough_images: bool

    def __call__(self, target: Target) -> Callable:
        name = self.implementation
        if name == "auto":
            name = _FASTEST.get(target.platform, "xla")
            few = name == "pallas_tpu" and not self.enough_images
            if few or (name in _KERNELS and not kernels_usable(target)):
                name = "xla"
        interpret = name == "pallas_tpu" and target.platform != "tpu"
        if name in _KERNELS and not interpret and (reason := why_unusable(target, _KERNELS[name])):
            raise UserError(f"depthwise={name!r} cannot be used, choose 'auto': {reason}")
        module = importlib.import_module(f"mambaout_jax.ops.depthwise.{_MODULES[name]}")
        function = getattr(module, self.function)
        return functools.partial(function, interpret=True) if interpret else function
