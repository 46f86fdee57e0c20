"""MambaOut-Femto on fractals, images that one command makes: a training run of minutes on one GPU.

    python -m mambaout_jax.data.fractals --output=DIR
    python main.py --config=configs/fractals.py --workdir=runs/fractals --config.data.dir=DIR

The paper's augmentation with a short schedule. benchmarks/duel.py compares it with timm's trainer;
docs/reproduction.md has the results.
"""

from ml_collections import ConfigDict

from configs import femto


def get_config() -> ConfigDict:
    """Returns the config."""
    config = femto.get_config()
    config.data.name = "fractals"
    config.data.num_classes = 100
    config.data.image_size = 112

    config.batch_size = 128
    config.eval.batch_size = 1000
    config.schedule.learning_rate = 5e-4
    config.schedule.per = "step"
    config.schedule.duration = "16 epochs"
    config.schedule.warmup = "1 epochs"
    config.schedule.cooldown = ""
    return config
