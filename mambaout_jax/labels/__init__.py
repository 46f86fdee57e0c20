"""Names of classes: those of the weights, or ImageNet-1k's."""

import functools
from collections.abc import Sequence
from importlib import resources

IMAGENET_CLASSES = 1000


@functools.cache
def _imagenet() -> tuple[tuple[str, str], ...]:
    text = resources.files(__name__).joinpath("imagenet_classes.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines())
    return tuple((wordnet_id, name) for _, wordnet_id, name in rows)


def imagenet_names() -> tuple[str, ...]:
    """Returns the names of ImageNet-1k's 1000 classes, in the order of the logits."""
    return tuple(name for _, name in _imagenet())


def imagenet_wordnet_ids() -> tuple[str, ...]:
    """Returns the WordNet ids of ImageNet-1k's classes, such as "n01440764"."""
    return tuple(wordnet_id for wordnet_id, _ in _imagenet())


def imagenet_subset(name: str) -> tuple[int, ...]:
    """Returns the 200 classes of ImageNet-A ("imagenet_a") or ImageNet-R ("imagenet_r").

    Source: the folders of the two datasets, as timm lists them.
    """
    text = resources.files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
    return tuple(imagenet_wordnet_ids().index(wordnet_id) for wordnet_id in text.split())


def class_names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Returns a name for each logit.

    Args:
        names: the names in the weights' description, or None. WordNet ids of ImageNet-1k, which the
            dataset and folders have as names, are replaced by words.
        num_classes: width of the logits.

    Returns:
        The weights' names; else ImageNet-1k's if there are 1000 classes; else "class 0", ….
    """
    if names is not None:
        words = dict(_imagenet())
        return tuple(words.get(name, name) for name in names)
    if num_classes == IMAGENET_CLASSES:
        return imagenet_names()
    return tuple(f"class {index}" for index in range(num_classes))
