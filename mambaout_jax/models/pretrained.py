"""The weights that have a name, on the hub or in this package, and their preprocessing."""

import dataclasses

from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.errors import UserError, did_you_mean
from mambaout_jax.models.upernet import PREFIX
from mambaout_jax.models.variants import VARIANTS, find_variant
from mambaout_jax.models.vit import VITS

HUB_OWNER = "timm"  # of the repositories, one for each entry of PRETRAINED
HUB_FILE = "model.safetensors"  # in each repository
EMBEDDED = "test_mambaout.digits"  # the weights that ship with the package


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """One set of weights with a name.

    Attributes:
        variant: of the network.
        preprocessing: of evaluation.
        num_classes: width of the logits.
        top1: the published ImageNet-1k accuracy in percent with this preprocessing; None for other
            classes.
        class_names: a name for each logit; None if they are not stored here.
        file: in mambaout_jax/weights, of weights that ship with the package; "": on the hub.
    """

    variant: str
    preprocessing: Preprocessing
    num_classes: int = 1000
    top1: float | None = None
    class_names: tuple[str, ...] | None = None
    file: str = ""


def variant_preprocessing(name: str) -> Preprocessing:
    """Returns the evaluation preprocessing of a network at its default size."""
    if name in VITS:  # as timm's weights of these names have it
        half = (0.5, 0.5, 0.5)
        return Preprocessing(crop_pct=0.9, mean=half, std=half)
    if name.startswith(PREFIX):  # the whole image, its short side of this size
        find_variant(name.removeprefix(PREFIX))
        return Preprocessing(size=512)
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
    EMBEDDED: Pretrained(
        "test_mambaout",
        Preprocessing(size=32),
        num_classes=10,
        class_names=tuple("0123456789"),
        file="digits.safetensors",
    ),
}
# The weights of a variant's name alone. They are timm's default tags.
DEFAULT_TAGS: dict[str, str] = {
    "mambaout_femto": "mambaout_femto.in1k",
    "mambaout_kobe": "mambaout_kobe.in1k",
    "mambaout_tiny": "mambaout_tiny.in1k",
    "mambaout_small": "mambaout_small.in1k",
    "mambaout_base": "mambaout_base.in1k",
    "mambaout_small_rw": "mambaout_small_rw.sw_e450_in1k",
    "mambaout_base_short_rw": "mambaout_base_short_rw.sw_e500_in1k",
    "mambaout_base_tall_rw": "mambaout_base_tall_rw.sw_e500_in1k",
    "mambaout_base_wide_rw": "mambaout_base_wide_rw.sw_e500_in1k",
    "mambaout_base_plus_rw": "mambaout_base_plus_rw.sw_e150_in12k_ft_in1k",
}


def list_pretrained() -> list[str]:
    """Returns the names of the weights that `load_pretrained` takes."""
    return list(PRETRAINED)


def find_pretrained(name: str) -> Pretrained:
    """Returns the record of weights with a name; `name` may start with the owner, "timm/".

    Raises:
        UserError: the name is unknown; lists the known ones.
    """
    name = name.removeprefix(f"{HUB_OWNER}/")
    if name in PRETRAINED:
        return PRETRAINED[name]
    hint = did_you_mean(name, PRETRAINED)
    raise UserError(f"unknown pretrained weights {name!r}{hint} (known: {', '.join(PRETRAINED)})")


def preprocessing(name: str) -> Preprocessing:
    """Returns the evaluation preprocessing of a variant or of published weights.

    Raises:
        UserError: the name is unknown.
    """
    has_tag = "." in name
    return find_pretrained(name).preprocessing if has_tag else variant_preprocessing(name)
