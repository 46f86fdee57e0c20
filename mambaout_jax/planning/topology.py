"""TPU slices that libtpu compiles for on a machine without any."""

import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from mambaout_jax.errors import UserError

# libtpu asks for these where it finds no TPU; another process may hold it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")


@dataclasses.dataclass(frozen=True)
class Generation:
    """What is published of a generation, a chip, but for the memory.

    `clock` in Hz follows from the published peak: multiply-adds of its matrix units a cycle, two
    operations each. `memory` is what libtpu lets a program have, GiB. `bandwidth` is the published
    bandwidth of the memory, and `links` that between chips, bytes/s.
    """

    clock: float
    memory: float
    bandwidth: float
    links: float
    shapes: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()


GENERATIONS = {
    "v4": Generation(1.05e9, 30.75, 1228e9, 300e9, _CUBES, (("chip_config_name", "megacore"),)),
    "v5e": Generation(1.5e9, 15.75, 819e9, 200e9, _FLAT),
    "v5p": Generation(1.75e9, 95.73, 2765e9, 600e9, _CUBES),
    "v6e": Generation(1.75e9, 31.24, 1640e9, 448e9, _FLAT),
}


def find_topology(name: str) -> tuple[Generation, str]:
    """Returns the generation and the shape of a topology such as "v5e:4x4".

    Raises:
        UserError: when it is unknown, with the known ones.
    """
    generation, _, shape = name.partition(":")
    if generation in GENERATIONS and shape in GENERATIONS[generation].shapes:
        return GENERATIONS[generation], shape
    known = "; ".join(f"{key}:{{{','.join(gen.shapes)}}}" for key, gen in GENERATIONS.items())
    raise UserError(f"unknown topology {name!r}: known are {known}")


def count_chips(name: str) -> int:
    """Returns the chips of a known topology."""
    return math.prod(map(int, find_topology(name)[1].split("x")))


def load_compiler(dumps: Path | None = None) -> None:
    """Prepares libtpu; call it once, before any topology is used.

    With `dumps` it writes the schedules of all that it compiles into that folder.

    Raises:
        UserError: when libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu, the TPU compiler, is not installed: pip install 'mambaout_jax[plan]'"
        )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a plan reports compile time
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if dumps is None:
        return
    flags = {
        "xla_jf_dump_to": dumps,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_llo_pass_label_regex": "final_bundles",
    }
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    words = [f"--{flag}={value}" for flag, value in flags.items()]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([given, *words]).strip()


def slice_devices(name: str) -> list[Any]:
    """Returns the devices of a topology, one a chip: they compile and cannot run.

    Raises:
        UserError: when the topology is unknown.
    """
    generation, shape = find_topology(name)
    options: dict[str, Any] = dict(generation.options)
    if math.prod(map(int, shape.split("x"))) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)


def exceeds_memory(error: Exception) -> tuple[float, float] | None:
    """Returns the GiB that a program needs and that a chip has, when that is what failed."""
    found = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error)) or (
        re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", str(error))
    )
    return (float(found[1]), float(found[2])) if found else None
