"""Trains timm's network with timm's parts, as a config of ours says: `duel_timm.py WORKDIR`.

WORKDIR/config.json has the keys of configs/default.py, dotted. Writes WORKDIR/metrics.csv as
main.py does. The loader, RandAugment, mixup and CutMix, random erasing, the optimizer's groups, the
schedule, the loss and the moving average are timm's; on a GPU the network is compiled, has
channels last and computes bfloat16 by autocast.
"""

import contextlib
import csv
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import ImageOps
from timm.data import auto_augment, create_dataset, create_loader
from timm.data.mixup import FastCollateMixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils import ModelEmaV3

Config = dict[str, Any]


class MixGroups(FastCollateMixup):
    """timm's mixing of a loader's batch, of groups in it: as when each group were a batch.

    The paper's recipe trains by batches of 128 in each process and accumulation step.
    """

    group = 0

    def __call__(self, batch: list, _: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Collates and mixes a batch of (image, label)."""
        group = self.group or len(batch)
        mix = super().__call__
        parts = [mix(batch[start : start + group]) for start in range(0, len(batch), group)]
        images, targets = zip(*parts, strict=True)
        return torch.cat(images), torch.cat(targets)


def posterize(image: Any, bits_to_keep: int, **_: Any) -> Any:
    """Posterizes; to zero bits, which Pillow 12 refuses, as Pillow 11 did: to black."""
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep else image.point(lambda _: 0)


def train_loader(config: Config, device: torch.device, workers: int) -> Any:
    """Returns timm's training loader."""
    size, classes = config["data.image_size"], config["data.num_classes"]
    mixing = MixGroups(
        mixup_alpha=config["augment.mixup"],
        cutmix_alpha=config["augment.cutmix"],
        prob=config["augment.mixup_prob"],
        switch_prob=config["augment.mixup_switch_prob"],
        mode="batch",
        label_smoothing=config["label_smoothing"],
        num_classes=classes,
    )
    mixing.group = config["augment.mixup_group"]
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    dataset = create_dataset(
        "", root=config["data.dir"], split=config["data.train_split"], is_training=True
    )
    return create_loader(
        dataset,
        input_size=(3, size, size),
        batch_size=config["batch_size"],
        is_training=True,
        scale=tuple(config["augment.crop_scale"]),
        ratio=tuple(config["augment.crop_ratio"]),
        hflip=config["augment.hflip"],
        color_jitter=config["augment.color_jitter"] or None,
        auto_augment=config["augment.policy"] or None,
        interpolation=config["augment.interpolation"],
        re_prob=config["augment.random_erasing"],
        re_mode="pixel",
        collate_fn=mixing,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        device=device,
    )


def eval_loader(config: Config, device: torch.device, workers: int) -> Any:
    """Returns timm's evaluation loader."""
    size = config["data.image_size"]
    return create_loader(
        create_dataset("", root=config["data.dir"], split=config["data.eval_split"]),
        input_size=(3, size, size),
        batch_size=config["eval.batch_size"],
        interpolation="bicubic",
        crop_pct=config["eval.crop_pct"],
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        device=device,
    )


def epochs_of(config: Config, key: str) -> int:
    """Returns a duration of the config, which is in epochs, or none."""
    number, _, unit = (config[key] or "0 epochs").partition(" ")
    if not unit.startswith("epoch"):
        sys.exit(f"config.{key} is {config[key]!r}: this script takes epochs alone")
    return int(number)


def make_schedule(config: Config, optimizer: torch.optim.Optimizer, per_epoch: int) -> Any:
    """Returns timm's schedule, by epochs or by steps."""
    by_epoch = config["schedule.per"] == "epoch"
    unit = 1 if by_epoch else per_epoch
    return CosineLRScheduler(
        optimizer,
        t_initial=epochs_of(config, "schedule.duration") * unit,
        lr_min=config["schedule.min_learning_rate"],
        warmup_t=epochs_of(config, "schedule.warmup") * unit,
        warmup_lr_init=config["schedule.warmup_learning_rate"],
        t_in_epochs=by_epoch,
    )


@torch.inference_mode()
def evaluate(model: Any, loader: Any, precision: Any) -> tuple[float, float]:
    """Returns the mean loss and the top-1 in percent."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for images, labels in loader:
        images = images.contiguous(memory_format=torch.channels_last)
        with precision():
            logits = model(images).float()
        loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(1) == labels).sum().item()
        count += len(labels)
    return loss / count, 100 * right / count


def main(workdir: Path) -> None:
    """Trains and evaluates as the config in the workdir says."""
    config = json.loads((workdir / "config.json").read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    random.seed(config["seed"])
    np.random.seed(config["seed"])  # noqa: NPY002 (timm draws from it)
    torch.manual_seed(config["seed"])
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32, as XLA computes float32 on a GPU
    workers = config["data.workers"]
    if workers < 0:
        workers = torch.multiprocessing.cpu_count()
    train, held_out = (make(config, device, workers) for make in (train_loader, eval_loader))
    model = timm.create_model(
        config["model.name"],
        num_classes=config["data.num_classes"],
        drop_path_rate=config["model.drop_path_rate"],
        drop_rate=config["model.head_dropout_rate"],
    ).to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(
        model,
        "adamw",
        lr=config["schedule.learning_rate"],
        weight_decay=config["optimizer.weight_decay"],
        betas=(config["optimizer.b1"], config["optimizer.b2"]),
        eps=config["optimizer.eps"],
        fused=on_gpu,
    )
    average = None
    if config["optimizer.ema_decay"]:
        average = ModelEmaV3(model, decay=config["optimizer.ema_decay"])
    network = torch.compile(model) if on_gpu else model
    precision = contextlib.nullcontext
    if config["model.dtype"] == "bfloat16":

        def precision() -> Any:
            return torch.autocast(device.type, torch.bfloat16)

    loss_fn = SoftTargetCrossEntropy()
    schedule = make_schedule(config, optimizer, len(train))
    every = epochs_of(config, "eval.every")
    epochs, updates, losses, rows = epochs_of(config, "schedule.duration"), 0, [], []
    started = time.monotonic()
    for epoch in range(epochs):
        network.train()
        rate = optimizer.param_groups[0]["lr"]
        for images, targets in train:
            images = images.contiguous(memory_format=torch.channels_last)
            with precision():
                loss = loss_fn(network(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            if average is not None:
                average.update(model)
            losses.append(loss.detach())
            schedule.step_update(updates)
        schedule.step(epoch + 1)
        if (epoch + 1) % every == 0 or epoch + 1 == epochs:
            tested = network if average is None else average.module
            eval_loss, top1 = evaluate(tested, held_out, precision)
            train_loss = torch.stack(losses).mean().item()
            losses = []
            rows.append((updates, epoch + 1, rate, train_loss, eval_loss, top1))
            print(f"{time.monotonic() - started:.0f} s: {rows[-1]}", flush=True)
    with (workdir / "metrics.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "epoch", "learning_rate", "train_loss", "eval_loss", "top1"))
        writer.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
