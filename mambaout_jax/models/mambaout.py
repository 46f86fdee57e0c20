"""MambaOut (Yu and Wang, "MambaOut: Do We Really Need Mamba for Vision?", CVPR 2025).

The network, bottom-up: stem and downsampling, the Gated CNN block (the paper's Figure 3), stages,
head, and the table of variants. Images and feature maps are NHWC. Parameters are float32; `dtype`
is the type of the computation; norm statistics and logits are float32 whatever it is.

The names that end in `_rw` are timm's later series: a stem without its first norm, norm before
convolution in the downsampling, layer scale, and a head without its second norm.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mambaout_jax.errors import UserError
from mambaout_jax.models.variants import find_variant
from mambaout_jax.ops import activate, depthwise_conv2d, gate_product, layer_norm

# torch's trunc_normal_(std=0.02) cuts at +-2 in absolute value, here in units of the deviation.
kernel_init = nn.initializers.truncated_normal(0.02, lower=-2 / 0.02, upper=2 / 0.02)


class LayerNorm(nn.Module):
    """LayerNorm over channels, epsilon 1e-6, statistics in float32 and by two passes.

    The fast variance, E[x^2] - E[x]^2, loses digits that exactness needs.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, with_shortcut: bool = False) -> Any:
        """[..., C] to [..., C]; `with_shortcut`, after x itself, for a residual to start from."""
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:])
        shortcut, y = layer_norm(x, scale, bias, 1e-6, self.dtype)
        return (shortcut, y) if with_shortcut else y


class Conv3x3Stride2(nn.Conv):
    """3x3 convolution of stride 2 that pads one pixel on each side, which "SAME" would not."""

    kernel_size: int | Sequence[int] = (3, 3)
    strides: int | Sequence[int] | None = (2, 2)
    padding: Any = ((1, 1), (1, 1))
    kernel_init: Any = kernel_init


class Dense(nn.Module):
    """Dense layer with the reference's initialisation.

    The gaps, (place, width) each, are inputs that the kernel ignores and outputs that are zero,
    counted in the layer's own inputs and outputs, the last first.
    """

    features: int
    input_gaps: Sequence[tuple[int, int]] = ()
    output_gaps: Sequence[tuple[int, int]] = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inputs and their gaps] to [..., features and their gaps]."""
        inputs = x.shape[-1] - sum(width for _, width in self.input_gaps)
        kernel = self.param("kernel", kernel_init, (inputs, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        for place, width in self.input_gaps:
            kernel = _insert_zeros(kernel, place, width, axis=0)
        for place, width in self.output_gaps:
            kernel = _insert_zeros(kernel, place, width, axis=1)
            bias = _insert_zeros(bias, place, width, axis=0)
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        return y + bias.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _insert_zeros(array: jax.Array, place: int, width: int, axis: int) -> jax.Array:
    before, after = jnp.split(array, (place,), axis=axis)
    shape = (*array.shape[:axis], width, *array.shape[axis + 1 :])
    return jnp.concatenate((before, jnp.zeros(shape, array.dtype), after), axis=axis)


class DepthwiseConv(nn.Module):
    """Depthwise convolution with bias, stride 1, that keeps height and width."""

    kernel_size: int = 7
    implementation: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] to [N, H, W, C]."""
        channels = x.shape[-1]
        shape = (self.kernel_size, self.kernel_size, 1, channels)
        kernel = self.param("kernel", kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        y = depthwise_conv2d(x.astype(self.dtype), kernel, implementation=self.implementation)
        return y + bias.astype(self.dtype).reshape(1, 1, 1, channels)


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, the blocks' activation between them."""

    width: int
    act: str = "gelu"
    first_norm: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, 3] to [N, ceil(H / 4), ceil(W / 4), width]."""
        x = Conv3x3Stride2(self.width // 2, dtype=self.dtype, name="conv1")(x)
        if self.first_norm:
            x = LayerNorm(dtype=self.dtype, name="norm1")(x)
        x = Conv3x3Stride2(self.width, dtype=self.dtype, name="conv2")(activate(self.act, x))
        return LayerNorm(dtype=self.dtype, name="norm2")(x)


class Downsample(nn.Module):
    """3x3 convolution of stride 2, with a norm after it or, `norm_first`, before it."""

    width: int
    norm_first: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] to [N, ceil(H / 2), ceil(W / 2), width]."""
        conv = Conv3x3Stride2(self.width, dtype=self.dtype, name="conv")
        norm = LayerNorm(dtype=self.dtype, name="norm")
        return conv(norm(x)) if self.norm_first else norm(conv(x))


class GatedCNNBlock(nn.Module):
    """Gated CNN block: Mamba's block without its state space model (the paper's Algorithm 1).

    `layer_scale` is the initial value of the per-channel factor on the branch, None for none.
    """

    expansion_ratio: float = 8 / 3
    conv_ratio: float = 1.0
    act: str = "gelu"
    layer_scale: float | None = None
    drop_path_rate: float = 0.0
    depthwise: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[N, H, W, C] to [N, H, W, C]."""
        width = x.shape[-1]
        hidden = int(self.expansion_ratio * width)
        conv = int(self.conv_ratio * width)
        # Matrix units want widths of whole 16 bytes: gate and identity get a few zeros between
        # what meets the identity and what meets the convolution.
        gap = -(hidden - conv) % 8
        gaps = ((2 * hidden - conv, gap), (hidden - conv, gap)) if gap else ()
        x, y = LayerNorm(dtype=self.dtype, name="norm")(x, with_shortcut=True)
        y = Dense(2 * hidden, output_gaps=gaps, dtype=self.dtype, name="fc1")(y)
        split = (hidden + gap, 2 * (hidden + gap) - conv)
        gate, identity, c = jnp.split(y, split, axis=-1)
        conv_layer = DepthwiseConv(implementation=self.depthwise, dtype=self.dtype, name="conv")
        y = gate_product(self.act, gate, identity, conv_layer(c))
        y = Dense(width, input_gaps=gaps[1:], dtype=self.dtype, name="fc2")(y)
        if self.layer_scale is not None:
            init = nn.initializers.constant(self.layer_scale)
            scale = self.param("layer_scale", init, (width,))
            y *= scale.astype(self.dtype).reshape(1, 1, 1, width)
        # Dropout of whole samples is drop path.
        y = nn.Dropout(self.drop_path_rate, broadcast_dims=(1, 2, 3))(y, deterministic=not train)
        return x + y


class Stage(nn.Module):
    """Downsampling (None in the first stage, where the stem does it), then Gated CNN blocks."""

    downsample: Downsample | None
    blocks: Sequence[GatedCNNBlock]

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[N, H, W, C] to [N, ceil(H / 2), ceil(W / 2), width]; the first stage keeps the size."""
        if self.downsample is not None:
            x = self.downsample(x)
        for block in self.blocks:
            x = block(x, train)
        return x


class Head(nn.Module):
    """Global mean, norm, and an MLP of 4 times the width: GELU, whatever the blocks' activation.

    `second_norm` follows the GELU.
    """

    num_classes: int
    dropout_rate: float = 0.0
    second_norm: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[N, H, W, C] to float32 logits [N, num_classes]."""
        x = x.astype(jnp.float32).mean(axis=(1, 2))
        x = LayerNorm(dtype=self.dtype, name="norm1")(x)
        x = activate("gelu", Dense(4 * x.shape[-1], dtype=self.dtype, name="fc1")(x))
        if self.second_norm:
            x = LayerNorm(dtype=self.dtype, name="norm2")(x)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        return Dense(self.num_classes, dtype=jnp.float32, name="fc2")(x)


class MambaOut(nn.Module):
    """MambaOut. `num_classes` 0 leaves the head out: the answer is the last stage's map.

    `depthwise` is the implementation of the depthwise convolutions, see `mambaout_jax.ops`; `remat`
    recomputes each block in the backward pass, to save memory.

    Raises:
        UserError: when the images are not [N, H, W, 3] with H and W of at least 32 pixels.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    num_classes: int = 1000
    expansion_ratio: float = 8 / 3
    conv_ratio: float = 1.0
    act: str = "gelu"
    rw: bool = False
    drop_path_rate: float = 0.0
    head_dropout_rate: float = 0.0
    remat: bool = False
    depthwise: str = "auto"
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Builds the parts; drop path rises linearly over all blocks of all stages."""
        self.stem = Stem(self.widths[0], self.act, first_norm=not self.rw, dtype=self.dtype)
        block_class = nn.remat(GatedCNNBlock, static_argnums=(2,)) if self.remat else GatedCNNBlock
        last_block = max(sum(self.depths) - 1, 1)
        stages = []
        for index, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            first_block = sum(self.depths[:index])
            blocks = [
                block_class(
                    expansion_ratio=self.expansion_ratio,
                    conv_ratio=self.conv_ratio,
                    act=self.act,
                    layer_scale=1e-5 if self.rw else None,
                    drop_path_rate=self.drop_path_rate * (first_block + j) / last_block,
                    depthwise=self.depthwise,
                    dtype=self.dtype,
                )
                for j in range(depth)
            ]
            downsample = Downsample(width, self.rw, self.dtype) if index else None
            stages.append(Stage(downsample, blocks))
        self.stages = stages
        if self.num_classes:
            self.head = Head(
                self.num_classes, self.head_dropout_rate, second_norm=not self.rw, dtype=self.dtype
            )

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """Normalised images [N, H, W, 3] to the stages' four maps, strides 4, 8, 16 and 32."""
        if images.ndim != 4 or images.shape[3] != 3 or min(images.shape[1:3]) < 32:
            raise UserError(
                "expected images of shape [N, H, W, 3] with H and W of at least 32 pixels, "
                f"got {images.shape}"
            )
        x = self.stem(images.astype(self.dtype))
        maps = []
        for stage in self.stages:
            x = stage(x, train)
            maps.append(x)
        return maps

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Normalised images [N, H, W, 3] to float32 logits [N, num_classes].

        With `train`, drop path and dropout draw from the rng collection "dropout".
        """
        x = self.features(images, train)[-1]
        return self.head(x, train) if self.num_classes else x


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    drop_path_rate: float = 0.0,
    head_dropout_rate: float = 0.0,
    dtype: Any = jnp.float32,
    **overrides: Any,
) -> MambaOut:
    """Returns the module of a variant, or of a variant changed by `overrides`.

    Args:
        name: a variant's name, see `list_models`.
        num_classes: width of the logits; 1000 where it is None, no head where it is 0.
        drop_path_rate: probability of dropping the last block's branch; rises linearly from 0.
        head_dropout_rate: probability of dropping a hidden unit of the head.
        dtype: type of the computation; parameters and logits stay float32.
        **overrides: further fields of `MambaOut`, such as `remat=True` or `depths=(1, 1, 2, 1)`.

    Raises:
        UserError: when the name or an override is unknown.
    """
    variant = find_variant(name)
    known = {field.name for field in dataclasses.fields(MambaOut)} - {"parent", "name"}
    for key in overrides:
        if key not in known:
            raise UserError(f"unknown option {key!r} of {name}: known are {', '.join(known)}")
    options: dict[str, Any] = {
        "depths": variant.depths,
        "widths": variant.widths,
        "num_classes": 1000 if num_classes is None else num_classes,
        "expansion_ratio": variant.expansion_ratio,
        "conv_ratio": variant.conv_ratio,
        "act": variant.act,
        "rw": variant.rw,
        "drop_path_rate": drop_path_rate,
        "head_dropout_rate": head_dropout_rate,
        "dtype": dtype,
    }
    return MambaOut(**{**options, **overrides})
