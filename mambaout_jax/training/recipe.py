"""The options of a step."""

import dataclasses

import jax

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step does besides the model and the optimizer; the names are the configuration's.

    Label smoothing, the choice of the loss, erasing, mixing and distillation are of classification.
    """

    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    label_smoothing: float = 0.0
    loss: str = "softmax"  # one of `classification.LOSSES`
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_off_step: int = 0  # the first step without mixing; 0: never
    mixup_group: int = 0  # images that are mixed by one draw; 0: the whole batch
    repeats: int = 1  # copies of an image in a row
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    task: str = "classification"  # one of `task.TASKS`
    distillation: str = "soft"  # one of `distillation.KINDS`, with a teacher
    distillation_weight: float = 0.5  # of the loss that the teacher gives; the labels': the rest
    distillation_temperature: float = 1.0  # of "soft"
    auxiliary_weight: float = 0.4  # of the auxiliary head's loss, of segmentation
