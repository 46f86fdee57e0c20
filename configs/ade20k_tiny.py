"""UperNet on MambaOut-Tiny, semantic segmentation of ADE20K: the paper's recipe.

    python main.py --config=configs/ade20k_tiny.py --workdir=DIR --config.data.dir=DIR_OF_ADE20K

DIR_OF_ADE20K is ADEChallengeData2016 with images/{training,validation} and
annotations/{training,validation}. Published with this recipe (PyTorch): 47.4% mIoU, 48.6% with
several scales and flips. Not yet run here.

Source: the paper's section 5.3, and mmsegmentation's `upernet_swin` for what the paper leaves out.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = default.get_config()
    config.task = "segmentation"
    config.init_from = "mambaout_tiny"
    config.model.name = "upernet_mambaout_tiny"
    config.model.drop_path_rate = 0.3
    config.model.head_dropout_rate = 0.1

    config.data.source = "folder"
    config.data.train_split = "training"
    config.data.eval_split = "validation"
    config.data.num_classes = 150
    config.data.reduce_zero_label = True
    config.data.image_size = 512

    config.augment.policy = ""
    config.augment.random_erasing = 0.0
    config.augment.mixup = 0.0
    config.augment.cutmix = 0.0
    config.augment.mixup_group = 0
    config.label_smoothing = 0.0

    config.batch_size = 16
    config.schedule.kind = "poly"
    config.schedule.per = "step"
    config.schedule.learning_rate = 1e-4
    config.schedule.duration = "160_000 steps"
    config.schedule.warmup = "1_500 steps"
    config.schedule.warmup_learning_rate = 1e-10  # 1e-6 of the peak
    config.schedule.min_learning_rate = 0.0
    config.schedule.cooldown = ""
    config.optimizer.weight_decay = 0.01

    config.eval.batch_size = 16
    config.eval.every = "16_000 steps"
    config.checkpoint.every = "4_000 steps"
    return config
