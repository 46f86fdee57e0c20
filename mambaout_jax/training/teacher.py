"""The teacher of a distillation: any weights of a classifier, or an exported network."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mambaout_jax.errors import UserError
from mambaout_jax.inference.exported import ExportedNetwork, read_exported
from mambaout_jax.labels import class_names
from mambaout_jax.models.mambaout import MambaOut, on_device
from mambaout_jax.runtime.memory import host_memory_for, memory_for
from mambaout_jax.weights.load import read_weights

Triple = Sequence[float]  # of R, G and B


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A network that is not trained.

    Attributes:
        name: of its weights.
        params: numpy arrays; each device has a copy of all.
        logits: of `params` and the run's inputs, float32 [N, H, W, 3]: float32 [N, classes].
    """

    name: str
    params: Any
    logits: Callable[[Any, jax.Array], jax.Array]


def read_teacher(
    name: str,
    *,
    classes: Sequence[str],
    image_size: int,
    mean: Triple,
    std: Triple,
    dtype: str,
    device: jax.Device,
) -> Teacher:
    """Reads a teacher.

    It sees the images of the run, mixed and erased like them, with its own normalisation. An
    exported network takes pixels, to which they are rounded and clipped.

    Args:
        name: weights as `read_weights` takes them, or an exported network, whose name ends in .zip.
        classes: names of the run's classes.
        image_size: side of the run's images in pixels.
        mean: of the run's normalisation.
        std: of the run's normalisation.
        dtype: of a network's computation; an exported one has its own.
        device: one of those that it runs on.

    Raises:
        UserError: it cannot be read, has other classes, does not take images of this size, or does
            not fit into memory.
    """
    with memory_for_teacher(name):
        params: Any
        if name.endswith(".zip"):
            exported = read_exported(name)
            _check_classes(name, exported.labels, len(exported.labels), classes)
            if exported.shape[:2] != (image_size, image_size):
                height, width = exported.shape[:2]
                raise UserError(
                    f"the teacher {name} takes images of {height}x{width} pixels: expected "
                    f"--config.data.image_size={height}, not {image_size}"
                )
            params = exported.weights
            logits = functools.partial(_exported_logits, exported=exported, mean=mean, std=std)
        else:
            params, info = read_weights(name)
            info.check_task("classification", "expected a classifier as the teacher")
            _check_classes(name, info.class_names, info.num_classes, classes)
            model = on_device(info.create_model(dtype=jnp.dtype(dtype)), device)
            theirs = info.preprocessing
            scale = tuple(ours / own for ours, own in zip(std, theirs.std, strict=True))
            shift = tuple(
                (ours - own) / by
                for ours, own, by in zip(mean, theirs.mean, theirs.std, strict=True)
            )
            logits = functools.partial(_logits, model=model, scale=scale, shift=shift)
        images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
        try:
            jax.eval_shape(logits, params, images)
        except UserError as error:
            raise UserError(f"the teacher {name}: {error}") from None
        return Teacher(name, params, logits)


@contextlib.contextmanager
def memory_for_teacher(name: str) -> Iterator[None]:
    """Turns an error about memory into a sentence about the teacher, as `memory_for` does."""

    def message(reason: str) -> str:
        return f"the teacher {name} does not fit into memory ({reason}): expected a smaller one"

    with host_memory_for(message), memory_for(message):
        yield


def _check_classes(
    name: str, names: Sequence[str] | None, num_classes: int, classes: Sequence[str]
) -> None:
    if num_classes != len(classes):
        raise UserError(
            f"the teacher {name} has {num_classes} classes, and the data {len(classes)}: expected "
            "a teacher of the same classes"
        )
    if names is None:
        return
    ours, theirs = (class_names(each, num_classes) for each in (classes, names))
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            raise UserError(
                f"class {index} of the teacher {name} is {their!r}, and of the data {our!r}: "
                "expected a teacher of the same classes in the same order"
            )


def _logits(
    params: Any, images: jax.Array, *, model: MambaOut, scale: Triple, shift: Triple
) -> jax.Array:
    if (scale, shift) != ((1.0,) * 3, (0.0,) * 3):
        by, to = (jnp.array(each).reshape(1, 1, 1, 3) for each in (scale, shift))
        images = images * by + to
    return jnp.asarray(model.apply({"params": params}, images))


def _exported_logits(
    weights: Any, images: jax.Array, *, exported: ExportedNetwork, mean: Triple, std: Triple
) -> jax.Array:
    shift, scale = (255 * jnp.array(each).reshape(1, 1, 1, 3) for each in (mean, std))
    pixels = jnp.clip(jnp.round(images * scale + shift), 0, 255).astype(jnp.uint8)
    return exported.program.call(weights, pixels)
