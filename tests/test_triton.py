"""Triton's kernels without a GPU: in Triton's interpreter, and compiled."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton_calls  # noqa: E402
from triton_calls import (  # noqa: E402
    dense_triton,
    depthwise,
    first_conv,
    gate_triton,
    norm_triton,
    selective_scan,
)

from mambaout_jax.ops.selective_scan.xla import CHUNK  # noqa: E402


def test_kernels_agree_with_float64_in_the_interpreter():
    pytest.importorskip("torch", reason="torch is not installed")
    file = Path(__file__).with_name("triton_interpreter.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


KERNELS = (
    "convolution",
    "filter gradient",
    "convolution from",
    "convolution into",
    "gate",
    "gate gradient",
    "gate dense",
    "norm",
    "norm dense",
    "norm gradient",
    "first convolution",
    "first convolution gradient",
    "scan",
    "scan gradient",
)


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def calls(kernels, side, channels, dtype="bfloat16", images=256):
    """Returns a function that launches kernels on maps of a block, and its arguments."""
    x, scale = array(images, side, side, channels, dtype=dtype), array(channels, dtype="float32")
    if kernels == "convolution":
        return depthwise.convolve, (x, array(7, 7, 1, channels, dtype=dtype))
    if kernels == "filter gradient":
        return partial(depthwise.filter_gradient, size=7), (x, x)
    if kernels.startswith("first"):
        function = first_conv.backward if "gradient" in kernels else first_conv.forward
        images, kernel = (
            array(*sizes, dtype=dtype) for sizes in ((256, 224, 224, 3), (3, 3, 3, 48))
        )
        dy = [array(256, 112, 112, 48, dtype=dtype)] if "gradient" in kernels else []
        norm = [array(48, dtype="float32")] * 2
        args = (images, kernel, array(48, dtype=dtype), *norm, *dy)
        return partial(function, act="gelu", epsilon=1e-6), args
    width = 8 * channels // 3
    width += -(width - channels) % 8
    hidden = array(images, side, side, width, dtype=dtype)
    wide = array(images, side, side, 2 * width, dtype=dtype)
    if kernels == "convolution from":
        taps, conv_bias = array(7, 7, 1, channels, dtype=dtype), array(channels, dtype=dtype)
        return depthwise.convolve_from, (wide, taps, conv_bias)
    if kernels == "gate":
        return partial(gate_triton.gate_product, act="gelu"), (wide, x)
    if kernels == "gate dense":
        weights = array(width, channels), array(channels)
        return partial(dense_triton.gate_dense, act="gelu"), (wide, x, x, *weights)
    if kernels == "norm dense":
        weights = array(channels, 2 * width), array(2 * width)
        return partial(dense_triton.norm_dense, epsilon=1e-6), (x, scale, scale, *weights)
    if kernels == "convolution into":
        return depthwise.convolve_into, (x, array(7, 7, 1, channels, dtype=dtype), wide)
    if kernels == "gate gradient":
        return partial(gate_triton.gate_gradient, act="gelu"), (wide, x, hidden)
    if kernels == "norm":
        return partial(norm_triton.normalise, epsilon=1e-6, dtype=x.dtype), (x, scale, scale)
    if kernels == "norm gradient":
        return partial(norm_triton.gradient, epsilon=1e-6), (x, scale, x, x)
    return scan_calls(kernels, side * side, channels, 16, dtype)


def scan_calls(kernels, length, channels, states, dtype):
    """As `calls`."""
    x, b = array(256, length, channels, dtype=dtype), array(256, length, states, dtype=dtype)
    delta, a, d = (
        array(*shape, dtype="float32") for shape in (x.shape, (channels, states), (channels,))
    )
    if kernels == "scan":
        return partial(selective_scan.forward, keep=True), (x, delta, a, b, b, d)
    kept = array(256, triton.cdiv(length, CHUNK), states, channels, dtype="float32")
    return selective_scan.backward, (x, delta, a, b, b, d, kept, x)


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_compile_and_keep_their_sums_in_registers(
    kernels, capability, monkeypatch, tmp_path
):
    check_registers(*calls(kernels, 14, 384), capability, monkeypatch, tmp_path)


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(
    ("images", "widths"),
    [(1, (48, 96, 192, 288)), (8, (48, 96, 192, 288)), (1, (128, 256, 512, 768))],
)
def test_dense_layers_of_few_images_keep_their_sums_in_registers(
    images, widths, capability, monkeypatch, tmp_path
):
    for side, channels in zip((56, 28, 14, 7), widths, strict=True):
        for kernels in ("norm dense", "gate dense"):
            call = calls(kernels, side, channels, images=images)
            check_registers(*call, capability, monkeypatch, tmp_path)


@pytest.mark.parametrize("states", [1, 32])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scans_of_fewest_and_most_states_keep_them_in_registers(
    dtype, states, monkeypatch, tmp_path
):
    for kernels in ("scan", "scan gradient"):
        function, args = scan_calls(kernels, 37, 341, states, dtype)
        check_registers(function, args, 80, monkeypatch, tmp_path)


def check_registers(function, args, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # jax-triton unsets it
    (call,) = triton_calls.recorded(monkeypatch, function, args)
    file = tmp_path / "kernel.cubin"
    file.write_bytes(call.compile(capability).asm["cubin"])
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    command = [cuobjdump, "-res-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert " REG:" in usage
    # What does not fit into registers is on the stack, in local memory.
    assert " STACK:0 " in usage, usage
    assert " LOCAL:0 " in usage, usage


@pytest.mark.parametrize("images", [168, 256, 4096])
@pytest.mark.parametrize("kernels", KERNELS)
def test_grids_have_room_for_large_batches(kernels, images, monkeypatch):
    function, args = calls(kernels, 56, 48)
    args = [
        jax.ShapeDtypeStruct((images, *arg.shape[1:]), arg.dtype) if arg.shape[0] == 256 else arg
        for arg in args
    ]
    assert triton_calls.recorded(monkeypatch, function, args)
