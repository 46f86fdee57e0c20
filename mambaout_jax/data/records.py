"""What every source of images gives: random access to encoded images with their labels."""

import abc
from typing import NotRequired, TypedDict

import numpy as np


class Record(TypedDict):
    """One image as it is stored."""

    image: bytes  # the encoded file
    # The class; int32 of the source's `label_shape`; or, for segmentation, the mask's encoded file.
    label: int | np.ndarray | bytes
    name: str  # of the file or record, for messages
    label_name: NotRequired[str]  # of the mask's file, for messages


class Source(abc.ABC):
    """A split of a dataset: `len(source)` records, `source[i]` one of them.

    Attributes:
      name: of the dataset and split, without this machine's paths.
      class_names: the classes in the order of their labels.
      label_shape: of each label; (K,) for lists of right classes, padded with -1.
    """

    name: str
    class_names: list[str]
    label_shape: tuple[int, ...] = ()

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    def name_of(self, index: int) -> str:
        """Returns the name of a record, for messages, without reading it."""
        return f"{self.name}[{index}]"
