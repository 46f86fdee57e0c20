"""Pallas TPU kernels of the Gated CNN block around its depthwise convolution.

The hidden maps exist in VMEM alone: of a block, only x and the convolution's input and result are
in HBM, and the backward pass computes the hidden maps again. Maps are rows [pixels, channels],
pixels in the order height, width, image. Weights are [C, H] with H padded to whole registers of 128
lanes, in the dtype of the maps; biases, statistics and sums are float32. Gradients of weights are
summed over the grid, which is therefore sequential.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mambaout_jax.ops.activations import ACTIVATIONS_NEAR

_SUBLANES = 8
_PACKED = 16  # rows of a packed bfloat16 register
_ROWS = 512  # computed at once, of few channels
_WIDE = 256  # channels from which on half as many are
_LOOPED = 512  # channels from which on the hidden ones are computed in a loop
_MOVING = 4 * 2**20  # bytes of the blocks of maps in VMEM
_TEMPORARIES = 5 * 2**20
_COLUMNS = 256  # hidden channels computed at once
_VMEM = 16 * 2**20  # bytes that a kernel has without asking
_EPSILON = 1e-6


def norm_dense(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Returns norm(x) @ kernel + bias, [M, O], for x [M, C], kernel [C, O], bias [1, O]."""
    (y,) = _call(
        _norm_dense, "block_norm_dense", (x,), (kernel, bias), (bias.shape[1],), (), interpret
    )
    return y


def norm_dense_gradient(
    x: jax.Array, dx: jax.Array, dy: jax.Array, kernel: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, ...]:
    """Returns the gradients of `norm_dense`: dx plus that of x, of kernel and of bias."""
    sums = (kernel.shape, (_SUBLANES, kernel.shape[1]))
    dx, dkernel, dbias = _call(
        _norm_dense_gradient,
        "block_norm_dense_gradient",
        (x, dx, dy),
        (kernel,),
        (x.shape[1],),
        sums,
        interpret,
    )
    return dx, dkernel, dbias.sum(0)


def gated(
    x: jax.Array,
    conv: jax.Array,
    scale: jax.Array,
    *weights: jax.Array,
    act: str,
    interpret: bool = False,
) -> jax.Array:
    """Returns the block's result [M, C]; see `dispatch.gated_residual`.

    Args:
        x: [M, C].
        conv: [M, O].
        scale: float32 [N], of the images.
        *weights: gate kernel [C, H], gate bias [1, H], value kernel, value bias, the transposed
            kernel of the result [C, H], and its bias [1, C].
        act: the activation's name.
        interpret: runs in Pallas' interpreter.
    """
    kernel = functools.partial(_gated, act=act, images=scale.shape[0])
    inputs = (_tiled(scale, x), *weights)
    name = f"block_gated_{act}"
    (y,) = _call(kernel, name, (x, conv), inputs, (x.shape[1],), (), interpret)
    return y


def gated_gradient(
    x: jax.Array,
    conv: jax.Array,
    dy: jax.Array,
    scale: jax.Array,
    *weights: jax.Array,
    act: str,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Returns the gradients of `gated` for x, conv and its six weights."""
    gate, gate_bias, value, value_bias, out, _ = weights
    channels, hidden = gate.shape
    sums = (
        *[shape for _ in range(2) for shape in ((channels, hidden), (_SUBLANES, hidden))],
        (channels, hidden),
        (_SUBLANES, channels),
    )
    dx, dconv, *gradients = _call(
        functools.partial(_gated_gradient, act=act, images=scale.shape[0]),
        f"block_gated_{act}_gradient",
        (x, conv, dy),
        (_tiled(scale, x), gate, gate_bias, value, value_bias, out),
        (channels, conv.shape[1]),
        sums,
        interpret,
    )
    gradients[1::2] = [partial.sum(0) for partial in gradients[1::2]]
    return dx, dconv, *gradients


def _tiled(scale: jax.Array, x: jax.Array) -> jax.Array:
    """[N] to [L, 1], repeated so that the rows that are computed at once find theirs in a row."""
    rows = _rows(*x.shape)
    return jnp.tile(scale, -(-rows // scale.shape[0]) + 1)[:, None]


def _rows(pixels: int, channels: int) -> int:
    """Returns how many rows are computed at once: a divisor of all, and of half of them if even."""
    pixels = pixels // 2 if pixels % (2 * _PACKED) == 0 else pixels
    limit = _ROWS if channels < _WIDE else _ROWS // 2
    return max(rows for rows in range(_PACKED, limit + 1, _PACKED) if pixels % rows == 0)


def _call(
    kernel: Callable,
    name: str,
    maps: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    results: Sequence[int],
    sums: Sequence[tuple[int, ...]],
    interpret: bool,
) -> Sequence[jax.Array]:
    """Calls a kernel over blocks of rows; it returns maps of the given channels, and sums."""
    pixels, channels = maps[0].shape
    rows = _rows(pixels, channels)
    cores = 2 if pixels // rows % 2 == 0 else 1  # v4 and v5p have two, with a sum each
    parts = pixels // rows // cores
    widths = [*(array.shape[1] for array in maps), *results]
    row = 2 * maps[0].dtype.itemsize * sum(map(_lanes, widths))  # of two blocks of each map
    most = max(_MOVING // (row * rows), 1)
    block = rows * max(n for n in range(1, most + 1) if parts % n == 0)
    blocks = pixels // cores // block

    def rows_of(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((block, width), lambda core, i: (core * blocks + i, 0))

    def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda core, i: (0, 0), pipeline_mode=pl.Buffered(1))

    def sum_of(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, *shape), lambda core, i: (core, 0, 0), pipeline_mode=pl.Buffered(1)
        )

    resting = [(array.shape, array.dtype.itemsize) for array in weights]
    resting += [(shape, 4) for shape in sums]
    needed = block * row + _TEMPORARIES
    needed += sum(height * _lanes(width) * size for (height, width), size in resting)
    scratch = [pltpu.VMEM((rows, channels), jnp.float32)] if "gated" in name else []
    outputs = pl.pallas_call(
        functools.partial(kernel, rows=rows),
        grid=(cores, blocks),
        in_specs=[
            *(rows_of(array.shape[1]) for array in maps),
            *(whole(array.shape) for array in weights),
        ],
        out_specs=[*map(rows_of, results), *map(sum_of, sums)],
        out_shape=[
            *(jax.ShapeDtypeStruct((pixels, width), maps[0].dtype) for width in results),
            *(jax.ShapeDtypeStruct((cores, *shape), jnp.float32) for shape in sums),
        ],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=needed if needed > _VMEM else None,
        ),
        name=name,
        interpret=interpret,
    )(*maps, *weights)
    return [*outputs[: len(results)], *(part.sum(0) for part in outputs[len(results) :])]


def _lanes(channels: int) -> int:
    return -(-channels // 128) * 128


def _each_part(ref, rows: int, body: Callable) -> None:
    """Calls body(rows' slice, index of its first row among all pixels) for the parts of a block."""
    first = (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)) * ref.shape[0]

    @pl.loop(0, ref.shape[0] // rows)
    def _(part):
        start = pl.multiple_of(part * rows, rows)
        body(pl.ds(start, rows), first + start)


def _clear_before_first(*refs) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _():
        for ref in refs:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _normalise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns x with mean 0 and variance 1, and 1 / standard deviation, both in float32."""
    x = x.astype(jnp.float32)
    centred = x - _mean(x)
    factor = jax.lax.rsqrt(_mean(centred * centred) + _EPSILON)
    return centred * factor, factor


def _mean(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True) * (1 / x.shape[1])


def _normalised_gradient(x: jax.Array, factor: jax.Array, dy: jax.Array) -> jax.Array:
    return factor * (dy - _mean(dy) - x * _mean(dy * x))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)


def _dot_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a @ b.T."""
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _sum_rows(x: jax.Array) -> jax.Array:
    """[M, C] to [8, C], the sums over every eighth row: no shuffles."""
    return x.reshape(-1, _SUBLANES, x.shape[1]).sum(0)


def _each_columns(hidden: int, conv: int, unrolled: bool, body: Callable) -> None:
    """Calls body(columns' slice, whether the convolution's are in it) for all hidden channels.

    Unrolled, the kernel is a little faster and its compilation several times as long.
    """
    for start, stop in ((0, conv), (conv, hidden)):
        count, rest = divmod(stop - start, _COLUMNS)
        has_conv = start < conv

        def part(i, start=start, has_conv=has_conv):
            first = pl.multiple_of(start + i * _COLUMNS, 128)
            body(pl.ds(first, _COLUMNS), has_conv)

        if unrolled:
            for i in range(count):
                body(slice(start + i * _COLUMNS, start + (i + 1) * _COLUMNS), has_conv)
        elif count:
            pl.loop(0, count)(part)
        if rest:
            body(slice(stop - rest, stop), has_conv)


def _norm_dense(x_ref, kernel_ref, bias_ref, y_ref, *, rows: int) -> None:
    def part(here, _):
        x, _ = _normalise(x_ref[here])
        y = _dot(x.astype(x_ref.dtype), kernel_ref[...]) + bias_ref[...]
        y_ref[here] = y.astype(y_ref.dtype)

    _each_part(x_ref, rows, part)


def _norm_dense_gradient(
    x_ref, dx_ref, dy_ref, kernel_ref, out_ref, dkernel_ref, dbias_ref, *, rows: int
) -> None:
    _clear_before_first(dkernel_ref, dbias_ref)

    def part(here, _):
        x, factor = _normalise(x_ref[here])
        dy = dy_ref[here]
        dkernel_ref[...] += _dot(x.T.astype(dy.dtype), dy)
        dbias_ref[...] += _sum_rows(dy.astype(jnp.float32))
        dx = _normalised_gradient(x, factor, _dot_transposed(dy, kernel_ref[...]))
        out_ref[here] = (dx + dx_ref[here].astype(jnp.float32)).astype(out_ref.dtype)

    _each_part(x_ref, rows, part)


def _hidden(x, columns: slice, conv, gate_ref, gate_bias_ref, value_ref, value_bias_ref):
    """Returns some columns of the gate and of the value, float32; conv is theirs or None."""
    gate = _dot(x, gate_ref[:, columns]) + gate_bias_ref[:, columns]
    value = _dot(x, value_ref[:, columns]) + value_bias_ref[:, columns]
    return gate, value if conv is None else value + conv.astype(jnp.float32)


def _scale(scale_ref, first, images: int, rows: int) -> jax.Array:
    """Returns the factors [rows, 1] of the images of the rows from `first` on."""
    return scale_ref[pl.ds(pl.multiple_of(first % images, _PACKED), rows)]


def _gated(x_ref, conv_ref, scale_ref, *refs, rows: int, act: str, images: int) -> None:
    *hidden_refs, out_kernel_ref, out_bias_ref, y_ref, acc_ref = refs
    hidden, convolved = out_kernel_ref.shape[1], conv_ref.shape[1]

    def part(here, first):
        x = x_ref[here]
        normalised = _normalise(x)[0].astype(x.dtype)
        acc_ref[...] = jnp.broadcast_to(out_bias_ref[...], acc_ref.shape)

        def add(columns, has_conv):
            conv = conv_ref[here, columns] if has_conv else None
            gate, value = _hidden(normalised, columns, conv, *hidden_refs)
            product = ACTIVATIONS_NEAR[act](gate)[0] * value
            acc_ref[...] += _dot_transposed(product.astype(x.dtype), out_kernel_ref[:, columns])

        _each_columns(hidden, convolved, x.shape[1] < _LOOPED, add)
        y = x.astype(jnp.float32) + acc_ref[...] * _scale(scale_ref, first, images, rows)
        y_ref[here] = y.astype(y_ref.dtype)

    _each_part(x_ref, rows, part)


def _gated_gradient(
    x_ref, conv_ref, dy_ref, scale_ref, *refs, rows: int, act: str, images: int
) -> None:
    hidden_refs, (out_kernel_ref, dx_ref, dconv_ref), sums = refs[:4], refs[4:7], refs[7:-1]
    acc_ref = refs[-1]
    gate_ref, _, value_ref, _ = hidden_refs
    dgate_ref, dgate_bias_ref, dvalue_ref, dvalue_bias_ref, dout_ref, dout_bias_ref = sums
    dtype = x_ref.dtype
    hidden, convolved = out_kernel_ref.shape[1], conv_ref.shape[1]
    _clear_before_first(*sums)

    def part(here, first):
        x, factor = _normalise(x_ref[here])
        shortcut = dy_ref[here].astype(jnp.float32)
        dy = shortcut * _scale(scale_ref, first, images, rows)
        dout_bias_ref[...] += _sum_rows(dy)
        x_rows, x_columns = x.astype(dtype), x.T.astype(dtype)
        dy_rows, dy_columns = dy.astype(dtype), dy.T.astype(dtype)
        acc_ref[...] = jnp.zeros(acc_ref.shape, acc_ref.dtype)

        def add(columns, has_conv):
            conv = conv_ref[here, columns] if has_conv else None
            gate, value = _hidden(x_rows, columns, conv, *hidden_refs)
            active, slope = ACTIVATIONS_NEAR[act](gate)
            dproduct = _dot(dy_rows, out_kernel_ref[:, columns])
            dout_ref[:, columns] += _dot(dy_columns, (active * value).astype(dtype))
            dgate, dvalue = dproduct * value * slope, dproduct * active
            dgate_bias_ref[:, columns] += _sum_rows(dgate)
            dvalue_bias_ref[:, columns] += _sum_rows(dvalue)
            dgate, dvalue = dgate.astype(dtype), dvalue.astype(dtype)
            if has_conv:
                dconv_ref[here, columns] = dvalue
            dgate_ref[:, columns] += _dot(x_columns, dgate)
            dvalue_ref[:, columns] += _dot(x_columns, dvalue)
            acc_ref[...] += _dot_transposed(dgate, gate_ref[:, columns]) + _dot_transposed(
                dvalue, value_ref[:, columns]
            )

        _each_columns(hidden, convolved, x.shape[1] < _LOOPED, add)
        dx = shortcut + _normalised_gradient(x, factor, acc_ref[...])
        dx_ref[here] = dx.astype(dtype)

    _each_part(x_ref, rows, part)
