"""The mesh of devices, and the sharding of each array."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr

from mambaout_jax.errors import UserError

# The first rule whose pattern is found in a parameter's name holds; optimizer state and averages
# have the names of their parameters. A number is the axis to split; "largest" is the largest axis
# that divides over `fsdp`, and replaces a number whose axis does not. fc1 and fc2 are not split
# along their hidden axis: blocks slice it into gate, value and convolution, and XLA would exchange
# pieces between devices for each slice.
RULES: tuple[tuple[str, str | int], ...] = (
    (r"(^|/)(bias|scale|mean|var|layer_scale|a_log|d|cls_token|pos_embed)$", "replicated"),
    (r"blocks_\d+/conv/kernel$", "replicated"),
    (r"/fc1/kernel$", 0),
    (r"/fc2/kernel$", 1),
    (r"/kernel$", "largest"),
    (r"/ns_coeffs$", "replicated"),  # constants in the state of optax's Muon
)
# Parameters of fewer elements stay whole on every device: splitting them saves nothing.
MIN_SPLIT_SIZE = 2**14

# A batch is split over both axes.
BATCH = P(("data", "fsdp"))


def make_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of these or all devices: `fsdp` of them share a copy of the parameters.

    Raises:
        UserError: when `fsdp` does not divide the devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    if fsdp < 1 or count % fsdp:
        raise UserError(f"config.mesh.fsdp {fsdp} does not divide the {count} devices")
    return jax.make_mesh(
        (count // fsdp, fsdp),
        ("data", "fsdp"),
        devices=devices,
        axis_types=(jax.sharding.AxisType.Auto, jax.sharding.AxisType.Auto),
    )


def check_batch(size: int, parts: int, mesh: Mesh, key: str) -> None:
    """Checks that a batch splits into `parts`, and each part over all devices.

    Raises:
        UserError: when it does not.
    """
    unit = parts * mesh.size
    if size % unit:
        near = max(size // unit, 1) * unit
        accumulated = f" in {parts} accumulated parts" if parts > 1 else ""
        raise UserError(
            f"config.{key} {size} does not divide over {mesh.size} devices{accumulated}: "
            f"expected a multiple of {unit}, such as {near}"
        )


def parameter_spec(name: str, shape: tuple[int, ...], fsdp: int) -> P:
    """Returns how the named parameter is split.

    Raises:
        ValueError: when no rule matches: the rules are then incomplete.
    """
    rule = next((rule for pattern, rule in RULES if re.search(pattern, name)), None)
    if rule is None:
        raise ValueError(f"no sharding rule matches the parameter {name}")
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if rule == "replicated" or fsdp == 1 or math.prod(shape) < MIN_SPLIT_SIZE or not axes:
        return P()
    axis = rule if rule in axes else max(axes, key=lambda axis: shape[axis])
    return P(*(None,) * axis, "fsdp")


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a state, or of any tree whose arrays have parameters' names.

    Counters and other scalars are replicated.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = keystr(path, simple=True, separator="/")
        spec = parameter_spec(name, leaf.shape, mesh.shape["fsdp"]) if leaf.ndim else P()
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(sharding, state)


def over_mesh(function: Callable[..., Any], mesh: Mesh, **parts: Any) -> Callable[..., Any]:
    """Returns `function` with its parts, and the mesh in context as the kernels need it."""

    @functools.wraps(function)
    def on_mesh(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **parts)

    return on_mesh


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices, as a part of the whole batch."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
