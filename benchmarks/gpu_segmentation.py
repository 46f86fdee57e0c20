r"""Compares training of UperNet-Tiny on one GPU with PyTorch under torch.compile, in images/s.

Each side runs in its own process with the GPU to itself, one after the other:

  python benchmarks/gpu_segmentation.py --batch=16

Both train on crops of 512 pixels that lie on the GPU, in bfloat16, from random weights, with drop
path 0.3, dropout 0.1 in the heads, AdamW and the losses of both heads at the size of the crops. The
peer is timm's backbone with transformers' UperNet heads: channels_last, autocast, fused AdamW and
torch.compile. Median of several rounds. A ratio above 1 means that this package is faster.
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from gpu_step import peak_memory, print_rates, run_side

_SIZE = 512  # pixels
_CLASSES = 150
_WIDTHS = (96, 192, 384, 576)
_DROP_PATH, _DROPOUT, _AUXILIARY_WEIGHT = 0.3, 0.1, 0.4


def ours(batch: int) -> tuple[Callable[[], None], Callable, Callable[[], int]]:
    """Returns a call that starts one step, one that waits for all, and one for the peak memory."""
    import jax
    import jax.numpy as jnp
    import optax

    import mambaout_jax
    from mambaout_jax.runtime.compilation import compiler_options
    from mambaout_jax.training.optimizer import decay_mask
    from mambaout_jax.training.recipe import Recipe
    from mambaout_jax.training.state import init_params, init_state
    from mambaout_jax.training.step import update_step

    key = jax.random.key(0)
    network = mambaout_jax.create_model(
        "upernet_mambaout_tiny",
        num_classes=_CLASSES,
        dtype=jnp.bfloat16,
        drop_path_rate=_DROP_PATH,
        head_dropout_rate=_DROPOUT,
    )
    params = jax.jit(functools.partial(init_params, model=network, size=(64, 64)))(key)
    images = jax.random.normal(key, (batch, _SIZE, _SIZE, 3), jnp.float32)
    labels = jax.random.randint(key, (batch, _SIZE, _SIZE), 0, _CLASSES).astype(jnp.uint8)
    inputs = {"image": images, "label": labels}
    optimizer = optax.adamw(1e-4, weight_decay=0.01, mask=decay_mask)
    recipe = Recipe(
        num_classes=_CLASSES,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        task="segmentation",
        auxiliary_weight=_AUXILIARY_WEIGHT,
    )
    step = jax.jit(
        functools.partial(update_step, model=network, optimizer=optimizer, recipe=recipe),
        donate_argnums=0,
        compiler_options=compiler_options(jax.default_backend()),
    )
    state = [init_state(params, optimizer, ema=False)]

    def train() -> None:
        state[0], _ = step(state[0], inputs, key)

    return train, lambda: state[0].step.block_until_ready(), peak_memory


def theirs(batch: int) -> tuple[Callable[[], None], Callable, Callable[[], int]]:
    """Returns the same as `ours`, of timm's and transformers' networks."""
    import timm
    import torch
    from torch import nn
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    config = UperNetConfig(num_labels=_CLASSES, hidden_size=512, auxiliary_channels=256)

    def with_dropout(head: Any) -> Any:
        head.classifier = nn.Sequential(nn.Dropout2d(_DROPOUT), head.classifier)
        return head

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            backbone = timm.create_model("mambaout_tiny", drop_path_rate=_DROP_PATH)
            self.stem, self.stages = backbone.stem, backbone.stages
            self.norms = nn.ModuleList(nn.LayerNorm(width) for width in _WIDTHS)
            self.decode_head = with_dropout(UperNetHead(config, _WIDTHS))
            self.auxiliary_head = with_dropout(UperNetFCNHead(config, _WIDTHS))

        def forward(self, images: Any) -> Any:
            x, maps = self.stem(images), []
            for stage, norm in zip(self.stages, self.norms, strict=True):
                x = stage(x)  # [N, H, W, C]
                maps.append(norm(x).permute(0, 3, 1, 2))
            return self.decode_head(maps), self.auxiliary_head(maps)

    network = Network().cuda().to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, _SIZE, _SIZE, device="cuda")
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(_CLASSES, (batch, _SIZE, _SIZE), device="cuda")
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, weight_decay=0.01, fused=True)

    def loss(images: Any, labels: Any) -> Any:
        losses = []
        for logits in network(images):
            logits = nn.functional.interpolate(logits, labels.shape[1:], mode="bilinear")
            losses.append(nn.functional.cross_entropy(logits, labels, ignore_index=255))
        return losses[0] + _AUXILIARY_WEIGHT * losses[1]

    compiled = torch.compile(loss)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            value = compiled(images, labels)
        value.backward()
        optimizer.step()

    return train, torch.cuda.synchronize, torch.cuda.max_memory_allocated


def main() -> None:
    """Parses the flags, runs each side and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        side, batch = json.loads(args.measure)
        started = time.perf_counter()
        print_rates(started, batch, 10, *(ours if side == "ours" else theirs)(batch))
        return
    base = run_side(__file__, "UperNet-Tiny train torch", ["theirs", args.batch], 0.0)
    rate = run_side(__file__, "UperNet-Tiny train ours", ["ours", args.batch], base)
    if math.isnan(base + rate):
        sys.exit(1)


if __name__ == "__main__":
    main()
