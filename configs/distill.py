"""MambaOut-Femto on ImageNet-1k, which learns from MambaOut-Base beside the labels.

    python main.py --config=configs/distill.py --workdir=DIR --config.data.dir=DIR_OF_TFDS_DATA

The recipe is the paper's; half of the loss is the cross entropy with the teacher's best class, as
in DeiT. --config.distillation.kind=soft is Hinton's loss, for which DeiT took
--config.distillation.weight=0.1 and --config.distillation.temperature=3. The teacher is any weights
of the same classes: a name on the hub, a file, a run's workdir, or a network from
`python -m mambaout_jax export`. Each device holds a copy of it. Not yet run here.
"""

from ml_collections import ConfigDict

from configs import femto


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = femto.get_config()
    config.distillation.teacher = "mambaout_base"
    config.distillation.kind = "hard"
    config.distillation.weight = 0.5
    return config
