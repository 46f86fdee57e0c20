"""ViT (Dosovitskiy et al., 2021), the Transformer that the paper compares with, in timm's form.

The attention is "full", every token sees all, or "causal", a token sees itself and those before it
in raster order (the paper's Fig. 3b). The class token stands last, so that it sees all tokens in
both. With full attention its place changes nothing, and the weights are timm's.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mambaout_jax.errors import UserError, did_you_mean
from mambaout_jax.models.layers import Dense, LayerNorm, convolve, kernel_init, types
from mambaout_jax.ops import activate, weighted
from mambaout_jax.ops.sharded import on_mesh_of

ATTENTIONS = ("full", "causal")
PATCH = 16  # side of a token, in pixels
# Width and heads; each has 12 blocks.
VITS: dict[str, tuple[int, int]] = {
    "vit_tiny_patch16_224": (192, 3),
    "vit_small_patch16_224": (384, 6),
    "vit_base_patch16_224": (768, 12),
}


class PatchEmbed(nn.Module):
    """Convolution of the patches, which do not overlap."""

    width: int
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, 3] to [N, H / 16, W / 16, width]."""
        kernel = self.param("kernel", kernel_init, (PATCH, PATCH, x.shape[-1], self.width))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.width,))
        embed = functools.partial(convolve, stride=PATCH, padding="VALID")
        return weighted(embed, self.gradient_dtype, x.astype(self.dtype), kernel, bias)


class Attention(nn.Module):
    """Multi-head self-attention; the scores and the softmax are float32."""

    heads: int
    causal: bool = False
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, L, C] to [N, L, C]."""
        n, length, width = x.shape
        qkv = Dense(3 * width, **types(self), name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(n, length, 3, self.heads, -1), 2, 0)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        return Dense(width, **types(self), name="proj")(y.reshape(n, length, width))


class Block(nn.Module):
    """Transformer block: attention and an MLP of ratio 4, each after a norm."""

    heads: int
    causal: bool = False
    drop_path_rate: float = 0.0
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[N, L, C] to [N, L, C]."""
        width = x.shape[-1]

        def add(x: jax.Array, y: jax.Array) -> jax.Array:
            drop = nn.Dropout(self.drop_path_rate, broadcast_dims=(1, 2))
            return x + drop(y, deterministic=not train)

        y = LayerNorm(dtype=self.dtype, name="norm1")(x)
        x = add(x, Attention(self.heads, self.causal, **types(self), name="attn")(y))
        y = LayerNorm(dtype=self.dtype, name="norm2")(x)
        y = activate("gelu", Dense(4 * width, **types(self), name="fc1")(y))
        return add(x, Dense(width, **types(self), name="fc2")(y))


class ViT(nn.Module):
    """ViT with a class token and learned position embeddings.

    Raises:
        UserError: when the images are not [N, image_size, image_size, 3].
    """

    width: int
    heads: int
    depth: int = 12
    num_classes: int = 1000
    image_size: int = 224
    attention: str = "full"
    drop_path_rate: float = 0.0
    head_dropout_rate: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    def pooled(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Normalised images [N, S, S, 3] to float32 [N, C]: the class token after the last norm."""
        return self(images, train, pooled=True)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, pooled: bool = False) -> jax.Array:
        """Normalised images [N, S, S, 3] to float32 logits [N, num_classes]; 0: as `pooled`."""
        size = self.image_size
        if images.shape[1:] != (size, size, 3):
            raise UserError(
                f"expected images of shape [N, {size}, {size}, 3], as the position embeddings, "
                f"got {images.shape}: create the model with another image_size"
            )
        n, tokens = images.shape[0], (size // PATCH) ** 2
        x = PatchEmbed(self.width, **types(self), name="patch_embed")(images)
        first = self.param("cls_token", kernel_init, (1, 1, self.width))
        position = self.param("pos_embed", kernel_init, (1, tokens + 1, self.width))
        first, position = on_mesh_of(x, first), on_mesh_of(x, position)
        # timm's position 0 is that of the class token.
        x = x.reshape(n, tokens, self.width) + position[:, 1:].astype(self.dtype)
        # Added to zeros of x's sharding, which all parts of x must have.
        last = jnp.zeros_like(x[:, :1]) + (first + position[:, :1]).astype(self.dtype)
        x = jnp.concatenate((x, last), axis=1)
        block_class = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        causal = self.attention == "causal"
        for index in range(self.depth):
            rate = self.drop_path_rate * index / max(self.depth - 1, 1)
            block = block_class(self.heads, causal, rate, **types(self), name=f"blocks_{index}")
            x = block(x, train)
        x = LayerNorm(dtype=self.dtype, name="norm")(x[:, -1]).astype(jnp.float32)
        if pooled or not self.num_classes:
            return x
        x = nn.Dropout(self.head_dropout_rate)(x, deterministic=not train)
        return Dense(self.num_classes, name="head")(x)


def create_vit(name: str, **options: Any) -> ViT:
    """Returns a ViT of `VITS`; `options` are fields of `ViT`.

    Raises:
        UserError: an option or the attention is unknown, or the patches do not fit the image.
    """
    known = sorted({field.name for field in dataclasses.fields(ViT)} - {"parent", "name"})
    for key in options:
        if key not in known:
            raise UserError(
                f"unknown option {key!r} of {name}{did_you_mean(key, known)} "
                f"(known: {', '.join(known)})"
            )
    width, heads = VITS[name]
    model = ViT(**{"width": width, "heads": heads, **options})
    if model.attention not in ATTENTIONS:
        raise UserError(f"attention is {model.attention!r}: expected 'full' or 'causal'")
    if model.image_size % PATCH or model.image_size < PATCH:
        raise UserError(f"{name} takes images of a multiple of {PATCH} pixels: {model.image_size}")
    return model
