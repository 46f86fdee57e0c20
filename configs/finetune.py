"""MambaOut-Tiny's ImageNet weights, fine-tuned on a folder of one's own.

    python main.py --config=configs/finetune.py --workdir=runs/pets --config.data.dir=pets

`pets` has train/CLASS/IMAGE and validation/CLASS/IMAGE (or val, or test); without a folder for
evaluation, the last fifth of each class's training images is kept for it. CLASS/IMAGE alone will
do. The classes, the batch size and with it the learning rate follow the images. Another network:

    --config.model.name=mambaout_base --config.init_from=mambaout_base

Without a network, --config.model.name=test_mambaout --config.init_from=test_mambaout.digits
--config.data.image_size=32 starts from the digits that ship with the package.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = default.get_config()
    config.init_from = "mambaout_tiny"
    config.model.name = "mambaout_tiny"
    config.model.drop_path_rate = 0.1

    config.data.source = "folder"
    config.data.train_split = ""
    config.data.eval_split = ""
    config.data.num_classes = 0

    config.augment.crop_scale = (0.35, 1.0)
    config.augment.random_erasing = 0.0
    config.augment.mixup = 0.0
    config.augment.cutmix = 0.0

    config.batch_size = 0
    config.eval.batch_size = 0
    config.schedule.reference_batch = 64
    config.schedule.learning_rate = 5e-4
    config.schedule.duration = "20 epochs"
    config.schedule.warmup = "1 epochs"
    config.schedule.cooldown = ""
    config.schedule.per = "step"
    config.optimizer.layer_decay = 0.8
    config.optimizer.ema_decay = 0.98
    config.log.every = "10 steps"
    return config
