"""The activations in Triton's kernels."""

import math

import triton
import triton.language as tl

from mambaout_jax.ops.activations import TANH_COEFFICIENTS

# The factor makes exp(-2 y) of tanh's argument y a power of 2.
_P_5, _P_4, _P_3, _P_2, _P_1, _P_0 = (
    tl.constexpr(-2 / math.log(2) * coefficient) for coefficient in TANH_COEFFICIENTS
)
_DENSITY = tl.constexpr(-0.5 / math.log(2))


@triton.jit
def activation(x, act: tl.constexpr, exact: tl.constexpr):
    """Returns the activation of float32 x, "gelu" or "silu", and its derivative.

    Where it is not exact, the error is that of `activations.ACTIVATIONS_NEAR`.
    """
    if act == "gelu":
        square = x * x
        if exact:
            factor = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        else:
            bounded = tl.minimum(square, 16.0)
            polynomial = bounded * _P_5 + _P_4
            polynomial = polynomial * bounded + _P_3
            polynomial = polynomial * bounded + _P_2
            polynomial = polynomial * bounded + _P_1
            polynomial = polynomial * bounded + _P_0
            # (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y)); a division takes more operations.
            root = tl.rsqrt(1 + tl.exp2(x * polynomial))
            factor = root * root
        slope = factor + x * tl.exp2(square * _DENSITY) * 0.3989422804014327
    else:
        factor = tl.sigmoid(x)
        slope = factor * (1 + x * (1 - factor))
    return x * factor, slope
