"""The token mixers of the Gated CNN block, by name.

conv                    depthwise convolution: MambaOut
conv_ssm                SSM(act(convolution)), in raster order: Mamba's block (Eq. 11 of the paper)
conv_ssm_bidirectional  the mean of two SSMs, one in raster order and one in reverse, each with its
                        own parameters, as in Vim (Zhu et al., 2024)
none                    the identity: a network whose blocks mix channels alone
"""

from typing import Any

from mambaout_jax.errors import UserError, did_you_mean

# Each mixer's SSMs, by the name of their parameters, and whether they run in reverse.
_SCANS: dict[str, dict[str, bool]] = {
    "conv": {},
    "conv_ssm": {"ssm": False},
    "conv_ssm_bidirectional": {"ssm": False, "ssm_reverse": True},
    "none": {},
}
TOKEN_MIXERS = tuple(_SCANS)
TOKEN_MIXER = "conv"  # the paper's
KERNEL_SIZE = 7  # the paper's
KERNEL_SIZES = range(3, 14, 2)
# Options that are stored beside weights, those of a ViT and of a segmentation network too.
DEFAULTS: dict[str, Any] = {
    "token_mixer": TOKEN_MIXER,
    "kernel_size": KERNEL_SIZE,
    "attention": "full",
    "image_size": 224,
    "channels": 512,
}


def scans(token_mixer: str) -> dict[str, bool]:
    """Returns the SSMs of a mixer: the name of each, and whether it runs in reverse."""
    return _SCANS[token_mixer]


def stage_mixers(token_mixer: str, stages: int) -> tuple[str, ...]:
    """Returns the token mixer of each stage.

    Args:
        token_mixer: one name for all stages, or one a stage, with commas between them, such as
            "conv,conv,conv_ssm,conv_ssm".
        stages: how many there are.

    Raises:
        UserError: a name is unknown, or there are too few or too many.
    """
    names = tuple(name.strip() for name in token_mixer.split(","))
    for name in names:
        if name not in _SCANS:
            raise UserError(
                f"unknown token_mixer {name!r}{did_you_mean(name, TOKEN_MIXERS)} "
                f"(known: {', '.join(TOKEN_MIXERS)})"
            )
    if len(names) not in (1, stages):
        raise UserError(
            f"token_mixer {token_mixer!r} has {len(names)} names: expected one, or one for each of "
            f"the {stages} stages"
        )
    return names * stages if len(names) == 1 else names


def check_kernel_size(kernel_size: int) -> None:
    """Checks the side of the depthwise convolutions.

    Raises:
        UserError: it is not an odd number from 3 to 13.
    """
    if kernel_size not in KERNEL_SIZES:
        known = ", ".join(map(str, KERNEL_SIZES))
        raise UserError(f"kernel_size is {kernel_size}: expected one of {known}")


def mixer_options(model: Any) -> dict[str, Any]:
    """Returns the options of a model that differ from the variant's and change its parameters.

    They are stored beside the weights.
    """
    backbone = getattr(model, "backbone", model)
    options = {
        key: getattr(model, key, getattr(backbone, key, value)) for key, value in DEFAULTS.items()
    }
    return {key: value for key, value in options.items() if value != DEFAULTS[key]}
