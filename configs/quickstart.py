"""A small MambaOut on the handwritten digits that ship with the package: minutes on two CPU cores.

python main.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = default.get_config()
    config.model.name = "test_mambaout"
    config.model.drop_path_rate = 0.0
    config.model.dtype = "float32"

    config.data.name = "digits"
    config.data.num_classes = 10
    config.data.image_size = 32
    config.data.workers = 0  # such small images load faster than processes start

    config.augment.crop_scale = (0.5, 1.0)
    config.augment.hflip = 0.0  # a mirrored digit is not a digit
    config.augment.policy = ""
    config.augment.random_erasing = 0.0
    config.augment.mixup_prob = 0.8
    config.augment.mixup_group = 0

    config.batch_size = 64
    config.eval.batch_size = 128
    config.schedule.learning_rate = 2e-3
    config.schedule.duration = "60 epochs"
    config.schedule.warmup = "2 epochs"
    config.schedule.cooldown = ""
    config.schedule.per = "step"
    config.optimizer.ema_decay = 0.99
    config.log.every = "20 steps"
    return config
