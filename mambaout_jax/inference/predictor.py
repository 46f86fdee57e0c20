"""Classifying pictures with trained weights, over all devices of this machine.

predictor = Predictor.load("mambaout_tiny.in1k")
for prediction in predictor.predict_files(["cat.jpg", "dog.jpg"]):
    print(prediction.name, prediction.best[0].label)
"""

import concurrent.futures
import dataclasses
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
from mambaout_jax.data.preprocess import Preprocessing, normalize, preprocess_image
from mambaout_jax.errors import UserError
from mambaout_jax.labels import class_names
from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.runtime.compilation import compiler_options
from mambaout_jax.weights.load import read_weights
from mambaout_jax.weights.store import WeightsInfo

_THREADS = 16  # that read and decode; Pillow lets them run side by side


@dataclasses.dataclass(frozen=True)
class Guess:
    """One class that a picture may show: its number, its name, and the probability in [0, 1]."""

    index: int
    label: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network says of one picture.

    Attributes:
        name: of the picture.
        best: the likeliest classes, the best first; empty where the picture cannot be decoded.
        error: why it cannot be decoded, else "".
    """

    name: str
    best: tuple[Guess, ...]
    error: str = ""


def forward(
    params: Any, images: jax.Array, *, model: MambaOut, preprocessing: Preprocessing
) -> jax.Array:
    """Returns float32 logits [N, classes] of prepared pictures, uint8 [N, H, W, 3]."""
    pixels = normalize(images, preprocessing.mean, preprocessing.std)
    logits: jax.Array = model.apply({"params": params}, pixels)  # type: ignore[assignment]
    return logits


class Predictor:
    """A compiled network with its weights, labels and preprocessing.

    Every batch has the same shape, so that one program is compiled; the last one is padded. A batch
    is split over this machine's devices.

    Attributes:
        info: what the weights are.
        labels: a name for each logit.
        batch_size: pictures a step: a multiple of the number of devices.
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
        """Puts the weights on the devices.

        Args:
            model: the network.
            params: its weights.
            info: what they are.
            batch_size: pictures a step; rounded up to a multiple of the number of devices.
            top: how many classes to tell of each picture; all where there are fewer.
            classes: the only ones to choose from; all where it is None.

        Raises:
            UserError: when the weights have no classes, or a number is out of range.
        """
        if not info.num_classes:
            raise UserError("these weights have no classes to predict: expected some with a head")
        for name, number in (("batch size", batch_size), ("number of best classes", top)):
            if number < 1:
                raise UserError(f"the {name} is {number}: expected at least 1")
        self.info = info
        self.labels = class_names(info.class_names, info.num_classes)
        chosen = jnp.array(list(range(info.num_classes) if classes is None else classes), jnp.int32)
        mesh = Mesh(np.array(jax.local_devices()), ("batch",))
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._split = NamedSharding(mesh, P("batch"))
        self._params = jax.device_put(params, NamedSharding(mesh, P()))

        def best(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the TPU kernels ask for it
                logits = forward(params, images, model=model, preprocessing=info.preprocessing)
            chances = jax.nn.softmax(logits[:, chosen])
            values, places = jax.lax.top_k(chances, min(top, chosen.size))
            return values, chosen[places]

        options = compiler_options(mesh.devices.flat[0].platform)
        self._best = jax.jit(best, out_shardings=self._split, compiler_options=options)

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        model: str | None = None,
        dtype: Any = jnp.float32,
        **options: Any,
    ) -> "Predictor":
        """Reads weights, as `mambaout_jax.read_weights` does, and compiles their network.

        Args:
            name_or_path: a name of the hub's, a torch file, or a checkpoint.
            model: the variant, where a file's weights do not tell it.
            dtype: of the computation.
            **options: as those of `Predictor`.

        Raises:
            UserError: when there are no such weights.
        """
        params, info = read_weights(name_or_path, model=model)
        return cls(info.create_model(dtype=dtype), params, info, **options)

    def predict_images(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Classifies prepared pictures, uint8 [N, H, W, 3], N at most the batch size.

        Returns:
            The best classes' probabilities, float32 [N, top], and their numbers, int32 [N, top].
        """
        values, indices = self._dispatch(images)
        return np.asarray(values)[: len(images)], np.asarray(indices)[: len(images)]

    def predict_files(self, paths: Iterable[str | os.PathLike[str]]) -> Iterator[Prediction]:
        """Classifies files, in their order; the next batch is decoded while one is computed.

        A picture that cannot be read or decoded is told by its prediction's `error`.
        """
        readers = ((os.fspath(path), Path(path).read_bytes) for path in paths)
        for name, found in self.predict_encoded(readers):
            if isinstance(found, UserError):
                yield Prediction(name, (), str(found))
                continue
            guesses = zip(found[1].tolist(), found[0].tolist(), strict=True)
            best = tuple(Guess(index, self.labels[index], value) for index, value in guesses)
            yield Prediction(name, best)

    def predict_encoded(
        self, pictures: Iterable[tuple[str, Callable[[], bytes]]]
    ) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray] | UserError]]:
        """Classifies encoded pictures: pairs of a name and a function that reads the file's bytes.

        Yields:
            The name, and the best classes' (probabilities [top], numbers [top]) or what is wrong
            with the picture.
        """
        pending: tuple[list, tuple] | None = None
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for chunk in _chunks(pictures, self.batch_size):
                prepared = list(pool.map(self._prepare, chunk))
                images = [image for _, image in prepared if isinstance(image, np.ndarray)]
                result: tuple = self._dispatch(np.stack(images)) if images else ((), ())
                if pending:
                    yield from _collect(*pending)
                pending = prepared, result
        if pending:
            yield from _collect(*pending)

    def _prepare(
        self, picture: tuple[str, Callable[[], bytes]]
    ) -> tuple[str, np.ndarray | UserError]:
        name, read = picture
        try:
            return name, preprocess_image(read(), self.info.preprocessing, name)
        except BadImageError as error:
            return name, error
        except OSError as error:
            return name, UserError(f"{name} cannot be read: {error.strerror}")

    def _dispatch(self, images: np.ndarray) -> tuple[jax.Array, jax.Array]:
        padding = ((0, self.batch_size - len(images)), (0, 0), (0, 0), (0, 0))
        return self._best(self._params, jax.device_put(np.pad(images, padding), self._split))


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _collect(prepared: list, result: tuple) -> Iterator[tuple[str, Any]]:
    """Pairs each picture that was prepared with its row of the answer."""
    rows = zip(*map(np.asarray, result), strict=True)
    for name, image in prepared:
        yield name, image if isinstance(image, UserError) else next(rows)


def find_pictures(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Returns the files named, and the pictures in the folders named and in those below, sorted.

    In a folder the suffix tells a picture, and hidden files are left out; a file that is named is
    taken whatever its suffix.

    Raises:
        UserError: when there is no such file, or a folder holds no pictures.
    """
    from PIL import Image

    known = Image.registered_extensions()
    suffixes = {suffix for suffix, kind in known.items() if kind in Image.OPEN}
    found: list[Path] = []
    for path in (Path(path or "''") for path in paths):  # Path("") would be this folder
        if path.is_dir():
            pictures = [
                file
                for file in sorted(path.rglob("[!.]*"))
                if file.suffix.lower() in suffixes and file.is_file()
            ]
            if not pictures:
                raise UserError(f"the folder {path} holds no pictures: expected .jpg, .png, …")
            found += pictures
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"there is no file {path}: expected pictures or folders of them")
    return found
