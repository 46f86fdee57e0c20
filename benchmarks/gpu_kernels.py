"""Checks the Triton kernels against XLA's operations on one GPU, and times both.

  python benchmarks/gpu_kernels.py

The depthwise convolution, its input gradient and its filter gradient, the block's convolution and
gate and their gradients, LayerNorm, its gradient with and without a shortcut, the stem up to its
activation and its gradient, and the selective scan and its gradients: on the maps of mambaout_tiny
at 224 pixels, which are timed, and on odd shapes, in bfloat16 and float32. With few images:

  python benchmarks/gpu_kernels.py --kernels block --batch=1

checks the kernels of a small block of at most 8 images, in bfloat16 alone, on the maps of
mambaout_femto and mambaout_tiny. The reference is XLA's own operation in float32 on the same
inputs. An error is the largest difference from it, as a part of its largest absolute value; "XLA"
is that of XLA's operation in the dtype of the inputs. A kernel may be off by float32 sums in
another order, and in bfloat16 by one rounding besides. A time, in microseconds, is that of one call
in a program of several, each with its own arrays: the median of several rounds. A failure is
printed, the rest is still checked, and the status is 1 at the end.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mambaout_jax.ops import norm_triton, norm_xla
from mambaout_jax.ops.activations import gate_product
from mambaout_jax.ops.depthwise import triton_kernels, xla
from mambaout_jax.ops.first_conv import triton_kernels as first_conv
from mambaout_jax.ops.first_conv import xla as first_conv_xla
from mambaout_jax.ops.gated_conv import dense_triton
from mambaout_jax.ops.gated_conv import gpu as gated_conv
from mambaout_jax.ops.gated_conv import xla as gated_conv_xla
from mambaout_jax.ops.kernels import why_unusable
from mambaout_jax.ops.lowering import Target
from mambaout_jax.ops.selective_scan import triton_kernels as scan_kernels
from mambaout_jax.ops.selective_scan import xla as scan_xla

_STAGES = ((56, 96), (28, 192), (14, 384), (7, 576))  # side and channels of tiny's maps at 224
_FEMTO_STAGES = ((56, 48), (28, 96), (14, 192), (7, 288))
_ODD = ((7, 24), (9, 100), (13, 341), (31, 24))
_STATES = 16
# Images, tokens, channels and states.
_ODD_SCANS = ((3, 1, 24, 1), (3, 37, 100, 16), (2, 169, 341, 31))
_EPSILON = 1e-6
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2.0**-7}
_ROUNDS, _RUNS = 5, 5
_CALLS = 8  # in a program
_FEW = 8  # images of a small block, at most


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel and XLA's operation, with their arguments, and how often a timed program calls them.

    Programs with none are not timed.
    """

    name: str
    kernel: Callable
    reference: Callable
    args: tuple[jax.Array, ...]
    calls: int


def draw(seed: int, *shapes: tuple[int, ...], dtype: str) -> list[jax.Array]:
    """Returns normal arrays."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def depthwise_cases(batch: int, dtype: str) -> Iterator[Case]:
    """Yields the convolution and its two gradients, for each shape and kernel size."""
    stages = [((batch, side, side, c), 7, _CALLS) for side, c in _STAGES]
    odd = [((3, 5, side, c), size, 0) for side, c in _ODD for size in (3, 7, 13)]
    for shape, size, calls in (*stages, *odd):
        x, dy, kernel = draw(size, shape, shape, (size, size, 1, shape[-1]), dtype=dtype)
        name = f"{'x'.join(map(str, shape))} k {size}"
        pairs = (
            ("convolution", triton_kernels.convolve, xla.forward, (x, kernel)),
            (
                "input gradient",
                lambda dy, kernel: triton_kernels.convolve(dy, kernel[::-1, ::-1]),
                xla.input_gradient,
                (dy, kernel),
            ),
            (
                "filter gradient",
                functools.partial(triton_kernels.filter_gradient, size=size),
                functools.partial(xla.filter_gradient, kernel_size=size),
                (x, dy),
            ),
        )
        for function, ours, theirs, args in pairs:
            yield Case(f"{function:15} {name}", ours, theirs, args, calls)


def gate_cases(batch: int, dtype: str) -> Iterator[Case]:
    """Yields the convolution and the gate, and their gradients, for each shape."""
    stages = [((batch, side, side, c), _CALLS // 2) for side, c in _STAGES]
    for (*maps, conv), calls in (*stages, *(((3, 5, side, c), 0) for side, c in _ODD)):
        hidden = int(8 / 3 * conv)
        x, convolved, dy = draw(1, (*maps, 2 * hidden), (*maps, conv), (*maps, hidden), dtype=dtype)
        weights = draw(2, (2 * hidden,), (7, 7, 1, conv), (conv,), dtype=dtype)
        for function, args in (
            ("forward", (x, *weights)),
            ("backward", (x, weights[1], convolved, dy)),
        ):
            yield Case(
                f"gate {function:10} {'x'.join(map(str, (*maps, conv)))}",
                functools.partial(getattr(gated_conv, function), act="gelu"),
                functools.partial(getattr(gated_conv_xla, function), act="gelu"),
                args,
                calls,
            )


def block_cases(batch: int, dtype: str) -> Iterator[Case]:
    """Yields the kernels of a small block, and the whole, for each shape; none in float32."""
    if dtype != "bfloat16":
        return
    batch = min(batch, _FEW)
    stages = [((batch, side, side, c), _CALLS) for side, c in (*_FEMTO_STAGES, *_STAGES)]
    for (*maps, conv), calls in (*stages, *(((1, 5, side, c), 0) for side, c in _ODD)):
        hidden = conv + -(-int(5 / 3 * conv) // 8) * 8
        shapes = ((*maps, conv), (*maps, 2 * hidden), (*maps, conv))
        x, wide, convolved = draw(1, *shapes, dtype=dtype)
        norm = draw(2, (conv,), (conv,), dtype="float32")
        shapes = (
            (conv, 2 * hidden),
            (2 * hidden,),
            (7, 7, 1, conv),
            (conv,),
            (hidden, conv),
            (conv,),
        )
        weights = [0.05 * array for array in draw(3, *shapes, dtype=dtype)]
        for function, ours, theirs, args in (
            (
                "norm dense",
                functools.partial(dense_triton.norm_dense, epsilon=_EPSILON),
                xla_norm_dense,
                (x, *norm, *weights[:2]),
            ),
            (
                "gate dense",
                functools.partial(dense_triton.gate_dense, act="gelu"),
                xla_gate_dense,
                (wide, convolved, x, *weights[4:]),
            ),
            (
                "block",
                functools.partial(gated_conv.small_block, act="gelu", epsilon=_EPSILON),
                functools.partial(gated_conv_xla.small_block, act="gelu", epsilon=_EPSILON),
                (x, *norm, *weights),
            ),
        ):
            yield Case(
                f"{function:15} {'x'.join(map(str, (*maps, conv)))}", ours, theirs, args, calls
            )


def xla_norm_dense(
    x: jax.Array, scale: jax.Array, shift: jax.Array, *dense: jax.Array
) -> jax.Array:
    """Returns the dense layer after LayerNorm."""
    kernel, bias = dense
    y = norm_xla.normalise(x, scale, shift, epsilon=_EPSILON, dtype=x.dtype)
    return gated_conv_xla.add_bias(y @ kernel, bias)


def xla_gate_dense(
    x: jax.Array, convolved: jax.Array, shortcut: jax.Array, kernel: jax.Array, bias: jax.Array
) -> jax.Array:
    """Returns the shortcut plus the dense layer after the gate."""
    hidden = kernel.shape[0]
    gate, identity, _ = jnp.split(x, (hidden, 2 * hidden - convolved.shape[-1]), axis=-1)
    product = gate_product("gelu", gate, identity, convolved)
    return shortcut + gated_conv_xla.add_bias(product @ kernel, bias)


def norm_cases(batch: int, dtype: str) -> Iterator[Case]:
    """Yields LayerNorm, and its gradient with and without a shortcut, for each shape."""
    stages = [((batch, side, side, c), _CALLS) for side, c in _STAGES]
    for shape, calls in (*stages, *(((3, 5, side, c), 0) for side, c in _ODD)):
        x, dy, shortcut = draw(1, shape, shape, shape, dtype=dtype)
        scale, bias = draw(2, (shape[-1],), (shape[-1],), dtype="float32")
        yield Case(
            f"{'norm':15} {'x'.join(map(str, shape))}",
            functools.partial(norm_triton.normalise, epsilon=_EPSILON, dtype=jnp.dtype(dtype)),
            functools.partial(norm_xla.normalise, epsilon=_EPSILON, dtype=jnp.dtype(dtype)),
            (x, scale, bias),
            calls,
        )
        for name, args in (("norm gradient", ()), ("with shortcut", (shortcut,))):
            yield Case(
                f"{name:15} {'x'.join(map(str, shape))}",
                functools.partial(norm_triton.gradient, epsilon=_EPSILON),
                functools.partial(norm_xla.gradient, epsilon=_EPSILON),
                (x, scale, dy, *args),
                calls,
            )


def stem_cases(batch: int, dtype: str) -> Iterator[Case]:
    """Yields the stem up to its activation, and its gradient, for each shape."""
    timed = [((batch, 224, 224, 3), features, _CALLS // 2) for features in (24, 48, 64)]
    odd = [((3, side, side + 5, 3), features, 0) for side, features in ((7, 24), (32, 40))]
    for shape, features, calls in (*timed, *odd):
        images, height, width, _ = shape
        maps = (images, (height + 1) // 2, (width + 1) // 2, features)
        x, kernel, bias, dy = draw(1, shape, (3, 3, 3, features), (features,), maps, dtype=dtype)
        scale, shift = draw(2, (features,), (features,), dtype="float32")
        weights = (kernel, bias, scale, shift)
        for function, args in (("forward", (x, *weights)), ("backward", (x, *weights, dy))):
            yield Case(
                f"stem {function:10} {'x'.join(map(str, shape))} to {features}",
                functools.partial(getattr(first_conv, function), act="gelu", epsilon=_EPSILON),
                functools.partial(getattr(first_conv_xla, function), act="gelu", epsilon=_EPSILON),
                args,
                calls,
            )


def scan_cases(batch: int, dtype: str) -> Iterator[Case]:
    """Yields the scan, which keeps states, and its gradients, for each shape."""
    stages = [((batch, side * side, c, _STATES), _CALLS // 4) for side, c in _STAGES]
    for (n, length, channels, states), calls in (*stages, *((shape, 0) for shape in _ODD_SCANS)):
        tokens, coefficients = (n, length, channels), (n, length, states)
        x, dy, b, c = draw(1, tokens, tokens, coefficients, coefficients, dtype=dtype)
        steps, d = draw(2, tokens, (channels,), dtype="float32")
        a = -jnp.broadcast_to(jnp.arange(1.0, 1 + states), (channels, states))
        args = (x, jax.nn.softplus(steps - 4), a, b, c, d)
        forward, reference = (
            functools.partial(module.forward, keep=True) for module in (scan_kernels, scan_xla)
        )
        name = "x".join(map(str, (n, length, channels)))
        yield Case(f"{'scan':15} {name} S {states}", forward, reference, args, calls)
        _, kept = jax.jit(reference)(*args)
        yield Case(
            f"{'scan gradient':15} {name} S {states}",
            scan_kernels.backward,
            scan_xla.backward,
            (*args, kept, dy),
            calls,
        )


def as_tuple(results) -> tuple[jax.Array, ...]:  # type: ignore[no-untyped-def]
    """Returns the results of a function that may return one array."""
    return tuple(results) if isinstance(results, tuple | list) else (results,)


@jax.jit
def relative_error(found: jax.Array, expected: jax.Array) -> jax.Array:
    """Returns the largest difference, as a part of the largest absolute value expected."""
    found, expected = (array.astype(jnp.float32) for array in (found, expected))
    return jnp.abs(found - expected).max() / jnp.maximum(jnp.abs(expected).max(), 1e-30)


def largest_error(found: tuple[jax.Array, ...], expected: tuple[jax.Array, ...]) -> float:
    """Returns the largest of the results' errors; not a number counts as infinite."""
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"shape {ours.shape} instead of {theirs.shape}")
    errors = [float(relative_error(*pair)) for pair in zip(found, expected, strict=True)]
    return max(np.inf if np.isnan(error) else error for error in errors)


def microseconds(function: Callable, args: tuple[jax.Array, ...], calls: int) -> float:
    """Returns the median time of a call."""
    copies = [tuple(jnp.copy(arg) for arg in args) for _ in range(calls)]
    program = jax.jit(lambda copies: [function(*copy) for copy in copies])
    jax.block_until_ready(program(copies))
    rounds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for _ in range(_RUNS):
            results = program(copies)
        jax.block_until_ready(results)
        rounds.append((time.perf_counter() - started) / (_RUNS * calls))
    return 1e6 * statistics.median(rounds)


def check(case: Case, dtype: str) -> bool:
    """Prints a row; returns whether the kernel agrees with XLA."""
    try:
        wide = [arg.astype(jnp.float32) for arg in case.args]
        with jax.default_matmul_precision("highest"):
            expected = as_tuple(jax.jit(case.reference)(*wide))
        started = time.perf_counter()
        found = as_tuple(jax.block_until_ready(jax.jit(case.kernel)(*case.args)))
        first = time.perf_counter() - started
        error = largest_error(found, expected)
        theirs = largest_error(as_tuple(jax.jit(case.reference)(*case.args)), expected)
        agrees = error <= _TOLERANCE[dtype]
        row = f"error {error:8.1e}, XLA {theirs:8.1e}, first call {first:4.1f} s"
        if case.calls:
            pair = case.kernel, case.reference
            times = (microseconds(function, case.args, case.calls) for function in pair)
            row += ", {:8,.0f} us, XLA {:8,.0f} us".format(*times)
    except Exception as error:  # any, so that the other kernels are checked too
        lines = f"{type(error).__name__}: {error}".splitlines()
        agrees, row = False, "\n    ".join(line[:200] for line in lines[:6])
    print(f"{'ok  ' if agrees else 'FAIL'} {dtype:8} {case.name:38} {row}", flush=True)
    return agrees


def main() -> None:
    """Prints a row for each kernel, shape and dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    cases = {
        "depthwise": depthwise_cases,
        "gate": gate_cases,
        "block": block_cases,
        "norm": norm_cases,
        "stem": stem_cases,
        "scan": scan_cases,
    }
    parser.add_argument("--kernels", nargs="+", default=list(cases), choices=list(cases))
    args = parser.parse_args()
    if reason := why_unusable(Target(jax.default_backend().replace("gpu", "cuda"), 1), "cuda"):
        sys.exit(f"the Triton kernels cannot be used: {reason}")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {args.batch}", flush=True)
    failed = 0
    for dtype in args.dtypes:
        for kernels in args.kernels:
            failed += sum(not check(case, dtype) for case in cases[kernels](args.batch, dtype))
    print(f"{failed} failed" if failed else "all agree")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
