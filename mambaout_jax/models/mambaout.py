"""MambaOut (Yu and Wang, "MambaOut: Do We Really Need Mamba for Vision?", CVPR 2025).

The network, bottom-up: stem and downsampling, the Gated CNN block, stages, head. Images and feature
maps are NHWC. Parameters are float32 and `dtype` is the type of the computation, except for norm
statistics and logits, which are always computed in float32. `gradient_dtype` is the type in which
the parameters' gradients are summed over devices.

Variants whose name ends in `_rw` are of timm's later series. They have no norm after the stem's
first convolution, the norm before the convolution in downsampling, layer scale, and no second norm
in the head.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mambaout_jax.errors import UserError, did_you_mean
from mambaout_jax.models.layers import (
    EPSILON,
    Conv3x3Stride2,
    Dense,
    DepthwiseConv,
    LayerNorm,
    MergeDense,
    SplitDense,
    Weights,
    types,
)
from mambaout_jax.models.mixers import (
    KERNEL_SIZE,
    TOKEN_MIXER,
    check_kernel_size,
    scans,
    stage_mixers,
)
from mambaout_jax.models.ssm import SSM
from mambaout_jax.models.upernet import PREFIX, UperNet
from mambaout_jax.models.variants import find_variant
from mambaout_jax.models.vit import VITS, create_vit
from mambaout_jax.ops import (
    activate,
    few_images,
    first_conv,
    gate_product,
    gated_block,
    gated_block_vmem,
    gated_conv,
    is_small,
    merge_weights,
    small_block,
    split_weights,
    weighted,
)
from mambaout_jax.ops.kernels import enough_images, vmem


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, with the activation of the blocks between them.

    With `fused_gpu`, `ops.first_conv` computes it up to the activation, if the norm is there.
    """

    width: int
    act: str = "gelu"
    first_norm: bool = True
    fused_gpu: bool = False
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, 3] to [N, ceil(H / 4), ceil(W / 4), width]."""
        x = self._fused(x) if self.fused_gpu and self.first_norm else self._first(x)
        x = Conv3x3Stride2(self.width, **types(self), name="conv2")(x)
        return LayerNorm(dtype=self.dtype, name="norm2")(x)

    def _first(self, x: jax.Array) -> jax.Array:
        x = Conv3x3Stride2(self.width // 2, **types(self), name="conv1")(x)
        if self.first_norm:
            x = LayerNorm(dtype=self.dtype, name="norm1")(x)
        return activate(self.act, x)

    def _fused(self, x: jax.Array) -> jax.Array:
        width = self.width // 2
        conv = Weights((3, 3, x.shape[-1], width), name="conv1")()
        norm = Weights((width,), nn.initializers.ones_init(), "scale", name="norm1")()
        return first_conv(self.act, EPSILON, self.gradient_dtype, x.astype(self.dtype), conv, norm)


class Downsample(nn.Module):
    """3x3 convolution of stride 2 and a norm, which comes first if `norm_first`."""

    width: int
    norm_first: bool = False
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] to [N, ceil(H / 2), ceil(W / 2), width]."""
        conv = Conv3x3Stride2(self.width, **types(self), name="conv")
        norm = LayerNorm(dtype=self.dtype, name="norm")
        return conv(norm(x)) if self.norm_first else norm(conv(x))


class GatedCNNBlock(nn.Module):
    """Gated CNN block (the paper's Algorithm 1): Mamba's block without the state space model.

    With an SSM after the convolution it is Mamba's block; `models.mixers` has the token mixers.
    `layer_scale` is the initial value of the factor on each channel of the branch; None for none.
    Blocks whose token mixer is the convolution, in bfloat16 and with at least 8 images on a device,
    are computed by `ops.gated_block` where its kernels need at most `fused_vmem` MiB of a TPU's
    vector memory; 0 for none. With `fused_gpu`, `ops.gated_conv` computes the convolution and the
    gate, or, in inference with few pixels on a device, `ops.small_block` the block.
    """

    expansion_ratio: float = 8 / 3
    conv_ratio: float = 1.0
    act: str = "gelu"
    layer_scale: float | None = None
    drop_path_rate: float = 0.0
    depthwise: str = "auto"
    token_mixer: str = TOKEN_MIXER
    kernel_size: int = KERNEL_SIZE
    fused_vmem: int = 0
    fused_gpu: bool = False
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[N, H, W, C] to [N, H, W, C]."""
        width = x.shape[-1]
        hidden, conv = int(self.expansion_ratio * width), int(self.conv_ratio * width)
        # Drop path is dropout of whole examples.
        drop_path = nn.Dropout(
            self.drop_path_rate, broadcast_dims=(1, 2, 3), deterministic=not train
        )
        fusable = self.dtype == jnp.bfloat16 and self.token_mixer == TOKEN_MIXER
        fusable &= gated_block_vmem(width, hidden) <= self.fused_vmem * 2**20
        if fusable and enough_images(x):
            return self._fused(x, hidden, conv, drop_path)
        fused_gpu = self.fused_gpu and self.token_mixer == TOKEN_MIXER
        small = fused_gpu and not train and self.dtype == jnp.bfloat16
        if small and is_small(x, hidden):
            return self._small(x, hidden, conv)
        shortcut, x = LayerNorm(dtype=self.dtype, name="norm")(x, with_shortcut=True)
        if fused_gpu:
            x = self._gated(x, hidden, conv)
        else:
            g, i, c = SplitDense(hidden, conv, **types(self), name="fc1")(x)
            c = self._mix(c, rank=-(-width // 16))
            x = gate_product(self.act, g, i, c)  # act(g) * concatenate(i, c)
        x = MergeDense(width, hidden, conv, **types(self), name="fc2")(x)
        if self.layer_scale is not None:
            init = nn.initializers.constant(self.layer_scale)
            scale = self.param("layer_scale", init, (width,))
            x = weighted(_scale, self.gradient_dtype, x, scale)
        return shortcut + drop_path(x)

    def _fused(self, x: jax.Array, hidden: int, conv: int, drop_path: nn.Dropout) -> jax.Array:
        kept = drop_path(jnp.ones((x.shape[0], 1, 1, 1))).reshape(-1)
        return gated_block(
            x.astype(self.dtype),
            kept,
            *self._parameters(x.shape[-1], hidden, conv),
            act=self.act,
            depthwise=self.depthwise,
            gradient_dtype=self.gradient_dtype,
        )

    def _small(self, x: jax.Array, hidden: int, conv: int) -> jax.Array:
        norm, fc1, taps, fc2 = self._parameters(x.shape[-1], hidden, conv)
        fc1 = split_weights(fc1[0], fc1[1], conv)
        weights = (*fc1, *taps, merge_weights(fc2[0], conv), fc2[1])
        x = x.astype(self.dtype)
        return small_block(self.act, EPSILON, self.gradient_dtype, x, norm, weights)

    def _parameters(self, width: int, hidden: int, conv: int) -> tuple:
        """Returns those of norm, fc1, conv and fc2; fc2's have the layer scale in them."""
        norm = Weights((width,), nn.initializers.ones_init(), "scale", name="norm")()
        fc1 = Weights((width, 2 * hidden), name="fc1")()
        taps = Weights((self.kernel_size, self.kernel_size, 1, conv), name="conv")()
        kernel, bias = Weights((hidden, width), name="fc2")()
        if self.layer_scale is not None:
            init = nn.initializers.constant(self.layer_scale)
            scale = self.param("layer_scale", init, (width,))
            kernel, bias = kernel * scale[None], bias * scale
        return norm, fc1, taps, (kernel, bias)

    def _gated(self, x: jax.Array, hidden: int, conv: int) -> jax.Array:
        kernel, bias = Weights((x.shape[-1], 2 * hidden), name="fc1")()
        taps = Weights((self.kernel_size, self.kernel_size, 1, conv), name="conv")()
        kernel, bias = split_weights(kernel, bias, conv)
        x = weighted(jnp.matmul, self.gradient_dtype, x.astype(self.dtype), kernel)
        return gated_conv(self.act, self.gradient_dtype, x, (bias, *taps))

    def _mix(self, x: jax.Array, rank: int) -> jax.Array:
        if self.token_mixer == "none":
            return x
        conv = DepthwiseConv(self.kernel_size, self.depthwise, **types(self), name="conv")
        x, directions = conv(x), scans(self.token_mixer)
        if not directions:
            return x
        x = activate(self.act, x)
        outputs = [
            SSM(rank, reverse, **types(self), name=name)(x) for name, reverse in directions.items()
        ]
        return sum(outputs[1:], outputs[0]) / len(outputs)


def _scale(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * scale.reshape(1, 1, 1, -1)


class Stage(nn.Module):
    """Gated CNN blocks after a downsampling; the first stage follows the stem and has none."""

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
    """Global mean, norm, and an MLP whose hidden layer is 4 times as wide.

    Its activation is GELU, also where that of the blocks is SiLU. `second_norm` adds a norm after
    it.
    """

    num_classes: int
    dropout_rate: float = 0.0
    second_norm: bool = True
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[N, H, W, C] to float32 logits [N, num_classes]."""
        x = LayerNorm(dtype=self.dtype, name="norm1")(_global_mean(x))
        x = activate("gelu", Dense(4 * x.shape[-1], **types(self), name="fc1")(x))
        if self.second_norm:
            x = LayerNorm(dtype=self.dtype, name="norm2")(x)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        return Dense(self.num_classes, dtype=jnp.float32, name="fc2")(x)


def _global_mean(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32).mean(axis=(1, 2))


class MambaOut(nn.Module):
    """MambaOut.

    Without classes (`num_classes=0`) there is no head, and the output is the map of the last stage.
    `depthwise` names the implementation of the depthwise convolutions, see
    `mambaout_jax.ops.depthwise_conv2d`. `token_mixer` is one mixer, or one a stage with commas, see
    `models.mixers`; `kernel_size` is that of their convolutions. `remat` computes each block again
    in the backward pass, to save memory. `fused_vmem` and `fused_gpu` are those of
    `GatedCNNBlock` and `Stem`; `on_device` sets them.

    Raises:
        UserError: when the images are not [N, H, W, 3] with H and W of at least 32 pixels, or the
            token mixer or the kernel size is unknown.
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
    token_mixer: str = TOKEN_MIXER
    kernel_size: int = KERNEL_SIZE
    fused_vmem: int = 0
    fused_gpu: bool = False
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Builds the parts; the drop path rate rises linearly over the blocks of all stages."""
        self.stem = Stem(
            self.widths[0],
            self.act,
            first_norm=not self.rw,
            fused_gpu=self.fused_gpu,
            **types(self),
        )
        block_class = nn.remat(GatedCNNBlock, static_argnums=(2,)) if self.remat else GatedCNNBlock
        last_block = max(sum(self.depths) - 1, 1)
        mixers = stage_mixers(self.token_mixer, len(self.depths))
        check_kernel_size(self.kernel_size)
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
                    token_mixer=mixers[index],
                    kernel_size=self.kernel_size,
                    fused_vmem=self.fused_vmem,
                    fused_gpu=self.fused_gpu,
                    **types(self),
                )
                for j in range(depth)
            ]
            downsample = Downsample(width, self.rw, **types(self)) if index else None
            stages.append(Stage(downsample, blocks))
        self.stages = stages
        if self.num_classes:
            self.head = Head(
                self.num_classes, self.head_dropout_rate, second_norm=not self.rw, **types(self)
            )

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """Normalised images [N, H, W, 3] to the maps of the four stages, strides 4, 8, 16, 32."""
        return self._maps(images, train, len(self.depths))

    def _maps(self, images: jax.Array, train: bool, count: int) -> list[jax.Array]:
        """Returns the maps of the last `count` stages."""
        if images.ndim != 4 or images.shape[3] != 3 or min(images.shape[1:3]) < 32:
            raise UserError(
                "expected images of shape [N, H, W, 3] with H and W of at least 32 pixels, "
                f"got {images.shape}"
            )
        mutable = self.scope is None or self.scope.mutable  # as in `init`
        if train or mutable or self.dtype != jnp.float32:
            return self.batch_maps(images, train)[-count:]
        depths, widths = tuple(self.depths), tuple(self.widths)
        model = self.clone(depths=depths, widths=widths, num_classes=0, parent=None, name=None)
        network = _Maps(model, count)
        params = {key: value for key, value in self.variables["params"].items() if key != "head"}
        return list(few_images(network, params, images))

    def batch_maps(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """As `features`; computes the whole batch at once on every platform."""
        x = self.stem(images.astype(self.dtype))
        maps = []
        for stage in self.stages:
            x = stage(x, train)
            maps.append(x)
        return maps

    def pooled(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Normalised images [N, H, W, 3] to float32 [N, C]: the last map's mean over H and W.

        This is the input of the head, before the head's first norm.
        """
        return _global_mean(self._maps(images, train, count=1)[0])

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Normalised images [N, H, W, 3] to float32 logits [N, num_classes].

        With `train`, drop path and dropout take their random numbers from the rng "dropout".
        """
        x = self._maps(images, train, count=1)[0]
        return self.head(x, train) if self.num_classes else x


@dataclasses.dataclass(frozen=True)
class _Maps:
    """Computes the maps of a network's last stages from its parameters."""

    model: MambaOut
    count: int

    def __call__(self, params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        maps = self.model.apply({"params": params}, images, method="batch_maps")
        return tuple(maps[-self.count :])


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    drop_path_rate: float = 0.0,
    head_dropout_rate: float = 0.0,
    dtype: Any = jnp.float32,
    **overrides: Any,
) -> Any:
    """Returns the network of a variant, or of a variant changed by `overrides`.

    Args:
        name: a variant, see `list_models`; a ViT of `models.vit.VITS`; or "upernet_" and a variant,
            such as "upernet_mambaout_tiny": a segmentation network, see `models.upernet`.
        num_classes: number of logits; None is 1000, of a segmentation network 150. 0 leaves the
            head out, which a segmentation network cannot.
        drop_path_rate: probability of dropping the branch of the last block; the rates of the
            others rise linearly from 0.
        head_dropout_rate: dropout probability in the head.
        dtype: type of the computation; parameters and logits stay float32.
        **overrides: other fields of `MambaOut`, such as `remat=True`, `token_mixer="conv_ssm"` or
            `depths=(1, 1, 2, 1)`; of a segmentation network also `channels`.

    Raises:
        UserError: when the name, an override, a token mixer or the kernel size is unknown, or a
            segmentation network is to have no classes.
    """
    dtype = jnp.dtype(dtype)  # the network compares it, and a name equals no type
    if name.startswith(PREFIX):
        heads = {"num_classes": 150 if num_classes is None else num_classes, "dtype": dtype}
        heads |= {"head_dropout_rate": head_dropout_rate}
        heads |= {key: overrides.pop(key) for key in ("channels",) if key in overrides}
        heads |= {key: overrides[key] for key in ("gradient_dtype",) if key in overrides}
        if not heads["num_classes"]:
            raise UserError(f"{name} with num_classes=0: a segmentation network needs classes")
        options = {"num_classes": 0, "drop_path_rate": drop_path_rate, "dtype": dtype}
        return UperNet(create_model(name.removeprefix(PREFIX), **options, **overrides), **heads)
    if name in VITS:
        options = {"num_classes": 1000 if num_classes is None else num_classes, "dtype": dtype}
        rates = {"drop_path_rate": drop_path_rate, "head_dropout_rate": head_dropout_rate}
        return create_vit(name, **options, **rates, **overrides)
    variant = find_variant(name)
    known = sorted({field.name for field in dataclasses.fields(MambaOut)} - {"parent", "name"})
    for key in overrides:
        if key not in known:
            raise UserError(
                f"unknown option {key!r} of {name}{did_you_mean(key, known)} "
                f"(known: {', '.join(known)})"
            )
    options = {
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
    model = MambaOut(**{**options, **overrides})
    stage_mixers(model.token_mixer, len(model.depths))
    check_kernel_size(model.kernel_size)
    return model


def on_device(model: Any, device: jax.Device) -> Any:
    """Returns the model for programs that run on devices of this kind.

    Where `depthwise` is "auto", its blocks are fused on TPUs, and on NVIDIA GPUs small blocks, the
    convolutions and gates of others, and the stem's first part. The parameters are the same, and
    the results differ by rounding.
    """
    if getattr(model, "depthwise", None) != "auto" or not hasattr(model, "fused_vmem"):
        return model
    if device.platform == "tpu":
        return model.clone(fused_vmem=vmem(device.device_kind))
    return model.clone(fused_gpu=device.platform == "gpu")
