"""Every key, with its unit and its default: the paper's recipe for ImageNet-1k.

The file of a variant calls `get_config` and overrides what differs. A duration is a string of a
number and a unit, "300 epochs", "20 steps" or "1_000_000 examples"; "" means none.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the default config, locked: unknown keys are an error."""
    config = ConfigDict()
    config.seed = 0  # the one seed: initialisation, order, augmentation, drop path
    config.task = "classification"  # or "segmentation", of a model "upernet_..."
    config.init_from = ""  # weights to start from: a hub name, .pth, .safetensors or checkpoint

    config.model = ConfigDict()
    config.model.name = "mambaout_tiny"  # see mambaout_jax.list_models()
    config.model.token_mixer = "conv"  # see mambaout_jax/models/mixers.py; or "conv,conv,none,none"
    config.model.kernel_size = 7  # of the depthwise convolutions: 3, 5, 7, 9, 11 or 13
    config.model.attention = "full"  # of a ViT: "full" or "causal"
    config.model.drop_path_rate = 0.2  # probability at the last block; rises linearly from 0
    config.model.head_dropout_rate = 0.0  # probability
    config.model.dtype = "bfloat16"  # of the computation; parameters are float32
    config.model.gradient_dtype = "float32"  # in which gradients are summed over devices
    config.model.remat = False  # recompute each block in the backward pass, to save memory

    config.model.depthwise = "auto"  # implementation of the depthwise convolutions; "xla": plain

    config.data = ConfigDict()
    config.data.source = (
        "tfds"  # "tfds" (as ArrayRecord), "folder" (dir/split/class/x), "synthetic"
    )
    config.data.name = "imagenet2012"  # TFDS name; "digits" ships with the package
    config.data.dir = ""  # folder of the data; for TFDS, "" means $TFDS_DATA_DIR
    config.data.train_split = "train"  # a part: "train[:90%]"; "" and "": found in a folder
    config.data.eval_split = "validation"
    config.data.num_classes = 1000  # 0: as many as the training split has
    config.data.reduce_zero_label = False  # masks: 0 is unlabelled, and k + 1 is class k
    config.data.image_size = 224  # pixels; of segmentation the crop, and evaluation's short side
    config.data.workers = -1  # processes that decode and augment; 0: none, -1: chosen by the cores
    config.data.threads = 4  # threads of each process that read and decode
    config.data.backend = "auto"  # of training: "pillow", or "fast" if its extra is installed

    config.augment = ConfigDict()
    config.augment.crop_scale = (0.08, 1.0)  # area of the random crop, as a fraction of the image
    config.augment.crop_ratio = (3 / 4, 4 / 3)  # width to height of the random crop
    config.augment.interpolation = "random"  # "bilinear", "bicubic" or "random" (even odds)
    config.augment.hflip = 0.5  # probability of a horizontal flip
    config.augment.policy = "rand-m9-mstd0.5-inc1"  # timm's RandAugment string, "3a", or ""
    config.augment.color_jitter = 0.0  # strength of brightness, contrast and saturation; 0: none
    config.augment.repeats = 1  # of each image in an epoch (repeated augmentation); 1: none
    config.augment.random_erasing = 0.25  # probability, on the device, after normalisation
    config.augment.mixup = 0.8  # alpha of the Beta distribution; 0: none
    config.augment.cutmix = 1.0  # alpha of the Beta distribution; 0: none
    config.augment.mixup_prob = 1.0  # probability that a group is mixed at all
    config.augment.mixup_switch_prob = 0.5  # probability of CutMix if both are on
    config.augment.mixup_group = 128  # consecutive images that one draw mixes; 0: the whole batch
    config.augment.mixup_off = ""  # duration after which nothing is mixed any more; "": never
    config.augment.max_bad_fraction = 0.001  # of training images that may fail to decode

    config.segmentation = ConfigDict()  # of config.task=segmentation alone
    config.segmentation.channels = 512  # of the decode head; the auxiliary head has half as many
    config.segmentation.auxiliary_weight = 0.4  # of the auxiliary head's loss
    config.segmentation.ratio_range = (0.5, 2.0)  # short side before cropping / data.image_size
    config.segmentation.cat_max_ratio = 0.75  # of a crop that one class may cover, in 10 tries
    config.segmentation.photometric = True  # random brightness, contrast, saturation and hue

    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices that share one copy of the parameters; 1: a copy on each

    config.batch_size = 4096  # examples a step, over all devices of all processes; 0: chosen
    config.accumulate_steps = 1  # parts of a batch that are computed one after the other
    config.label_smoothing = 0.1
    config.loss = "softmax"  # cross entropy; "bce": binary cross entropy, the mean over classes

    config.distillation = ConfigDict()
    config.distillation.teacher = ""  # weights, as init_from takes them, or an exported .zip
    config.distillation.kind = "soft"  # Hinton's; or "hard", DeiT's: the teacher's best class
    config.distillation.weight = 0.5  # of the teacher's loss; the labels' has the rest
    config.distillation.temperature = 1.0  # of "soft"

    config.schedule = ConfigDict()
    config.schedule.kind = "cosine"  # or "poly": linear warmup, then polynomial decay, each step
    config.schedule.power = 1.0  # of the polynomial decay
    config.schedule.reference_batch = 0  # that the rates are for, see build.rate_scale; 0: any
    config.schedule.learning_rate = 4e-3  # the peak
    config.schedule.duration = "300 epochs"  # of the cosine or the decay, warmup included
    config.schedule.warmup = "20 epochs"
    config.schedule.warmup_learning_rate = 1e-6  # at the first step
    config.schedule.min_learning_rate = 1e-5  # at the end of the duration
    config.schedule.cooldown = "10 epochs"  # at the minimum, after the duration
    config.schedule.per = "epoch"  # how often the learning rate moves: "epoch" or "step"

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # "lamb", "lion", "muon" or "sgd"
    config.optimizer.b1 = 0.9  # decay of the first moment; the momentum of muon and sgd
    config.optimizer.b2 = 0.999  # decay of the second moment, or of lion's momentum; not of sgd
    config.optimizer.eps = 1e-8  # of adamw, lamb and muon
    config.optimizer.weight_decay = 0.05  # on tensors of more than one axis
    config.optimizer.layer_decay = 1.0  # learning-rate factor from a layer to the one below it
    config.optimizer.clip_norm = 0.0  # global norm that gradients are clipped to; 0: not clipped
    config.optimizer.ema_decay = 0.0  # of the averaged parameters, used by evaluation; 0: none

    config.eval = ConfigDict()
    config.eval.batch_size = 1024  # examples a step, over all devices; 0: as in training
    config.eval.every = "1 epochs"
    config.eval.crop_pct = 1.0  # crop size as a fraction of the resized short side
    config.eval.crop_mode = "center"  # "center", or "squash": the whole image, aspect ratio lost
    config.eval.scales = (1.0,)  # of segmentation: short sides / data.image_size, averaged
    config.eval.flip = False  # of segmentation: average with the mirrored image
    config.eval.window = 0  # of segmentation: side of a sliding window in pixels; 0: whole images
    config.eval.stride = 0  # of segmentation: pixels from a window to the next

    config.checkpoint = ConfigDict()
    config.checkpoint.every = "1 epochs"
    config.checkpoint.keep = 2  # newest checkpoints kept, beside the best one

    config.max_bad_steps = 10  # in a row that are skipped for NaN before the run stops
    config.compilation_cache = "auto"  # folder; "auto": $JAX_COMPILATION_CACHE_DIR, or the user's
    config.profile = ""  # duration to trace for TensorBoard, such as "5 steps"

    config.log = ConfigDict()
    config.log.every = "50 steps"  # between two lines of metrics
    config.log.wandb_project = ""  # Weights & Biases project; "": none

    return config.lock()
