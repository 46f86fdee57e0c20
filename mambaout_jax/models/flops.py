"""Counts parameters and multiply-accumulates, layer by layer.

A convolution or dense layer counts one for each multiplication by its kernel, bias left out; a norm
counts five for each element. Activations, products, additions and means count nothing. This is the
convention of fvcore's flop counter, and with it the counts round to the published ones.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mambaout_jax.models.layers import LayerNorm

_NORM_MACS = 5  # for each element; fvcore calls it a rough estimate


@dataclasses.dataclass(frozen=True)
class Layer:
    """One module of a network.

    Attributes:
        path: names from the network down to the module; () is the network.
        kind: the module's class.
        shape: of its answer, batch left out.
        params: parameters of the module and of what it contains.
        macs: multiply-accumulates for one image, of the module and of what it contains.
    """

    path: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    params: int
    macs: int


def count_layers(model: nn.Module, input_shape: tuple[int, ...]) -> list[Layer]:
    """Counts every module of a network, in the order in which they are entered.

    Nothing is computed: shapes alone are traced.

    Args:
        model: called with one float32 array.
        input_shape: of one input, batch left out: (height, width, channels) of an image.

    Raises:
        UserError: when the network refuses the shape.
    """
    calls: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}
    own_macs: dict[tuple[str, ...], int] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        calls[module.path] = (type(module).__name__, ())  # holds the place
        answer = call(*args, **kwargs)
        *_, maps = answer if isinstance(answer, tuple) else (answer,)
        calls[module.path] = (type(module).__name__, tuple(maps.shape[1:]))
        kernel = module.variables.get("params", {}).get("kernel")
        if kernel is not None:
            own_macs[module.path] = math.prod(maps.shape[1:-1]) * math.prod(kernel.shape)
        elif isinstance(module, LayerNorm):
            own_macs[module.path] = _NORM_MACS * math.prod(maps.shape[1:])
        return answer

    inputs = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    with nn.intercept_methods(record):
        params = jax.eval_shape(model.init, jax.random.key(0), inputs).get("params", {})
    sizes = {
        tuple(key.key for key in path): math.prod(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(params)
    }

    def below(counts: dict[tuple[str, ...], int], path: tuple[str, ...]) -> int:
        return sum(count for name, count in counts.items() if name[: len(path)] == path)

    return [
        Layer(path, kind, shape, below(sizes, path), below(own_macs, path))
        for path, (kind, shape) in calls.items()
    ]


def count_total(model: nn.Module, input_shape: tuple[int, ...]) -> Layer:
    """Counts a whole network; arguments and errors as in `count_layers`."""
    return next(layer for layer in count_layers(model, input_shape) if not layer.path)


def attention_block_macs(width: int, tokens: int, mlp_ratio: int = 4) -> tuple[int, int]:
    """Counts a Transformer block's multiply-accumulates: half the FLOPs of the paper's Eq. 6.

    FLOPs(block) = 24 D² L + 4 D L² for width D, L tokens and an MLP of ratio 4. Norms and the
    softmax are left out.

    Returns:
        Those linear in the tokens (projections and MLP: 12 D² L), and those quadratic in them
        (scores and their product with the values: 2 D L²).
    """
    linear = (4 + 2 * mlp_ratio) * width**2 * tokens
    return linear, 2 * width * tokens**2


def long_sequence(width: int) -> int:
    """Returns the tokens above which the quadratic part outweighs the linear: 6 D (section 3)."""
    return 6 * width
