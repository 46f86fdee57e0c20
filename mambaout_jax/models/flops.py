"""Counts of parameters and multiply-accumulates (MACs), layer by layer.

A convolution or dense layer counts one MAC for each multiplication by its kernel, without the bias.
A norm counts five for each element. A selective scan counts its multiplications: 4 S + 2 for each
token and channel of S states (the exponent, the decay, the input, the output; the input's step size
and the direct path). Attention counts its two products, 2 L² D, also where a mask makes it causal.
Activations, products, sums, means, resizing and BatchNorms count none. fvcore's flop counter does
the same for the convolutional network, and the counts round to the published ones.

The MACs are those of a prediction: a segmentation network's auxiliary head has parameters and none.
The running statistics of a BatchNorm are not counted among the parameters.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mambaout_jax.models.layers import LayerNorm
from mambaout_jax.models.ssm import SSM, STATE
from mambaout_jax.models.upernet import AUXILIARY, STATISTICS
from mambaout_jax.models.vit import Attention

_NORM_MACS = 5  # for each element; fvcore calls it a rough estimate


@dataclasses.dataclass(frozen=True)
class Layer:
    """One module of a network.

    Attributes:
        path: names from the network down to the module; () is the network itself.
        kind: class of the module.
        shape: of the output, without the batch.
        params: parameters of the module and of its parts.
        macs: multiply-accumulates of the module and of its parts, for one image.
    """

    path: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    params: int
    macs: int


def count_layers(model: nn.Module, input_shape: tuple[int, ...]) -> list[Layer]:
    """Counts each module of a network, in the order of their calls, the network first.

    The network is traced, not computed.

    Args:
        model: takes one float32 array.
        input_shape: of an input without the batch: (height, width, channels) of an image.

    Raises:
        UserError: when the network does not take this shape.
    """
    calls: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}
    own_macs: dict[tuple[str, ...], int] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name not in ("__call__", "features"):
            return call(*args, **kwargs)
        calls[module.path] = (type(module).__name__, ())  # before those of its parts
        output = call(*args, **kwargs)
        shape = _output_shape(module, output)
        calls[module.path] = (type(module).__name__, shape)
        predicts = module.path[:1] != (AUXILIARY,)
        own_macs[module.path] = _own_macs(module, shape) if predicts else 0
        return output

    inputs = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    with nn.intercept_methods(record):
        params = jax.eval_shape(model.init, jax.random.key(0), inputs).get("params", {})
    sizes = {
        tuple(key.key for key in path): math.prod(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(params)
        if path[-1].key not in STATISTICS
    }

    def total(counts: dict[tuple[str, ...], int], path: tuple[str, ...]) -> int:
        return sum(count for name, count in counts.items() if name[: len(path)] == path)

    return [
        Layer(path, kind, shape, total(sizes, path), total(own_macs, path))
        for path, (kind, shape) in calls.items()
    ]


def _kernel(module: nn.Module) -> Any:
    return module.variables.get("params", {}).get("kernel")


def _output_shape(module: nn.Module, output: Any) -> tuple[int, ...]:
    *_, last = output if isinstance(output, tuple | list) else (output,)
    kernel = _kernel(module)
    # A dense layer's output may be in parts and padded.
    channels = last.shape[-1] if kernel is None else kernel.shape[-1]
    return (*last.shape[1:-1], channels)


def _own_macs(module: nn.Module, shape: tuple[int, ...]) -> int:
    kernel = _kernel(module)
    if kernel is not None:
        return math.prod(shape[:-1]) * math.prod(kernel.shape)
    if isinstance(module, SSM):
        return (4 * STATE + 2) * math.prod(shape)
    if isinstance(module, Attention):
        return 2 * shape[0] * math.prod(shape)
    return _NORM_MACS * math.prod(shape) if isinstance(module, LayerNorm) else 0


def count_total(model: nn.Module, input_shape: tuple[int, ...]) -> Layer:
    """Counts a whole network; arguments and errors as for `count_layers`."""
    return count_layers(model, input_shape)[0]


def attention_block_macs(width: int, tokens: int, mlp_ratio: int = 4) -> tuple[int, int]:
    """Counts the multiply-accumulates of a Transformer block: half the FLOPs of the paper's Eq. 6.

    FLOPs(block) = 24 D² L + 4 D L² for width D, L tokens and an MLP of ratio 4. Norms and softmax
    are not counted.

    Returns:
        The MACs linear in L (projections and MLP: 12 D² L), and those quadratic in L (the scores,
        and their product with the values: 2 D L²).
    """
    linear = (4 + 2 * mlp_ratio) * width**2 * tokens
    return linear, 2 * width * tokens**2


def long_sequence(width: int) -> int:
    """Returns the tokens above which the quadratic part is the larger one: 6 D (section 3)."""
    return 6 * width
