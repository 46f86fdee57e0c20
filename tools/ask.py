"""Asks the paper's question on your images: do an SSM or attention help?

    python tools/ask.py --config=configs/quickstart.py --workdir=runs/ask \
        --mixers=conv,conv_ssm,none --attention=full,causal --seeds=3 --resolutions=32,64

Trains each combination of network, resolution and seed through main.py with one config, and writes
table.md, accuracy_over_macs.png, full_against_causal.png and accuracy_over_tokens.png. The same
command resumes: runs that have ended are not repeated. Every argument after `--` is passed to
main.py, such as `-- --config.schedule.duration="5 epochs"`. docs/question.md says how to read it.
"""

import argparse
import dataclasses
import itertools
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mambaout_jax.config import load_config
from mambaout_jax.errors import UserError
from mambaout_jax.models.flops import count_total, long_sequence
from mambaout_jax.models.mambaout import create_model
from mambaout_jax.models.mixers import TOKEN_MIXERS
from mambaout_jax.models.vit import ATTENTIONS, PATCH, VITS
from mambaout_jax.training.recorder import read_rows

ROOT = Path(__file__).resolve().parents[1]
RATE = r"([\d,]+) images/s"  # in the log of main.py
HEADER = ("network", "pixels", "runs", "top-1 ± standard error", "parameters", "MACs", "images/s",
          "L", "6 D", "L > 6 D")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of the comparison at a resolution: its options in a config."""

    label: str
    keys: tuple[tuple[str, str], ...]
    size: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """The results of a network: accuracies in percent, a run each; `tokens` and `width` are L, D.

    For MambaOut, L and D are those of its third stage, of stride 16, which most of its blocks are
    in.
    """

    network: Network
    top1: list[float]
    rates: list[float]
    params: int
    macs: int
    tokens: int
    width: int

    @property
    def mean(self) -> float:
        """Returns the mean accuracy."""
        return statistics.mean(self.top1)

    @property
    def error(self) -> float:
        """Returns the standard error of the mean, NaN of one run."""
        n = len(self.top1)
        return statistics.stdev(self.top1) / math.sqrt(n) if n > 1 else math.nan


def parse() -> argparse.Namespace:
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="configs/quickstart.py", help="recipe and data")
    parser.add_argument("--data", help="folder of images, as config.data.dir (default: the config)")
    parser.add_argument("--workdir", type=Path, default=Path("runs/ask"))
    parser.add_argument("--mixers", default="conv,conv_ssm,none", help=", ".join(TOKEN_MIXERS))
    parser.add_argument("--stages", default="all", choices=("all", "last2"),
                        help="the stages with the mixer; the others keep conv")  # fmt: skip
    parser.add_argument("--attention", default="", help="of a ViT: full,causal")
    parser.add_argument("--vit", default="vit_tiny_patch16_224", choices=tuple(VITS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--resolutions", default="", help="pixels, with commas")
    arguments, rest = sys.argv[1:], []
    if "--" in arguments:
        place = arguments.index("--")
        arguments, rest = arguments[:place], arguments[place + 1 :]
    args = parser.parse_args(arguments)
    args.rest = rest
    return args


def networks(args: argparse.Namespace, size: int) -> list[Network]:
    """Returns the networks to compare at a resolution.

    Raises:
        UserError: a mixer or an attention is unknown.
    """
    found = []
    for names, known, option in (
        (args.mixers, TOKEN_MIXERS, "--mixers"),
        (args.attention, ATTENTIONS, "--attention"),
    ):
        for name in filter(None, names.split(",")):
            if name not in known:
                raise UserError(f"{option}={name}: expected some of {', '.join(known)}")
            if option == "--mixers":
                value = name if args.stages == "all" else f"conv,conv,{name},{name}"
                keys: tuple[tuple[str, str], ...] = (("model.token_mixer", value),)
            else:
                keys = (("model.name", args.vit), ("model.attention", name))
            found.append(Network(name, keys, size))
    return found


def train(args: argparse.Namespace, network: Network, seed: int) -> dict[str, float]:
    """Trains one run to its end, or finds that it has ended; returns its last row of metrics.

    Raises:
        UserError: main.py failed.
    """
    workdir = args.workdir / f"{network.label}-{network.size}-seed{seed}"
    flags = {"seed": str(seed), "data.image_size": str(network.size), **dict(network.keys)}
    if args.data:
        flags |= {"data.source": "folder", "data.dir": args.data}
    command = [sys.executable, str(ROOT / "main.py"), f"--config={args.config}",
               f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in flags.items()),
               *args.rest]  # fmt: skip
    log = args.workdir / f"{workdir.name}.log"
    args.workdir.mkdir(parents=True, exist_ok=True)
    # A run of another command is left to main.py, which refuses to continue it.
    ended = args.workdir / f"{workdir.name}.ended"
    if not ended.exists() or ended.read_text() != "\n".join(command):
        print(" ".join(command), flush=True)
        # The log has the speed, beside the workdir: a new workdir must be empty.
        with open(log, "a") as file:
            code = subprocess.run(command, stderr=file).returncode
        if code:
            last = log.read_text().strip().splitlines()[-1:]
            raise UserError(f"the run in {workdir} failed ({' '.join(last)}), see {log}")
        ended.write_text("\n".join(command))
    rates = [float(rate.replace(",", "")) for rate in re.findall(RATE, log.read_text())]
    return {
        "top1": list(read_rows(workdir / "metrics.csv"))[-1]["top1"],
        "rate": statistics.median(rates) if rates else math.nan,
    }


def measure(args: argparse.Namespace, network: Network) -> Answer:
    """Trains all runs of a network and counts it."""
    config, keys = load_config(args.config), dict(network.keys)
    name = keys.get("model.name", config.model.name)
    options: dict[str, Any] = {"num_classes": config.data.num_classes}
    if name in VITS:
        options |= {"attention": keys["model.attention"], "image_size": network.size}
    else:
        options |= {"token_mixer": keys["model.token_mixer"], "depthwise": "xla"}
    model = create_model(name, **options)
    total = count_total(model, (network.size, network.size, 3))
    width = model.width if name in VITS else model.widths[2]
    runs = [train(args, network, seed) for seed in range(args.seeds)]
    return Answer(
        network, [run["top1"] for run in runs], [run["rate"] for run in runs],
        total.params, total.macs, math.ceil(network.size / PATCH) ** 2, width,
    )  # fmt: skip


def write_table(answers: list[Answer], path: Path) -> None:
    """Writes the table, and prints it."""
    rows = [
        (
            answer.network.label,
            str(answer.network.size),
            str(len(answer.top1)),
            f"{answer.mean:.2f} ± {answer.error:.2f}",
            f"{answer.params:,}",
            f"{answer.macs:,}",
            f"{statistics.median(answer.rates):,.0f}",
            f"{answer.tokens:,}",
            f"{long_sequence(answer.width):,}",
            "yes" if answer.tokens > long_sequence(answer.width) else "no",
        )
        for answer in answers
    ]
    lines = [HEADER, ("---",) * len(HEADER), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    path.write_text(text)
    print(text)


def draw(answers: list[Answer], folder: Path) -> None:
    """Draws the three figures; error bars are standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    causal = [answer for answer in answers if answer.network.label in ATTENTIONS]
    figures = (
        ("accuracy_over_macs", "MACs", answers, lambda answer: answer.macs),
        ("full_against_causal", "pixels", causal, lambda answer: answer.network.size),
        ("accuracy_over_tokens", "tokens L (stride 16)", answers, lambda answer: answer.tokens),
    )
    for name, label, chosen, position in figures:
        figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
        key = lambda answer: answer.network.label  # noqa: E731
        for network, group in itertools.groupby(sorted(chosen, key=key), key=key):
            points = sorted(group, key=position)
            errors = [0 if math.isnan(point.error) else point.error for point in points]
            means = [point.mean for point in points]
            axes.errorbar([position(point) for point in points], means, errors, marker="o",
                          capsize=3, label=network)  # fmt: skip
        axes.set(xlabel=label, ylabel="top-1 (%)")
        if chosen:
            axes.legend()
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)


def main() -> None:
    """Trains, then writes the table and the figures."""
    args = parse()
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}: expected at least 1")
    sizes = args.resolutions or str(load_config(args.config).data.image_size)
    if not all(size.isdecimal() for size in sizes.split(",")):
        raise UserError(f"--resolutions={sizes}: expected numbers of pixels, such as 32,64")
    chosen = [network for size in sizes.split(",") for network in networks(args, int(size))]
    answers = [measure(args, network) for network in chosen]
    write_table(answers, args.workdir / "table.md")
    draw(answers, args.workdir)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
