"""Evaluation pixels: what the reference makes of a picture before it is normalised."""

import dataclasses

from mambaout_jax.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of R, G and B in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a network's input.

    Attributes:
      size: (height, width) of the input in pixels; one number stands for a square.
      crop_pct: the crop's part of the resized picture.
      crop_mode: "center" keeps the aspect and cuts what is too long; "squash" loses the aspect.
      interpolation: Pillow's filter, in lower case; antialiased.
      mean: subtracted from R, G and B in [0, 1].
      std: divides what the subtraction leaves.
    """

    size: tuple[int, int] | int = (224, 224)
    crop_pct: float = 1.0
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        if len(size) != 2 or min(size) < 1:
            raise UserError(f"The size is {self.size}; it is two positive numbers of pixels.")
        object.__setattr__(self, "size", size)
        if not self.crop_pct > 0:
            raise UserError(f"crop_pct is {self.crop_pct}; it is a positive fraction such as 0.95.")
        if self.crop_mode not in ("center", "squash"):
            raise UserError(f"crop_mode is {self.crop_mode!r}; it is 'center' or 'squash'.")
