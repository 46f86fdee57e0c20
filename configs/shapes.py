"""UperNet on the smallest MambaOut, on shapes: images with masks that one command makes.

    python -m mambaout_jax.data.shapes --output=DIR
    python main.py --config=configs/shapes.py --workdir=runs/shapes --config.data.dir=DIR

Over 30% mIoU after three minutes on two CPU cores. See docs/segmentation.md.
"""

from ml_collections import ConfigDict

from configs import ade20k_tiny


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = ade20k_tiny.get_config()
    config.init_from = "test_mambaout.digits"  # ships with the package
    config.model.name = "upernet_test_mambaout"
    config.model.drop_path_rate = 0.0
    config.model.head_dropout_rate = 0.0
    config.model.dtype = "float32"

    config.data.source = "tfds"
    config.data.name = "shapes"
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.num_classes = 7
    config.data.reduce_zero_label = False
    config.data.image_size = 96
    config.data.workers = 0  # such small images load faster than processes start

    # Twice as large: a texture's period is 4 to 7 pixels, and the largest map has a stride of 4.
    config.segmentation.ratio_range = (2.0, 2.0)
    config.eval.scales = (2.0,)
    config.segmentation.channels = 32
    config.segmentation.photometric = False

    config.batch_size = 8
    config.schedule.learning_rate = 3e-3
    config.schedule.duration = "30 epochs"
    config.schedule.warmup = "1 epochs"
    config.eval.batch_size = 16
    config.eval.every = "3 epochs"
    config.checkpoint.every = "1 epochs"
    config.log.every = "25 steps"
    return config
