"""The variants of the network: one table."""

import dataclasses

from mambaout_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Variant:
    """Options of a variant, and its published figures.

    Attributes:
        depths: blocks of each stage.
        widths: channels of each stage.
        params: parameters with 1000 classes.
        top1_224: published ImageNet top-1 in percent at 224 pixels; None if there is none.
        top1_288: the same at 288 pixels.
        expansion_ratio: hidden channels of a block, relative to its width.
        conv_ratio: convolved channels of a block, relative to its width.
        act: activation of stem and blocks, "gelu" or "silu".
        rw: whether it is of timm's `_rw` series.
        image_size: of training and evaluation, in pixels.
        crop_pct: side of the evaluation crop, relative to the short side of the resized image.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    params: int
    top1_224: float | None = None
    top1_288: float | None = None
    expansion_ratio: float = 8 / 3
    conv_ratio: float = 1.0
    act: str = "gelu"
    rw: bool = False
    image_size: int = 224
    crop_pct: float = 1.0


VARIANTS: dict[str, Variant] = {
    "mambaout_femto": Variant((3, 3, 9, 3), (48, 96, 192, 288), 7_304_536, 78.880, 79.912),
    "mambaout_kobe": Variant((3, 3, 15, 3), (48, 96, 192, 288), 9_141_208, 79.986, 81.064),
    "mambaout_tiny": Variant((3, 3, 9, 3), (96, 192, 384, 576), 26_545_096, 82.742, 83.452),
    "mambaout_small": Variant((3, 4, 27, 3), (96, 192, 384, 576), 48_488_072, 84.094, 84.512),
    "mambaout_base": Variant((3, 4, 27, 3), (128, 256, 512, 768), 84_813_092, 84.194, 84.730),
    "mambaout_small_rw": Variant(
        (3, 4, 27, 3), (96, 192, 384, 576), 48_495_560, 84.040, 84.604, rw=True
    ),
    "mambaout_base_short_rw": Variant(
        (3, 3, 25, 3), (128, 256, 512, 768), 88_827_688, 84.364, 84.842, 3.0, 1.25, rw=True,
        crop_pct=0.95,
    ),
    "mambaout_base_tall_rw": Variant(
        (3, 4, 30, 3), (128, 256, 512, 768), 86_481_448, 84.436, 84.988, 2.5, 1.25, rw=True,
        crop_pct=0.95,
    ),
    "mambaout_base_wide_rw": Variant(
        (3, 4, 27, 3), (128, 256, 512, 768), 94_448_104, 84.448, 84.966, 3.0, 1.5, "silu", rw=True,
        crop_pct=0.95,
    ),
    "mambaout_base_plus_rw": Variant(
        (3, 4, 30, 3), (128, 256, 512, 768), 101_656_552, 86.642, 86.916, 3.0, 1.5, "silu", rw=True
    ),
    "test_mambaout": Variant(
        (1, 1, 3, 1), (16, 32, 48, 64), 447_560, None, None, 3.0, 1.0, "silu", rw=True,
        image_size=160,
    ),
}  # fmt: skip


def list_models() -> list[str]:
    """Returns the names of all variants, the paper's five first."""
    return list(VARIANTS)


def find_variant(name: str) -> Variant:
    """Returns a variant by name.

    Raises:
        UserError: when there is no such variant; the message lists them.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    raise UserError(
        f"unknown model {name!r}{did_you_mean(name, VARIANTS)} (known: {', '.join(VARIANTS)})"
    )
