"""The optimizers, out of optax, with layer-wise learning-rate decay for fine-tuning.

The paper's recipe uses AdamW.
"""

from typing import Any

import jax
import optax
from jax.tree_util import keystr

from mambaout_jax.weights.finetune import layer_scales

_NO_DECAY = ("a_log", "cls_token", "pos_embed")


def decay_mask(params: Any) -> Any:
    """Marks the parameters with weight decay: those of more than one axis, so no bias or scale.

    The decay rates of an SSM, `a_log`, have none either, as in Mamba, nor have a ViT's embeddings,
    as in timm.
    """

    def decays(path: Any, leaf: Any) -> bool:
        return leaf.ndim > 1 and keystr(path[-1:], simple=True) not in _NO_DECAY

    return jax.tree.map_with_path(decays, params)


# The root mean square of Muon's updates, divided by the learning rate. It is about that of AdamW's,
# so that both can use the same learning rate. Source: Liu et al., 2025, arXiv:2502.16982.
MUON_RMS = 0.2


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    name: str = "adamw",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """Returns an optimizer.

    Args:
        learning_rate: a number, or a function of the step.
        name: one of `OPTIMIZERS`.
        b1: decay of the first moment, of "sgd" and "muon" the momentum.
        b2: decay of the second moment, of "lion" of the momentum; "sgd" has none.
        eps: added to the root of the second moment; "sgd" and "lion" have none.
        weight_decay: of the parameters that `decay_mask` marks. Of "sgd" it is added to the
            gradients, as in torch; of the others it is decoupled.
        layer_decay: factor on the learning rate from one layer to the layer below it; 1: none.
        clip_norm: global norm that gradients are clipped to; 0: not clipped.
    """
    parts = [OPTIMIZERS[name](learning_rate, b1, b2, eps, weight_decay)]
    if clip_norm:
        parts.insert(0, optax.clip_by_global_norm(clip_norm))
    if layer_decay != 1:
        parts.append(scale_by_layer(layer_decay))
    return optax.chain(*parts)


def _adamw(
    rate: optax.ScalarOrSchedule, b1: float, b2: float, eps: float, decay: float
) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay, mask=decay_mask)


def _lamb(
    rate: optax.ScalarOrSchedule, b1: float, b2: float, eps: float, decay: float
) -> optax.GradientTransformation:
    return optax.lamb(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay, mask=decay_mask)


def _lion(
    rate: optax.ScalarOrSchedule, b1: float, b2: float, eps: float, decay: float
) -> optax.GradientTransformation:
    del eps
    return optax.lion(rate, b1=b1, b2=b2, weight_decay=decay, mask=decay_mask)


def _muon(
    rate: optax.ScalarOrSchedule, b1: float, b2: float, eps: float, decay: float
) -> optax.GradientTransformation:
    """Muon for the matrices of hidden layers, AdamW for all other parameters."""
    muon = optax.contrib.muon(rate, beta=b1, eps=eps, weight_decay=decay, consistent_rms=MUON_RMS)
    return optax.partition({"muon": muon, "adamw": _adamw(rate, b1, b2, eps, decay)}, muon_labels)


def muon_labels(params: Any) -> Any:
    """Labels the kernels of dense layers "muon", those of the last layer and the rest "adamw"."""

    def label(path: Any, leaf: Any) -> str:
        name = keystr(path, simple=True, separator="/")
        hidden = name.endswith("/kernel") and not name.endswith("head/fc2/kernel")
        return "muon" if hidden and leaf.ndim == 2 else "adamw"

    return jax.tree.map_with_path(label, params)


def _sgd(
    rate: optax.ScalarOrSchedule, b1: float, b2: float, eps: float, decay: float
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum."""
    del b2, eps
    sgd = optax.sgd(rate, momentum=b1, nesterov=True)
    return optax.chain(optax.add_decayed_weights(decay, decay_mask), sgd)


OPTIMIZERS = {"adamw": _adamw, "lamb": _lamb, "lion": _lion, "muon": _muon, "sgd": _sgd}


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Scales updates by decay ** (number of layers above the parameter's layer)."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda update, scale: update * scale, updates, layer_scales(params, decay)
        )
    )
