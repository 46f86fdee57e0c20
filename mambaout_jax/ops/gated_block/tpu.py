"""The block's calls on TPUs: the Pallas kernels, with the layout and batch size they need.

`interpret` runs the kernels in Pallas' interpreter, on any platform.
"""

import jax
import jax.numpy as jnp

from mambaout_jax.ops.gated_block import pallas_tpu

_IMAGES = 16  # rows of a packed register of bfloat16


def norm_dense(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Returns norm(x) @ kernel + bias, for x [N, H, W, C], kernel [C, O] and bias [O]."""
    y = pallas_tpu.norm_dense(_to_rows(x), kernel, bias[None], interpret=interpret)
    return _from_rows(y, x)


def norm_dense_gradient(
    x: jax.Array,
    dx: jax.Array,
    dy: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Returns the gradients of `norm_dense`: dx plus that of x, and those of kernel and bias."""
    del bias
    dx, *gradients = pallas_tpu.norm_dense_gradient(
        _to_rows(x), _to_rows(dx), _to_rows(dy), kernel, interpret=interpret
    )
    return _from_rows(dx, x), *gradients


def gated(
    x: jax.Array,
    conv: jax.Array,
    scale: jax.Array,
    *weights: jax.Array,
    act: str,
    interpret: bool = False,
) -> jax.Array:
    """Returns the block's result, as `dispatch.gated_residual` describes it."""
    y = pallas_tpu.gated(
        _to_rows(x),
        _to_rows(conv),
        _pad_images(scale),
        *_as_rows(weights),
        act=act,
        interpret=interpret,
    )
    return _from_rows(y, x)


def gated_gradient(
    x: jax.Array,
    conv: jax.Array,
    dy: jax.Array,
    scale: jax.Array,
    *weights: jax.Array,
    act: str,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Returns the gradients of `gated` for x, conv and the six weights."""
    dx, dconv, *gradients = pallas_tpu.gated_gradient(
        _to_rows(x),
        _to_rows(conv),
        _to_rows(dy),
        _pad_images(scale),
        *_as_rows(weights),
        act=act,
        interpret=interpret,
    )
    return _from_rows(dx, x), _from_rows(dconv, x), *gradients


def _as_rows(weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(array if array.ndim > 1 else array[None] for array in weights)


def _pad_images(x: jax.Array) -> jax.Array:
    """Pads the images of x [N, ...] with zeros to a multiple of 16."""
    return jnp.pad(x, [(0, -x.shape[0] % _IMAGES), *[(0, 0)] * (x.ndim - 1)])


def _to_rows(x: jax.Array) -> jax.Array:
    """[N, H, W, C] to [H * W * N, C], with N padded."""
    return _pad_images(x).transpose(1, 2, 0, 3).reshape(-1, x.shape[-1])


def _from_rows(rows: jax.Array, x: jax.Array) -> jax.Array:
    """[H * W * N, C] with N padded to [N, H, W, C], N, H and W as those of x."""
    images, height, width, _ = x.shape
    maps = rows.reshape(height, width, -1, rows.shape[1])
    return maps.transpose(2, 0, 1, 3)[:images]
