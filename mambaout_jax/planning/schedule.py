"""Cycles of a Pallas call: XLA estimates none, so its final schedule is counted."""

import functools
import math
import multiprocessing
import re
import tempfile
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from mambaout_jax.models.layers import DepthwiseConv
from mambaout_jax.ops.depthwise import pallas_tpu
from mambaout_jax.ops.gated_block import pallas_tpu as gated_block
from mambaout_jax.planning.program import Kernel
from mambaout_jax.planning.topology import load_compiler, slice_devices

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?P<label>[A-Z]{2})?\s*:\s*[> ]*\{")
_LOOP_TEST = re.compile(
    r"%(\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%\w+\), )?%\w+, (\d+) /\* loop exit test"
)
_DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}
_IMAGES = 16
_DELAY = 4  # bundles that a branch still runs after its own


def count_cycles(bundles: str) -> int:
    """Returns bundles times trips of a final schedule, in libtpu's text form.

    Branches count as always taken; waiting for memory counts nothing.

    Raises:
        ValueError: when a loop's trips are not constant.
    """
    count, loops = 0, []
    open_loops: list[dict[str, Any]] = []
    for line in bundles.splitlines():
        if bundle := _BUNDLE.match(line):
            if bundle["label"] == "LB":
                open_loops.append({"start": count, "test": "", "trips": 0})
            count += 1
        if test := _LOOP_TEST.search(line):
            innermost = [loop for loop in open_loops if not loop["test"]][-1]
            innermost |= {"test": test.group(1), "trips": int(test.group(2))}
        for loop in list(open_loops):
            if loop["test"] and re.search(rf"sbr\.rel \(!%{loop['test']}\)", line):
                open_loops.remove(loop)
                loops.append((loop["start"], count + _DELAY, loop["trips"]))
    if open_loops:
        raise ValueError(f"{len(open_loops)} loops of the schedule have no constant trips")
    trips = np.ones(count, np.int64)
    for start, stop, times in loops:
        trips[start:stop] *= times
    return int(trips.sum())


def count_kernels(kernels: Collection[Kernel], topology: str) -> dict[Kernel, int]:
    """Returns the counted cycles of one call of each kernel, compiled alone.

    In a process of its own, since libtpu writes the schedules of everything that its process
    compiles: of a whole step, that takes as long as compiling it.

    Raises:
        ValueError: when libtpu writes a kernel's schedule otherwise than expected.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_count_kernels, tuple(kernels), topology).result()


def _count_kernels(kernels: Iterable[Kernel], topology: str) -> dict[Kernel, int]:
    with tempfile.TemporaryDirectory(prefix="schedules_") as dumps:
        load_compiler(dumps=Path(dumps))
        device = slice_devices(topology)[0]
        return {kernel: _count(kernel, device, Path(dumps)) for kernel in kernels}


def _count(kernel: Kernel, device: Any, dumps: Path) -> int:
    sharding = SingleDeviceSharding(device)
    function, operands = _rebuild(kernel)
    before = set(dumps.iterdir())
    jax.jit(function).lower(
        *(
            jax.ShapeDtypeStruct(shape, _DTYPES[dtype], sharding=sharding)
            for dtype, shape in operands
        )
    ).compile()
    schedule = re.compile(rf"\d+-{kernel.name}[.\d]*-\d+-final_bundles.txt")
    paths = [path for path in set(dumps.iterdir()) - before if schedule.fullmatch(path.name)]
    if len(paths) != 1:
        raise ValueError(f"libtpu wrote {len(paths)} schedules of {kernel}, not one")
    return count_cycles(paths[0].read_text(errors="replace"))


def _rebuild(kernel: Kernel) -> tuple[Callable, list[tuple[str, tuple[int, ...]]]]:
    """Returns a function that calls the kernel, and its arguments' types and shapes."""
    first, *_, last = kernel.operands
    if kernel.name == "depthwise_convolution":
        taps, channels = last[1]
        size = math.isqrt(taps)
        return pallas_tpu.convolve, [first, ("f32", (size, size, 1, channels))]
    if kernel.name == "depthwise_filter_gradient":
        size = DepthwiseConv.kernel_size
        return functools.partial(pallas_tpu.filter_gradient, size=size), [first, first]
    if found := re.fullmatch(r"block_gated_([a-z]+?)(_gradient)?", kernel.name):
        maps = 3 if found[2] else 2
        # The kernel's operand has the images' factors repeated; their number hardly matters.
        images = ("f32", (_IMAGES,))
        function = gated_block.gated_gradient if found[2] else gated_block.gated
        weights = list(kernel.operands[maps + 1 :])
        bias = [("f32", (1, first[1][1]))] if found[2] else []
        operands = [*kernel.operands[:maps], images, *weights, *bias]
        return functools.partial(function, act=found[1]), operands
    return getattr(gated_block, kernel.name.removeprefix("block_")), list(kernel.operands)
