"""Where our kernels can be used; elsewhere XLA's own operations are, with one warning."""

import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable, Hashable
from types import ModuleType

import jax
from jax.export import is_symbolic_dim

from mambaout_jax.ops.lowering import Target, call_for_target
from mambaout_jax.ops.sharded import images_on_device

logger = logging.getLogger(__name__)

# MiB of vector memory of a TPU core, by `jax.Device.device_kind`.
_VMEM = {
    "TPU v5 lite": 128,
    "TPU v5e": 128,
    "TPU v5": 64,
    "TPU v5p": 64,
    "TPU v6 lite": 128,
    "TPU v6e": 128,
}
_LEAST_VMEM = 16
# The kernels for TPUs pad to 8 or 16 images. With fewer than 8 on a device, XLA's operations take
# less time by the compiler's figures for mambaout_femto and _tiny at 224 pixels on v5e.
_LEAST_IMAGES = 8
_CHIPS = {"cuda": "NVIDIA GPUs", "tpu": "TPUs"}
_LEAST_CAPABILITY = (8, 0)  # of the GPUs that Triton compiles for


def by_kernels(
    platform: str, kernels: str, reference: ModuleType, name: str, **options: Hashable
) -> Callable:
    """Returns a function in two versions, of which one is chosen when the program is lowered.

    Args:
        platform: "cuda" or "tpu".
        kernels: the module of the version in kernels, for programs for the platform where they can
            be used; it is imported then.
        reference: the module of the version in JAX operations, for all others.
        name: of the function.
        **options: passed on as keywords.
    """
    choose = _Choice(platform, kernels, reference, name)
    return functools.partial(call_for_target, choose, getattr(reference, name), **options)


@dataclasses.dataclass(frozen=True)
class _Choice:
    platform: str
    kernels: str
    reference: ModuleType
    name: str

    def __call__(self, target: Target) -> Callable:
        usable = target.platform == self.platform and kernels_usable(target)
        module = importlib.import_module(self.kernels) if usable else self.reference
        return getattr(module, self.name)


def kernels_usable(
    target: Target, operations: str = "depthwise convolutions and layer norm gradients"
) -> bool:
    """Returns whether the kernels of the target's platform can be used; if not, warns once.

    The warning names the operations.
    """
    reason = why_unusable(target, target.platform)
    if reason:
        _warn_once(
            f"using XLA's slower {operations} instead of the {target.platform} kernels: {reason}"
        )
    return not reason


def why_unusable(target: Target, platform: str) -> str:
    """Returns why the kernels of "cuda" or "tpu" cannot be used for the target, "" if they can."""
    if target.platform != platform:
        return f"its kernels are for {_CHIPS[platform]}, and this program is for {target.platform}"
    if target.symbolic:
        return "they are compiled for sizes that are numbers, and this program takes any batch"
    if target.devices > 1:
        return (
            f"XLA cannot split a kernel over {target.devices} devices; call the model inside "
            "`with jax.set_mesh(mesh):`, or with images that jax.device_put has put on the mesh"
        )
    return _why_no_triton() if target.platform == "cuda" else ""


def _why_no_triton() -> str:
    capability = compute_capability()
    if capability is None:
        return "they are compiled for the GPU of this machine, and JAX finds none"
    if capability < _LEAST_CAPABILITY:
        least, found = (".".join(map(str, pair)) for pair in (_LEAST_CAPABILITY, capability))
        return f"they need a GPU of compute capability {least} or higher, and this one has {found}"
    try:
        importlib.import_module("jax_triton")
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed (pip install 'mambaout_jax[cuda]')"
    except ImportError as error:
        return str(error)
    return ""


def compute_capability() -> tuple[int, int] | None:
    """Returns the lowest compute capability of this process's NVIDIA GPUs, None without any."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    pairs = [device.compute_capability.split(".") for device in devices]
    return min((int(major), int(minor)) for major, minor in pairs)


def vmem(device_kind: str) -> int:
    """Returns the MiB of vector memory of a kind of TPU; of an unknown one, what each has."""
    return _VMEM.get(device_kind, _LEAST_VMEM)


def enough_images(x: jax.Array) -> bool:
    """Returns whether each device has as many images of x as the kernels for TPUs need to pay."""
    images = images_on_device(x)
    return is_symbolic_dim(images) or images >= _LEAST_IMAGES


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
