"""Evaluation: each image of a split exactly once, for any batch size and number of devices.

One engine serves the evaluation between epochs, `--mode=eval` and the command `validate`.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mambaout_jax.data.preprocess import normalize
from mambaout_jax.models.mambaout import MambaOut, on_device
from mambaout_jax.runtime.compilation import compiler_options
from mambaout_jax.runtime.sharding import BATCH, global_batch, over_mesh

Sums = dict[str, Any]  # floats, or arrays of float64, which count exactly up to 2**53
# The results that a person is shown, in words, all in percent.
NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "miou": "mIoU",
    "macc": "mean accuracy",
    "aacc": "pixel accuracy",
}
TOP = 5  # With so few classes or fewer, this accuracy is always 100%, and is left out.


class StoppedError(Exception):
    """An evaluation was stopped before its end."""


def eval_step(
    params: Any,
    batch: dict[str, jax.Array],
    *,
    model: MambaOut,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    classes: Sequence[int] | None = None,
) -> dict[str, jax.Array]:
    """Evaluates one batch.

    Args:
        params: parameters of the model.
        batch: "image" uint8 [N, H, W, 3]; "mask" bool [N], False for padding; "label" int32, [N]
            or, for images with several right classes, [N, K] padded with -1. An image without a
            right class is not counted.
        model: the network.
        mean: of R, G and B in [0, 1].
        std: of R, G and B in [0, 1].
        classes: the only classes that may be predicted, the labels among them; None: all.

    Returns:
        Sums over the counted images: "loss" (float32; minus the log of the probability of all
        right classes), and as int32 "top1", "top5" (with more than five classes) and "examples".
    """
    images = normalize(batch["image"], mean, std)
    logits = jnp.asarray(model.apply({"params": params}, images))
    choice = logits.shape[-1]
    if classes is not None:
        allowed = np.isin(np.arange(choice), classes)[None]
        logits, choice = jnp.where(allowed, logits, -jnp.inf), len(classes)
    labels = batch["label"].reshape(len(logits), -1)
    valid = labels >= 0
    counted = batch["mask"] & valid.any(axis=1)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0), axis=1)
    losses = -jax.nn.logsumexp(jnp.where(valid, log_probs, -jnp.inf), axis=1)
    _, best = jax.lax.top_k(logits, TOP if choice > TOP else 1)
    hits = (best[:, :, None] == labels[:, None, :]).any(axis=2) & counted[:, None]
    sums = {
        "loss": jnp.where(counted, losses, 0).sum(),
        "top1": hits[:, 0].sum(dtype=jnp.int32),
        "examples": counted.sum(dtype=jnp.int32),
    }
    if choice > TOP:
        sums["top5"] = hits.any(axis=1).sum(dtype=jnp.int32)
    return sums


def compile_eval_step(
    model: MambaOut,
    shardings: Any,
    mesh: Mesh,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    step: Callable[..., dict[str, jax.Array]] = eval_step,
    **options: Any,
) -> jax.stages.Wrapped:
    """Returns a jitted step of evaluation over the mesh.

    Args:
        model: the network.
        shardings: of the parameters.
        mesh: of the devices.
        mean: of R, G and B in [0, 1].
        std: of R, G and B in [0, 1].
        step: `eval_step`, or that of another task.
        **options: of the step, such as `classes`.
    """
    device = mesh.devices.flat[0]
    model = on_device(model, device)
    return jax.jit(
        over_mesh(step, mesh, model=model, mean=mean, std=std, **options),
        in_shardings=(shardings, NamedSharding(mesh, BATCH)),
        out_shardings=NamedSharding(mesh, P()),
        compiler_options=compiler_options(device.platform, inference=True),
    )


def accumulate(
    eval_step: Callable[..., dict[str, jax.Array]],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Sums:
    """Returns the sums of `eval_step` over all batches.

    The arguments and errors are those of `evaluate`. The host reads the sums of a step after it
    has started the next one.
    """
    totals: Sums = collections.defaultdict(float)
    running: collections.deque[dict[str, jax.Array]] = collections.deque()

    def read() -> None:
        for name, value in jax.device_get(running.popleft()).items():
            totals[name] += value.item() if value.ndim == 0 else value.astype(np.float64)

    for batch in batches:
        if stop_requested():
            raise StoppedError
        running.append(eval_step(params, global_batch(batch, mesh)))
        if len(running) > 1:
            read()
    while running:
        read()
    return dict(totals)


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Returns "loss", "top1" and "top5" (in percent) and "examples" of sums over at least one."""
    examples = int(sums["examples"])
    percent = {key: 100 * sums[key] / examples for key in ("top1", "top5") if key in sums}
    return {"loss": sums["loss"] / examples, **percent, "examples": examples}


def evaluate(
    eval_step: Callable[..., dict[str, jax.Array]],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    stop_requested: Callable[[], bool] = lambda: False,
    results: Callable[[Sums], dict[str, float]] = means,
) -> dict[str, float]:
    """Evaluates a whole split.

    Args:
        eval_step: compiled over `mesh`.
        params: parameters on the mesh.
        batches: this process's part of each batch, padding masked.
        mesh: of the devices.
        stop_requested: called before each batch, the same number of times in every process.
        results: of the sums over all batches, see `Measures`.

    Returns:
        The results: of classification "loss", "top1" and "top5" (in percent) and "examples". With
        five classes or fewer there is no "top5".

    Raises:
        StoppedError: a stop was requested.
    """
    return results(accumulate(eval_step, params, batches, mesh, stop_requested))


def describe(results: Mapping[str, float], digits: int) -> str:
    """Returns the accuracies in words, such as "top-1 82.74%, top-5 96.17%"."""
    return ", ".join(
        f"{name} {results[key]:.{digits}f}%" for key, name in NAMES.items() if key in results
    )


@dataclasses.dataclass(frozen=True)
class Measures:
    """How a task is evaluated.

    Attributes:
        step: parameters and a batch to sums over the batch, with the arguments of `eval_step`.
        results: the sums over all batches to the results, by name.
        columns: of metrics.csv, each with the name of its result.
    """

    step: Callable[..., dict[str, jax.Array]]
    results: Callable[[Sums], dict[str, float]]
    columns: Mapping[str, str]


CLASSES = Measures(eval_step, means, {"eval_loss": "loss", "top1": "top1", "top5": "top5"})
