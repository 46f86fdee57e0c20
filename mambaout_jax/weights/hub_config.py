"""config.json of a repository on the hub, in timm's form."""

from collections.abc import Mapping
from typing import Any

from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.errors import UserError, first_line
from mambaout_jax.models.variants import VARIANTS
from mambaout_jax.weights.info import WeightsInfo

CONFIG_FILE = "config.json"
INFO_FILE = "mambaout_jax.json"  # beside it: the record of `WeightsInfo`

# Fields of MambaOut and timm's arguments of the same meaning.
_ARGUMENTS = {
    "depths": "depths",
    "widths": "dims",
    "conv_ratio": "conv_ratio",
    "expansion_ratio": "expansion_ratio",
    "kernel_size": "kernel_size",
}
# Fields that do not change what a network computes, and timm's arguments for training.
_NO_ARGUMENTS = ("depthwise", "dtype", "fused_gpu", "fused_vmem", "gradient_dtype", "remat")
_IGNORED = ("drop_path_rate", "drop_rate", "num_classes")


def to_timm(info: WeightsInfo) -> dict[str, Any]:
    """Returns timm's config.json of weights.

    Raises:
        UserError: timm has no such network.
    """
    if info.model not in VARIANTS:
        raise UserError(f"{info.model} is not a MambaOut: expected one of {', '.join(VARIANTS)}")
    if not info.num_classes:
        raise UserError(
            f"these weights of {info.model} have no classes, and timm's network without classes "
            "has a part of the head: expected weights with a head"
        )
    arguments = {}
    for field, value in info.overrides.items():
        if field in _ARGUMENTS:
            arguments[_ARGUMENTS[field]] = value
        elif field not in _NO_ARGUMENTS:
            raise UserError(
                f"timm's {info.model} has no option for {field}={value!r}: expected a network that "
                f"differs from the variant in {', '.join(_ARGUMENTS)} alone"
            )
    preprocessing = info.preprocessing
    height, width = preprocessing.shape
    config: dict[str, Any] = {
        "architecture": info.model,
        "num_classes": info.num_classes,
        "num_features": info.create_model().widths[-1],
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, height, width],
            "fixed_input_size": False,
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop_pct,
            "crop_mode": preprocessing.crop_mode,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": info.num_classes,
            "pool_size": [-(-height // 32), -(-width // 32)],
            "first_conv": "stem.conv1",
            "classifier": "head.fc",
        },
    }
    if info.class_names:
        config["label_names"] = list(info.class_names)
    if arguments:
        config["model_args"] = arguments
    return config


def from_timm(config: Mapping[str, Any], source: str) -> WeightsInfo:
    """Returns the description of weights that timm's config.json belongs to.

    Args:
        config: the JSON; timm's older form without "pretrained_cfg" is read too.
        source: how errors and the description name it.

    Raises:
        UserError: the architecture is not a MambaOut, or the config is damaged.
    """
    try:
        architecture = config["architecture"]
        if architecture not in VARIANTS:
            raise UserError(
                f"{source} holds the architecture {architecture!r}: expected a MambaOut, one of "
                f"{', '.join(VARIANTS)}"
            )
        details = config.get("pretrained_cfg", config)
        num_classes = int(config.get("num_classes", details.get("num_classes", 1000)))
        channels, height, width = details["input_size"]
        if channels != 3:
            raise UserError(f"{source} takes images of {channels} channels: expected 3")
        labels = config.get("label_names", details.get("label_names"))
        if not isinstance(labels, list) or len(labels) != num_classes:
            labels = None
        return WeightsInfo(
            model=architecture,
            num_classes=num_classes,
            preprocessing=Preprocessing(
                size=height if height == width else (height, width),
                crop_pct=details.get("crop_pct", 1.0),
                crop_mode=details.get("crop_mode") or "center",
                interpolation=details.get("interpolation", "bicubic"),
                mean=tuple(details["mean"]),
                std=tuple(details["std"]),
            ),
            overrides=_overrides(config.get("model_args") or {}, source),
            class_names=tuple(map(str, labels)) if labels else None,
            source=source,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{CONFIG_FILE} of {source} is damaged: {first_line(error)}") from error


def _overrides(arguments: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns the fields of MambaOut for timm's arguments."""
    fields = {theirs: ours for ours, theirs in _ARGUMENTS.items()}
    overrides = {}
    for name, value in arguments.items():
        if name in fields:
            overrides[fields[name]] = tuple(value) if isinstance(value, list) else value
        elif name not in _IGNORED:
            raise UserError(
                f"{source} sets timm's option {name}={value!r}: the supported options are "
                f"{', '.join(fields)}"
            )
    return overrides
