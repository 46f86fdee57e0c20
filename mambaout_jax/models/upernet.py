"""UperNet (Xiao et al., 2018) on a MambaOut: semantic segmentation.

The heads are those of mmsegmentation's `upernet_swin`: pyramid pooling of the last map, a feature
pyramid (FPN) over all four, and in training an auxiliary head on the third. Each map of the
backbone passes a LayerNorm of its own. Maps are NHWC.

The running statistics of a BatchNorm are parameters, "mean" and "var", so that checkpoints, weights
and shardings need nothing else for them. Training does not differentiate by them: the network puts
their new values into the collection "batch_stats", and `training.step` writes them over the old.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mambaout_jax.models.layers import LayerNorm, convolve, types
from mambaout_jax.ops import weighted

PREFIX = "upernet_"  # of a network's name, before that of its backbone
CHANNELS = 512
POOL_SIZES = (1, 2, 3, 6)  # bins along each side
AUXILIARY_STAGE = 2  # whose map the auxiliary head takes, counted from 0
AUXILIARY = "auxiliary_head"  # in training alone
BATCH_STATS = "batch_stats"
STATISTICS = ("mean", "var")  # of a BatchNorm

# The heads' initialisation in mmsegmentation.
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
classifier_init = nn.initializers.normal(0.01)


def adaptive_avg_pool(x: jax.Array, bins: int) -> jax.Array:
    """Averages [N, H, W, C] to [N, bins, bins, C], float32, as torch's `AdaptiveAvgPool2d`.

    Bin i is of the rows from floor(i H / bins) to ceil((i + 1) H / bins), so that bins overlap
    where they do not divide the map.
    """
    rows, columns = _bin_weights(x.shape[1], bins), _bin_weights(x.shape[2], bins)
    x = x.astype(jnp.float32)
    return jnp.einsum("ih,nhwc,jw->nijc", rows, x, columns, precision="highest")


def _bin_weights(size: int, bins: int) -> np.ndarray:
    weights = np.zeros((bins, size), np.float32)
    for i in range(bins):
        start, end = i * size // bins, -(-(i + 1) * size // bins)
        weights[i, start:end] = 1 / (end - start)
    return weights


def resize(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Resizes [N, H, W, C] to (height, width), as torch's bilinear `interpolate`.

    That is without align_corners, and to smaller sizes without antialiasing.
    """
    if x.shape[1:3] == size:
        return x
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear", antialias=False)


def running_statistics(params: Any) -> dict[str, Any]:
    """Returns the tree of the running statistics in a tree of parameters; {} without any."""
    flat = flatten_dict(params) if isinstance(params, Mapping) else {}
    return unflatten_dict({path: x for path, x in flat.items() if path[-1] in STATISTICS})


class BatchNorm(nn.Module):
    """BatchNorm as torch's, epsilon 1e-5 and momentum 0.1, with float32 statistics.

    Under jit over a sharded batch the statistics are those of the whole batch, as with SyncBN.
    Those of training are put into the collection "batch_stats", if it is mutable: the running
    values after this batch. flax's BatchNorm differs in two ways: its running variance is biased,
    and its statistics are not among the parameters.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[N, H, W, C] to [N, H, W, C]."""
        zeros, ones, shape = nn.initializers.zeros_init(), nn.initializers.ones_init(), x.shape[-1:]
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        running = self.param("mean", zeros, shape), self.param("var", ones, shape)
        x = x.astype(jnp.float32)
        mean, var = running
        if train:
            mean = x.mean(axis=(0, 1, 2))
            var = jnp.square(x - _as_map(mean)).mean(axis=(0, 1, 2))
            count = x.size // x.shape[-1]
            unbiased = var * (count / max(count - 1, 1))
            for name, old, new in zip(STATISTICS, running, (mean, unbiased), strict=True):
                value = jax.lax.stop_gradient(0.9 * old + 0.1 * new)
                self.sow(BATCH_STATS, name, value, reduce_fn=lambda _, last: last)
        factor = jax.lax.rsqrt(var + 1e-5) * scale
        return ((x - _as_map(mean)) * _as_map(factor) + _as_map(bias)).astype(self.dtype)


def _as_map(vector: jax.Array) -> jax.Array:
    return vector.reshape(1, 1, 1, -1)


class Conv(nn.Module):
    """Convolution of stride 1; keeps height and width."""

    features: int
    kernel_size: int = 1
    use_bias: bool = False
    kernel_init: Any = conv_init
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] to [N, H, W, features]."""
        side = self.kernel_size
        weights = [self.param("kernel", self.kernel_init, (side, side, x.shape[-1], self.features))]
        if self.use_bias:
            weights.append(self.param("bias", nn.initializers.zeros_init(), (self.features,)))
        same = functools.partial(convolve, stride=1, padding="SAME")
        return weighted(same, self.gradient_dtype, x.astype(self.dtype), *weights)


class ConvModule(nn.Module):
    """Convolution, BatchNorm and ReLU."""

    features: int
    kernel_size: int = 3
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[N, H, W, C] to [N, H, W, features]."""
        x = Conv(self.features, self.kernel_size, **types(self), name="conv")(x)
        return nn.relu(BatchNorm(dtype=self.dtype, name="bn")(x, train))


def classify(x: jax.Array, num_classes: int, dropout_rate: float, train: bool) -> jax.Array:
    """Drops whole channels of [N, H, W, C], and returns float32 logits: the end of a head."""
    x = nn.Dropout(dropout_rate, broadcast_dims=(1, 2))(x, deterministic=not train)
    return Conv(num_classes, use_bias=True, kernel_init=classifier_init, name="conv_seg")(x)


class DecodeHead(nn.Module):
    """Pyramid pooling, feature pyramid and classifier."""

    num_classes: int
    channels: int = CHANNELS
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: list[jax.Array], train: bool = False) -> jax.Array:
        """Four maps, the largest first, to float32 logits of the first one's height and width."""

        def conv(name: str, kernel_size: int = 3) -> ConvModule:
            return ConvModule(self.channels, kernel_size, **types(self), name=name)

        *lower, last = maps
        pooled = [last]
        for index, bins in enumerate(POOL_SIZES):
            x = adaptive_avg_pool(last, bins).astype(self.dtype)
            pooled.append(resize(conv(f"psp_modules_{index}", 1)(x, train), last.shape[1:3]))
        x = conv("bottleneck")(jnp.concatenate(pooled, axis=-1), train)
        outputs = [x]
        for index, y in reversed(list(enumerate(lower))):
            x = conv(f"lateral_convs_{index}", 1)(y, train) + resize(x, y.shape[1:3])
            outputs.insert(0, conv(f"fpn_convs_{index}")(x, train))
        outputs = [resize(x, maps[0].shape[1:3]) for x in outputs]
        x = conv("fpn_bottleneck")(jnp.concatenate(outputs, axis=-1), train)
        return classify(x, self.num_classes, self.dropout_rate, train)


class AuxiliaryHead(nn.Module):
    """One convolution and a classifier: an FCN head."""

    num_classes: int
    channels: int = CHANNELS // 2
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[N, H, W, C] to float32 [N, H, W, num_classes]."""
        x = ConvModule(self.channels, **types(self), name="convs_0")(x, train)
        return classify(x, self.num_classes, self.dropout_rate, train)


class UperNet(nn.Module):
    """UperNet on a backbone whose `features` are four maps of strides 4, 8, 16 and 32.

    `channels` is the width of the decode head; the auxiliary head has half as many.

    Raises:
        UserError: as the backbone's `features`.
    """

    backbone: Any
    num_classes: int = 150
    channels: int = CHANNELS
    head_dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Builds the norms and the heads."""
        self.norms = [LayerNorm(dtype=self.dtype) for _ in self.backbone.widths]
        options = {"dropout_rate": self.head_dropout_rate, **types(self)}
        self.decode_head = DecodeHead(self.num_classes, self.channels, **options)
        self.auxiliary_head = AuxiliaryHead(self.num_classes, self.channels // 2, **options)

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """Normalised images [N, H, W, 3] to the four maps that the heads take."""
        maps = self.backbone.features(images, train)
        return [norm(x) for norm, x in zip(self.norms, maps, strict=True)]

    def __call__(self, images: jax.Array, train: bool = False) -> Any:
        """Normalised images [N, H, W, 3] to float32 logits [N, ceil(H / 4), ceil(W / 4), classes].

        With `train` the result is (logits, logits of the auxiliary head [N, ceil(H / 16), ...]),
        drop path and dropout take their random numbers from the rng "dropout", and the running
        statistics after this batch are in the collection "batch_stats".
        """
        maps = self.features(images, train)
        logits = self.decode_head(maps, train)
        if train or self.is_initializing():
            auxiliary = self.auxiliary_head(maps[AUXILIARY_STAGE], train)
        return (logits, auxiliary) if train else logits
