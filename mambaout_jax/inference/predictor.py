"""Classifies images with trained weights, on all devices of this machine.

predictor = Predictor.load("mambaout_tiny")
for prediction in predictor.predict_files(["cat.jpg", "dog.jpg"]):
    print(prediction.name, prediction.best[0].label)
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mambaout_jax.data.decoding import BadImageError
from mambaout_jax.data.preprocess import (
    Preprocessing,
    normalize,
    preprocess_image,
    read_image_file,
)
from mambaout_jax.errors import UserError
from mambaout_jax.labels import class_names
from mambaout_jax.models.mambaout import MambaOut, on_device
from mambaout_jax.runtime.compilation import compiler_options
from mambaout_jax.weights.info import WeightsInfo
from mambaout_jax.weights.load import read_weights

_THREADS = 16  # that read and decode files; Pillow decodes without the interpreter's lock


@dataclasses.dataclass(frozen=True)
class Guess:
    """One class of a prediction: its number, its name, and its probability in [0, 1]."""

    index: int
    label: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        name: of the image.
        best: the most probable classes, the best first; empty if the image cannot be decoded.
        error: why it cannot be decoded, else "".
    """

    name: str
    best: tuple[Guess, ...]
    error: str = ""


def forward(
    params: Any, images: jax.Array, *, model: MambaOut, preprocessing: Preprocessing
) -> jax.Array:
    """Returns float32 logits [N, classes] of preprocessed images, uint8 [N, H, W, 3]."""
    pixels = normalize(images, preprocessing.mean, preprocessing.std)
    logits: jax.Array = model.apply({"params": params}, pixels)  # type: ignore[assignment]
    return logits


class Predictor:
    """A compiled network with its weights, labels and preprocessing.

    All batches have the same shape, so that one program is compiled; the last one is padded. A
    batch is split over this machine's devices.

    Attributes:
        info: the description of the weights.
        labels: a name for each logit.
        batch_size: images per step: a multiple of the number of devices.
    """

    def __init__(
        self,
        model: MambaOut,
        params: Mapping[str, Any],
        info: WeightsInfo,
        *,
        batch_size: int = 64,
        top: int = 5,
        classes: Iterable[int] | None = None,
    ):
        """Copies the weights to the devices.

        Args:
            model: the network.
            params: its weights.
            info: the description of the weights.
            batch_size: images per step; rounded up to a multiple of the number of devices.
            top: number of classes in a prediction; all if there are fewer.
            classes: the only classes to predict; all if None.

        Raises:
            UserError: the weights have no classes, or a number is out of range.
        """
        info.check_task("classification", "use MaskPredictor, or predict --masks=DIR")
        if not info.num_classes:
            raise UserError("these weights have no classes to predict: expected some with a head")
        for name, number in (("batch size", batch_size), ("number of best classes", top)):
            if number < 1:
                raise UserError(f"the {name} is {number}: expected at least 1")
        self.info = info
        self.labels = class_names(info.class_names, info.num_classes)
        chosen = jnp.array(list(range(info.num_classes) if classes is None else classes), jnp.int32)
        mesh = Mesh(np.array(jax.local_devices()), ("batch",))
        model = on_device(model, mesh.devices.flat[0])
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._split = NamedSharding(mesh, P("batch"))
        self._weights: tuple[Any, ...] = (jax.device_put(params, NamedSharding(mesh, P())),)

        def best(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for the kernels
                logits = forward(params, images, model=model, preprocessing=info.preprocessing)
            probabilities = jax.nn.softmax(logits[:, chosen])
            values, places = jax.lax.top_k(probabilities, min(top, chosen.size))
            return values, chosen[places]

        function: Callable = best
        platform = mesh.devices.flat[0].platform
        if mesh.size == 1 and constants_pay(platform, self.batch_size, params):
            function, self._weights = functools.partial(best, *self._weights), ()
        options = compiler_options(platform, inference=True)
        self._best = jax.jit(function, out_shardings=self._split, compiler_options=options)

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        model: str | None = None,
        allow_non_finite: bool = False,
        dtype: Any = jnp.float32,
        **options: Any,
    ) -> "Predictor":
        """Reads weights as `mambaout_jax.read_weights` does, and compiles their network.

        Args:
            name_or_path: as in `read_weights`.
            model: as in `read_weights`.
            allow_non_finite: as in `read_weights`.
            dtype: of the computation.
            **options: of `Predictor`.

        Raises:
            UserError: there are no such weights.
        """
        params, info = read_weights(name_or_path, model=model, allow_non_finite=allow_non_finite)
        return cls(info.create_model(dtype=dtype), params, info, **options)

    def predict_images(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Classifies preprocessed images, uint8 [N, H, W, 3], N at most the batch size.

        Returns:
            The best classes' probabilities, float32 [N, top], and their numbers, int32 [N, top].
        """
        values, indices = self._dispatch(images)
        return np.asarray(values)[: len(images)], np.asarray(indices)[: len(images)]

    def predict_files(self, paths: Iterable[str | os.PathLike[str]]) -> Iterator[Prediction]:
        """Classifies files in order; the next batch is decoded while one is computed.

        The prediction of an image that cannot be read or decoded has an `error`.
        """
        readers = ((os.fspath(path), functools.partial(read_image_file, path)) for path in paths)
        for name, found in self.predict_encoded(readers):
            if isinstance(found, BadImageError):
                yield Prediction(name, (), str(found))
                continue
            guesses = zip(found[1].tolist(), found[0].tolist(), strict=True)
            best = tuple(Guess(index, self.labels[index], value) for index, value in guesses)
            yield Prediction(name, best)

    def predict_encoded(
        self, images: Iterable[tuple[str, Callable[[], bytes]]]
    ) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray] | BadImageError]]:
        """Classifies encoded images, given as a name and a function that reads the file's bytes.

        Yields:
            The name, and either the best classes' (probabilities [top], numbers [top]) or the error
            of an image that cannot be read or decoded.
        """
        pending: tuple[list, tuple] | None = None
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for chunk in _chunks(images, self.batch_size):
                prepared = list(pool.map(self._prepare, chunk))
                arrays = [image for _, image in prepared if isinstance(image, np.ndarray)]
                result: tuple = self._dispatch(np.stack(arrays)) if arrays else ((), ())
                if pending:
                    yield from _collect(*pending)
                pending = prepared, result
        if pending:
            yield from _collect(*pending)

    def _prepare(
        self, image: tuple[str, Callable[[], bytes]]
    ) -> tuple[str, np.ndarray | BadImageError]:
        name, read = image
        try:
            return name, preprocess_image(read(), self.info.preprocessing, name)
        except BadImageError as error:
            return name, error

    def _dispatch(self, images: np.ndarray) -> tuple[jax.Array, jax.Array]:
        padding = ((0, self.batch_size - len(images)), (0, 0), (0, 0), (0, 0))
        images = jax.device_put(np.pad(images, padding), self._split)
        return self._best(*self._weights, images)


def constants_pay(platform: str, images: int, params: Any) -> bool:
    """Returns whether a program of few images should have its weights as constants.

    On a GPU, passing hundreds of arrays takes longer than computing, and XLA rounds constants once;
    docs/performance.md has the figures. The weights must be at most 128 MiB, since the program has
    a copy.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return platform == "gpu" and images <= 32 and size <= 2**27


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _collect(prepared: list, result: tuple) -> Iterator[tuple[str, Any]]:
    """Pairs each image that was prepared with its row of the result."""
    rows = zip(*map(np.asarray, result), strict=True)
    for name, image in prepared:
        yield name, image if isinstance(image, BadImageError) else next(rows)


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Returns the files that are named, and the images in the folders that are named, sorted.

    Folders are searched recursively for files with an image's suffix that are not hidden. A file
    that is named needs no such suffix.

    Raises:
        UserError: there is no such file, it is not a regular file, or a folder holds no images.
    """
    from PIL import Image

    known = Image.registered_extensions()
    suffixes = {suffix for suffix, kind in known.items() if kind in Image.OPEN}
    found: list[Path] = []
    for path in (Path(path or "''") for path in paths):  # Path("") would be this folder
        if path.is_dir():
            images = [
                file
                for file in sorted(path.rglob("[!.]*"))
                if file.suffix.lower() in suffixes and file.is_file()
            ]
            if not images:
                raise UserError(f"the folder {path} holds no images: expected .jpg, .png, …")
            found += images
        elif path.is_file():
            found.append(path)
        elif path.exists():
            raise UserError(f"{path} is not a regular file: expected an image or a folder of them")
        else:
            raise UserError(f"there is no file {path}: expected an image or a folder of them")
    return found
