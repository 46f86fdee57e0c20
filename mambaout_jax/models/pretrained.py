"""The published weights on the Hugging Face hub, and the preprocessing that belongs to a name."""

import dataclasses

from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.errors import UserError, did_you_mean
from mambaout_jax.models.variants import VARIANTS, find_variant

HUB_OWNER = "timm"  # of the repositories, one for each entry of PRETRAINED
HUB_FILE = "model.safetensors"  # in each repository


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """One set of published weights.

    `top1` is the published accuracy in percent on ImageNet-1k with this very preprocessing, None
    where the classes are others.
    """

    variant: str
    preprocessing: Preprocessing
    num_classes: int = 1000
    top1: float | None = None


def variant_preprocessing(name: str) -> Preprocessing:
    """Returns the evaluation preprocessing of a variant at its own size."""
    variant = find_variant(name)
    return Preprocessing(size=variant.image_size, crop_pct=variant.crop_pct)


def _published(variant: str) -> Pretrained:
    return Pretrained(variant, variant_preprocessing(variant), top1=VARIANTS[variant].top1_224)


_PLUS = "mambaout_base_plus_rw"

PRETRAINED: dict[str, Pretrained] = {
    "mambaout_femto.in1k": _published("mambaout_femto"),
    "mambaout_kobe.in1k": _published("mambaout_kobe"),
    "mambaout_tiny.in1k": _published("mambaout_tiny"),
    "mambaout_small.in1k": _published("mambaout_small"),
    "mambaout_base.in1k": _published("mambaout_base"),
    "mambaout_small_rw.sw_e450_in1k": _published("mambaout_small_rw"),
    "mambaout_base_short_rw.sw_e500_in1k": _published("mambaout_base_short_rw"),
    "mambaout_base_tall_rw.sw_e500_in1k": _published("mambaout_base_tall_rw"),
    "mambaout_base_wide_rw.sw_e500_in1k": _published("mambaout_base_wide_rw"),
    "mambaout_base_plus_rw.sw_e150_in12k_ft_in1k": _published(_PLUS),
    "mambaout_base_plus_rw.sw_e150_r384_in12k_ft_in1k": Pretrained(
        _PLUS, Preprocessing(size=384, crop_mode="squash"), top1=87.508
    ),
    "mambaout_base_plus_rw.sw_e150_in12k": Pretrained(
        _PLUS, variant_preprocessing(_PLUS), num_classes=11_821
    ),
}


def list_pretrained() -> list[str]:
    """Returns the names that `load_pretrained` fetches from the hub."""
    return list(PRETRAINED)


def find_pretrained(name: str) -> Pretrained:
    """Returns what is known of the hub's weights `name`; the owner "timm/" may stand before it.

    Raises:
        UserError: when there are none of that name, with the nearest and the known ones.
    """
    name = name.removeprefix(f"{HUB_OWNER}/")
    if name in PRETRAINED:
        return PRETRAINED[name]
    hint = did_you_mean(name, PRETRAINED)
    raise UserError(f"unknown pretrained weights {name!r}{hint} (known: {', '.join(PRETRAINED)})")


def preprocessing(name: str) -> Preprocessing:
    """Returns the evaluation preprocessing of a variant, or of the hub's weights of that name.

    Raises:
        UserError: when the name is neither.
    """
    has_tag = "." in name
    return find_pretrained(name).preprocessing if has_tag else variant_preprocessing(name)
