"""Kernels load when they are used; where they cannot be, XLA's operations are, with a warning."""

import dataclasses
import functools
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mambaout_jax
from mambaout_jax.errors import UserError
from mambaout_jax.ops import depthwise_conv2d, kernels, layer_norm, selective_scan
from mambaout_jax.ops.gated_conv.dispatch import gated_conv
from mambaout_jax.ops.gpu_lowering import lower_in_threads
from mambaout_jax.ops.lowering import Target, call_for_target, lowered

NO_TRITON = """
import json, logging, os, sys
for name in ("triton", "jax_triton"):
    sys.modules[name] = None  # import raises ModuleNotFoundError
os.environ["JAX_PLATFORMS"] = "cpu"
logging.basicConfig(format="%(name)s %(message)s", stream=sys.stdout)
import jax, jax.numpy as jnp
import mambaout_jax
model = mambaout_jax.create_model("test_mambaout", depths=(1, 1, 1, 1), num_classes=10)
images = jnp.ones((8, 32, 32, 3))
params = jax.jit(model.init)(jax.random.key(0), images)
def loss(params):
    return (model.apply(params, images) ** 2).sum()
gradients = jax.jit(jax.grad(loss))(params)
assert all(jnp.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(gradients))
kernels = [name for name in sys.modules if "pallas" in name or "triton" in name]
assert not [name for name in kernels if "mambaout" in name]
traced = jax.jit(jax.grad(loss)).trace(params)
for platform in ("tpu", "cuda"):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    counts = (text.count("@tpu_custom_call"), text.count("triton"), text.count("convolution("))
    print(platform, *counts)
"""


def test_cpu_and_tpu_need_no_triton_and_a_gpu_does_without():
    done = subprocess.run(
        [sys.executable, "-c", NO_TRITON], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tpu, *warnings, cuda = done.stdout.splitlines()
    stem_and_downsampling = 5 + 5 + 4  # forward, filter and input gradients
    assert tpu == f"tpu 12 0 {stem_and_downsampling}"  # forward and two gradients of four blocks
    assert cuda == f"cuda 0 0 {stem_and_downsampling + 12}"
    (warning,) = warnings
    assert warning.startswith("mambaout_jax.ops.kernels using XLA's slower depthwise convolutions")
    assert warning.endswith("compiled for the GPU of this machine, and JAX finds none")


def gradient(implementation):
    return jax.grad(
        lambda x, kernel: depthwise_conv2d(x, kernel, implementation=implementation).sum(), (0, 1)
    )


def lower(platform, implementation="auto"):
    x, kernel = jnp.ones((2, 7, 7, 8)), jnp.ones((7, 7, 1, 8))
    traced = jax.jit(gradient(implementation)).trace(x, kernel)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def gpu(monkeypatch):
    """Returns a function that sets the compute capabilities of this machine's NVIDIA GPUs."""

    def set_capabilities(*capabilities):
        devices = [SimpleNamespace(compute_capability=capability) for capability in capabilities]
        monkeypatch.setattr(jax, "local_devices", lambda backend: devices)

    kernels._warn_once.cache_clear()
    lowered.clear()
    return set_capabilities


def test_a_gpu_below_8_takes_xla_and_one_warning_says_so(gpu, caplog):
    gpu("9.0", "7.5")
    for _ in range(2):
        text = lower("cuda")
        assert "triton" not in text
        assert text.count("stablehlo.convolution") == 2
    (record,) = caplog.records
    assert record.name == "mambaout_jax.ops.kernels"
    assert "capability 8.0 or higher, and this one has 7.5" in record.message


def test_a_gpu_from_8_on_takes_the_kernels(gpu, caplog, monkeypatch):
    gpu("8.0", "12.0")
    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace())
    assert kernels.kernels_usable(Target("cuda", 1))
    assert not caplog.records


def test_a_gpu_without_jax_triton_takes_xla_and_a_warning_names_the_extra(gpu, caplog, monkeypatch):
    gpu("9.0")
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    assert lower("cuda").count("stablehlo.convolution") == 2
    (record,) = caplog.records
    assert record.message.endswith("jax_triton is not installed (pip install 'mambaout_jax[cuda]')")


def test_without_a_gpu_xla_is_used(caplog):
    kernels._warn_once.cache_clear()
    assert lower("cuda").count("stablehlo.convolution") == 2
    assert "JAX finds none" in caplog.text


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_programs_for_a_gpu_call_the_kernels(gpu, capability):
    # jax-triton without JAX's plugin for GPUs raises ImportError, before 0.4.
    pytest.importorskip(
        "jax_triton", reason="jax-triton or jax-cuda13-plugin is missing", exc_type=ImportError
    )
    gpu(capability)

    def loss(x, kernel, scale):
        x, y = layer_norm(x, scale, scale, 1e-6, x.dtype)
        return (x + depthwise_conv2d(y, kernel)).sum()

    x, kernel, scale = jnp.ones((2, 7, 7, 8)), jnp.ones((7, 7, 1, 8)), jnp.ones(8)
    gradients = jax.grad(loss, (0, 1, 2))
    vmapped = jax.vmap(gradients, (0, None, None))
    for function, batch in ((gradients, x), (vmapped, x[None])):
        traced = jax.jit(function).trace(batch, kernel, scale)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@triton_kernel_call") == 4  # the norm, and three gradients
        assert "stablehlo.convolution" not in text


def test_a_scan_for_a_gpu_calls_its_kernels_which_threads_compile(gpu, monkeypatch):
    pytest.importorskip(
        "jax_triton", reason="jax-triton or jax-cuda13-plugin is missing", exc_type=ImportError
    )
    gpu("9.0")
    from mambaout_jax.ops.selective_scan import triton_kernels

    threads, launch = [], triton_kernels.launch

    def recorded(kernel, *args, **options):
        threads.append((kernel.__name__, threading.current_thread()))
        return launch(kernel, *args, **options)

    monkeypatch.setattr(triton_kernels, "launch", recorded)

    def loss(implementation, *args):
        return selective_scan(*args, implementation=implementation).sum()

    x, a, b, d = jnp.ones((2, 37, 24)), -jnp.ones((24, 5)), jnp.ones((2, 37, 5)), jnp.ones(24)
    for implementation in ("auto", "triton"):
        gradients = jax.jit(jax.grad(functools.partial(loss, implementation), tuple(range(6))))
        text = lower_in_threads(gradients.trace(x, x, a, b, b, d), ("cuda",)).as_text()
        assert text.count("@triton_kernel_call") == 2
    names = sorted(name for name, thread in threads if thread is not threading.main_thread())
    assert len(names) == len(threads)
    assert names == 2 * ["selective_scan"] + 2 * ["selective_scan_gradient"]


def test_the_convolution_of_a_gated_block_is_written_in_place(gpu):
    pytest.importorskip(
        "jax_triton", reason="jax-triton or jax-cuda13-plugin is missing", exc_type=ImportError
    )
    gpu("9.0")

    def loss(x, *weights):
        return gated_conv("gelu", jnp.float32, x, weights).sum()

    x, conv = jnp.ones((2, 7, 7, 128)), 24
    weights = jnp.ones(128), jnp.ones((7, 7, 1, conv)), jnp.ones(conv)
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, *weights)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call") == 5  # two forward, and gradients of gate, x and taps
    assert text.count("output_operand_alias<") == 1


def test_inference_of_one_image_takes_three_kernels_a_block(gpu):
    pytest.importorskip(
        "jax_triton", reason="jax-triton or jax-cuda13-plugin is missing", exc_type=ImportError
    )
    gpu("9.0")
    model = mambaout_jax.create_model(
        "mambaout_femto", depths=(1, 1, 1, 1), dtype=jnp.bfloat16, fused_gpu=True
    )
    images = jnp.ones((1, 224, 224, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    text = jax.jit(model.apply).trace(params, images).lower(lowering_platforms=("cuda",)).as_text()
    stem, norms = 1, 4  # norms of the stem and of downsampling
    assert text.count("@triton_kernel_call") == 4 * 3 + stem + norms
    strided, head = 4, 2
    assert text.count("stablehlo.dot_general") == strided + head  # none of the blocks


def test_a_kernel_chosen_by_name_that_cannot_be_used_is_an_error(gpu):
    gpu("7.5")
    with pytest.raises(UserError, match=r"depthwise='triton' cannot be used, choose 'auto': they"):
        lower("cuda", "triton")
    with pytest.raises(UserError, match="for NVIDIA GPUs, and this program is for cpu"):
        lower("cpu", "triton")


def test_only_the_function_of_the_platform_is_traced():
    traced = []

    def choose(target):
        def double(x):
            traced.append(target)
            return 2 * x

        return double

    x = jnp.arange(3.0)
    double = jax.jit(lambda x: call_for_target(choose, lambda x: x, x))
    for platform in ("cpu", "tpu", "rocm"):
        double.trace(x).lower(lowering_platforms=(platform,))
    assert traced == [Target("cpu", 1), Target("tpu", 1), Target("rocm", 1)]
    np.testing.assert_array_equal(double(x), 2 * x)
    np.testing.assert_array_equal(call_for_target(choose, lambda x: x, x), 2 * x)  # not jitted
    with jax.disable_jit():
        np.testing.assert_array_equal(call_for_target(choose, lambda x: x, x), 2 * x)


def twice(x):
    return 2 * x


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Chooses `twice`, and notes for what and in which thread."""

    notes: ClassVar[list] = []

    def __call__(self, target):
        self.notes.append((target, threading.current_thread()))
        return twice


def test_calls_are_lowered_once_before_their_program(gpu):
    gpu("9.0")
    Recorded.notes.clear()

    def double(x):
        return call_for_target(Recorded(), twice, x)

    def program(x, y):
        def body(x, _):
            return double(x), None

        return jax.lax.scan(body, jax.checkpoint(double)(x), None, 3)[0].sum() + double(y).sum()

    traced = jax.jit(jax.jit(program)).trace(jnp.ones(3), jnp.ones((2, 2)))
    for _ in range(2):
        text = lower_in_threads(traced, ("cuda",)).as_text()
        assert text.count("stablehlo.multiply") == 2
        assert [target for target, _ in Recorded.notes] == 2 * [Target("cuda", 1)]  # of each shape
        assert threading.main_thread() not in [thread for _, thread in Recorded.notes]
    traced.lower(lowering_platforms=("cpu",))
    assert {target for target, _ in Recorded.notes[2:]} == {Target("cpu", 1)}


def test_without_an_nvidia_gpu_nothing_is_lowered_before_its_program(monkeypatch):
    def no_gpus(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", no_gpus)
    traced = jax.jit(lambda x: call_for_target(Recorded(), twice, x)).trace(jnp.ones(5))
    Recorded.notes.clear()
    lower_in_threads(traced, ("rocm",))
    assert Recorded.notes == [(Target("rocm", 1), threading.main_thread())]


def test_calls_without_a_lasting_name_are_left_to_their_program(gpu):
    gpu("9.0")
    threads = []

    def choose(target):
        threads.append(threading.current_thread())
        return twice

    traced = jax.jit(lambda x: call_for_target(choose, twice, x)).trace(jnp.ones(3))
    text = lower_in_threads(traced, ("cuda",)).as_text()
    assert threads == [threading.main_thread()]
    assert text == traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_matmul_precision_is_the_one_of_the_trace():
    def product(x):
        return x @ x

    jitted = jax.jit(lambda x: call_for_target(lambda target: product, product, x))
    with jax.default_matmul_precision("highest"):
        traced = jitted.trace(jnp.ones((2, 2)))
    assert "HIGHEST" in traced.lower().as_text()


@pytest.mark.parametrize("axes", [(0, 0, 0), (1, None, 1), (None, 0, None)])
def test_vmap_equals_a_loop(axes):
    shapes = (2, 5, 6, 8), (3, 3, 1, 8), (2, 5, 6, 8)
    random = np.random.default_rng(0)
    args = [
        random.standard_normal(shape if axis is None else np.insert(shape, axis, 4), np.float32)
        for shape, axis in zip(shapes, axes, strict=True)
    ]

    def gradients(x, kernel, shortcut):
        def loss(x, kernel):
            residual, y = layer_norm(x, jnp.ones(8), jnp.zeros(8), 1e-6, jnp.float32)
            return (jnp.cos(depthwise_conv2d(y, kernel)) + residual * shortcut).sum()

        return jax.grad(loss, (0, 1))(x, kernel)

    got = jax.jit(jax.vmap(gradients, axes))(*args)
    for i in range(4):
        one = (
            arg if axis is None else arg.take(i, axis) for arg, axis in zip(args, axes, strict=True)
        )
        for many, expected in zip(got, jax.jit(gradients)(*one), strict=True):
            np.testing.assert_allclose(many[i], expected, rtol=1e-5, atol=1e-5)


LOWER_TWICE = """
import sys, jax, jax.numpy as jnp
from mambaout_jax.ops import kernels, layer_norm
from mambaout_jax.ops.gpu_lowering import lower_in_threads
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
local_devices = jax.local_devices
class Gpu:
    compute_capability = sys.argv[2]
jax.local_devices = lambda **options: [Gpu()] if options else local_devices()
x, scale = jnp.ones((1, 4, 4, 96)), jnp.ones(96)
traced = jax.jit(lambda x, scale: layer_norm(x, scale, scale, 1e-6, x.dtype)).trace(x, scale)
text = lower_in_threads(traced, ("cuda",)).as_text()
print("compiled" if "triton" in sys.modules else "found", text.count("@triton_kernel_call"))
"""


def test_kernels_are_found_by_the_next_run(tmp_path):
    pytest.importorskip(
        "jax_triton", reason="jax-triton or jax-cuda13-plugin is missing", exc_type=ImportError
    )

    def lower_again(capability="9.0"):
        command = [sys.executable, "-c", LOWER_TWICE, tmp_path, capability]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert lower_again() == "compiled 1"
    assert lower_again() == "found 1"
    assert lower_again("8.0") == "compiled 1"
    kept = sorted((tmp_path / "kernels").iterdir())
    assert len(kept) == 2
    for length in (0, -1):
        for file in kept:
            file.write_bytes(file.read_bytes()[:length])
        assert lower_again() == "compiled 1"
        assert lower_again() == "found 1"
    for file in kept:
        file.unlink()
    (tmp_path / "kernels").rmdir()
    (tmp_path / "kernels").touch()
    assert lower_again() == "compiled 1"
