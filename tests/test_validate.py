"""The command validate: checkpoints, reassessed labels, subsets, processes and mistakes."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small_weights

from mambaout_jax import load_pretrained, preprocess_image
from mambaout_jax.__main__ import main
from mambaout_jax.cli.validate import expand_weights
from mambaout_jax.data.preprocess import normalize
from mambaout_jax.errors import UserError
from mambaout_jax.labels import imagenet_wordnet_ids
from mambaout_jax.models.pretrained import list_pretrained

CLASSES = 7
COUNT = 19  # images: no multiple of the batch
ROOT = Path(__file__).parents[1]
# Calls the command several times. Memory of the second process suffices for two images.
PROGRAM = """
import json, os, sys
import jax
from mambaout_jax.__main__ import main
from mambaout_jax.inference import evaluate_weights
from mambaout_jax.runtime import processes

compile_eval_step = evaluate_weights.compile_eval_step

def compile_limited(*args, **options):
    step = compile_eval_step(*args, **options)
    def limited(params, batch):
        if jax.process_index() == 1 and len(batch["mask"]) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return step(params, batch)
    return limited

evaluate_weights.compile_eval_step = compile_limited
statuses = []
for arguments in json.loads(sys.argv[1]):
    statuses.append(main(["validate", *arguments]))
    processes.join_processes = lambda: None  # they have joined
print("statuses", statuses, flush=True)
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Processes can be joined only before jax has started, as it has here."""
    monkeypatch.setattr("mambaout_jax.runtime.processes.join_processes", lambda: None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two checkpoints of seven classes."""
    folder = tmp_path_factory.mktemp("runs")
    names = imagenet_wordnet_ids()[:CLASSES]
    for seed in range(2):
        name = folder / f"run{seed}"
        small_weights.write(name, seed, num_classes=CLASSES, class_names=names)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise in class folders of ImageNet's names; the n-th file is ILSVRC2012_val_n."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.RandomState(0)
    labels = np.concatenate([np.arange(CLASSES), rng.randint(0, CLASSES, COUNT - CLASSES)])
    for number, label in enumerate(labels):
        folder = root / "validation" / imagenet_wordnet_ids()[label]
        folder.mkdir(parents=True, exist_ok=True)
        small_weights.image(number).save(folder / f"ILSVRC2012_val_{number + 1:08d}.png")
    return root


@pytest.fixture(scope="module")
def logits(runs, data):
    """The first checkpoint's logits [images, classes] and the labels, in the order of the names."""
    model, params = load_pretrained(runs / "run0")
    p = small_weights.INFO.preprocessing
    files = sorted(data.rglob("*.png"), key=lambda file: file.name)
    images = np.stack([preprocess_image(file.read_bytes(), p) for file in files])
    answer = jax.jit(model.apply)({"params": params}, normalize(images, p.mean, p.std))
    labels = [imagenet_wordnet_ids().index(file.parent.name) for file in files]
    return np.asarray(answer), np.array(labels)


def run(data, *arguments, tmp_path):
    """Returns the exit status and the rows in the JSON file."""
    out = tmp_path / "out.json"
    common = ["--data=folder", f"--data-dir={data}", "--batch-size=8", f"--json={out}"]
    status = main(["validate", *common, *map(str, arguments)])
    return status, json.loads(out.read_text()) if out.exists() else []


def hits(logits, right):
    """Returns top-1 and top-5 in percent: `right` is a set of classes for each row."""
    order = np.argsort(-logits, axis=1)
    top1 = [row[0] in good for row, good in zip(order, right, strict=True)]
    top5 = [bool(set(row[:5]) & good) for row, good in zip(order, right, strict=True)]
    return 100 * np.mean(top1), 100 * np.mean(top5)


def test_many_checkpoints_by_wildcard_to_csv_and_json(runs, data, logits, tmp_path, capsys):
    status, rows = run(data, runs / "run?", f"--csv={tmp_path / 'out.csv'}", tmp_path=tmp_path)
    assert status == 0
    assert [row["weights"] for row in rows] == [str(runs / "run0"), str(runs / "run1")]
    top1, top5 = hits(logits[0], [{label} for label in logits[1]])
    assert 0 < top1 < top5 < 100, "the case must tell the two apart"
    assert rows[0]["top1"] == pytest.approx(top1)
    assert rows[0]["top5"] == pytest.approx(top5)
    assert rows[0]["top1_err"] == pytest.approx(100 - top1)
    assert rows[0]["examples"] == COUNT
    assert rows[0]["size"] == "32x32"
    assert rows[0]["crop_pct"] == 0.9
    with (tmp_path / "out.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [{key: str(value) for key, value in row.items()} for row in rows] == table
    assert (
        f"run0: top-1 {top1:.3f}%, top-5 {top5:.3f}% of 19 images of {data.name}/validation"
        in capsys.readouterr().out
    )


def test_real_labels(runs, data, logits, tmp_path):
    rng = np.random.RandomState(1)
    real = [rng.permutation(CLASSES)[: number % 3].tolist() for number in range(COUNT)]
    (tmp_path / "real.json").write_text(json.dumps(real))
    _, rows = run(data, runs / "run0", f"--real={tmp_path / 'real.json'}", tmp_path=tmp_path)
    counted = [number for number in range(COUNT) if real[number]]
    top1, top5 = hits(logits[0][counted], [set(real[number]) for number in counted])
    assert rows[0]["examples"] == len(counted) < COUNT
    assert (rows[0]["top1"], rows[0]["top5"]) == pytest.approx((top1, top5))


def test_a_subset_of_the_classes(runs, data, logits, tmp_path, capsys):
    subset = [5, 1, 3]
    (tmp_path / "subset.txt").write_text(f"5\n{imagenet_wordnet_ids()[1]}\n3\n\n")
    arguments = [runs / "run0", f"--subset={tmp_path / 'subset.txt'}"]
    _, rows = run(data, *arguments, f"--csv={tmp_path / 'out.csv'}", tmp_path=tmp_path)
    kept = np.isin(logits[1], subset)
    masked = np.where(np.isin(np.arange(CLASSES), subset), logits[0][kept], -np.inf)
    top1, _ = hits(masked, [{label} for label in logits[1][kept]])
    assert rows[0]["examples"] == kept.sum()
    assert rows[0]["top1"] == pytest.approx(top1)
    assert (rows[0]["top5"], rows[0]["top5_err"]) == (None, None), "there are but three classes"
    with (tmp_path / "out.csv").open() as file:
        assert next(csv.DictReader(file))["top5"] == ""
    assert "top-5" not in capsys.readouterr().out


def test_a_data_set_of_the_subset_alone(runs, data, logits, tmp_path):
    subset = [1, 3, 5]
    for label in subset:
        name = imagenet_wordnet_ids()[label]
        (tmp_path / "validation").mkdir(exist_ok=True)
        (tmp_path / "validation" / name).symlink_to(data / "validation" / name)
    (tmp_path / "subset.txt").write_text("\n".join(map(str, subset)))
    arguments = [runs / "run0", f"--subset={tmp_path / 'subset.txt'}"]
    _, alone = run(tmp_path, *arguments, tmp_path=tmp_path)
    _, whole = run(data, *arguments, tmp_path=tmp_path)
    assert alone[0]["top1"] == whole[0]["top1"]
    assert alone[0]["examples"] == whole[0]["examples"] == np.isin(logits[1], subset).sum()


def test_the_digits_of_the_package(tmp_path, capsys):
    weights = small_weights.write(tmp_path / "w", num_classes=10)
    assert main(["validate", str(weights), "--data=digits", "--batch-size=64"]) == 0
    assert " of 360 images of digits/1.0.0/validation" in capsys.readouterr().out


def test_a_checkpoint_that_fails_does_not_keep_the_others(runs, data, tmp_path, capsys):
    status, rows = run(data, tmp_path / "no.pth", runs / "run0", tmp_path=tmp_path)
    assert status == 1
    assert [row["weights"] for row in rows] == [str(runs / "run0")]
    assert f"error: {tmp_path / 'no.pth'}: " in capsys.readouterr().err


def test_wildcards():
    assert expand_weights(["mambaout_base_*_rw.sw_e500*", "a.pth"]) == [
        *(name for name in list_pretrained() if "e500" in name),
        "a.pth",
    ]
    with pytest.raises(UserError, match="matches 'nothing\\*'"):
        expand_weights(["nothing*"])


def test_mistakes(runs, data, tmp_path, capsys):
    run0 = runs / "run0"
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "numbers.json").write_text("[1, 2]")
    (tmp_path / "short.json").write_text("[[1]]")
    (tmp_path / "out_of_range").write_text("99\n")
    (tmp_path / "twice").write_text("1\n1\n")
    (tmp_path / "nothing").write_text("\n")
    for option, expected in (
        (f"--real={tmp_path / 'bad.json'}", "cannot read the reassessed labels"),
        (f"--real={tmp_path / 'numbers.json'}", "cannot read the reassessed labels"),
        (f"--real={tmp_path / 'short.json'}", "has no reassessed labels"),
        (f"--real={tmp_path / 'none.json'}", "cannot read the reassessed labels"),
        (f"--subset={tmp_path / 'out_of_range'}", "'99' is not a class"),
        (f"--subset={tmp_path / 'twice'}", "line 2: '1' is there twice"),
        (f"--subset={tmp_path / 'nothing'}", "is empty"),
        (f"--subset={tmp_path / 'missing'}", "cannot read the class subset"),
        ("--split=test", "no split 'test'"),
        ("--data-dir=/nonexistent", "no folder '/nonexistent'"),
        ("--batch-size=0", "--batch-size is 0: expected at least 1"),
    ):
        assert run(data, run0, option, tmp_path=tmp_path)[0] == 1, option
        printed = capsys.readouterr().err
        assert expected in printed, option
        assert "data.dir" not in printed, "the command has no such key"
    three = small_weights.write(tmp_path / "three", num_classes=3)
    assert run(data, three, tmp_path=tmp_path) == (1, [])
    assert "has 7 classes: expected the 3 of the weights" in capsys.readouterr().err


def test_where_nothing_can_be_written_nothing_is_measured(runs, data, tmp_path, capsys):
    for path in (tmp_path / "no" / "out.csv", tmp_path):
        assert run(data, runs / "run0", f"--csv={path}", tmp_path=tmp_path) == (1, [])
        printed = capsys.readouterr()
        assert f"cannot write {path}" in printed.err
        assert not printed.out


def validate_in_two_processes(calls, folder):
    """Runs the calls, a list of arguments for each process, and returns what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(2):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "PYTHONPATH": os.fspath(ROOT),
        }
        arguments = [[*map(str, call)] for call in calls[index]]
        with (folder / f"{index}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, json.dumps(arguments)],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
    codes = [process.wait(timeout=600) for process in started]
    logs = [(folder / f"{index}.log").read_text() for index in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    return logs


@pytest.mark.slow
def test_two_processes_equal_one(runs, data, tmp_path):
    """Also where one of them runs out of memory, finds a damaged image, or has no checkpoint."""
    real = [[number % CLASSES, 3][: number % 3] for number in range(COUNT)]
    (tmp_path / "labels.json").write_text(json.dumps(real))
    (tmp_path / "subset.txt").write_text("5\n1\n3\n")
    damaged = tmp_path / "damaged"
    shutil.copytree(data, damaged)
    files = sorted((damaged / "validation").rglob("*.png"))
    files[14].write_bytes(b"damaged")  # the second process reads it
    options = {
        "plain": (),
        "real": (f"--real={tmp_path / 'labels.json'}",),
        "subset": (f"--subset={tmp_path / 'subset.txt'}",),
    }
    common = ("--data=folder", "--batch-size=8")
    calls = [[], []]
    for name, extra in options.items():
        for process in calls:
            json_file = tmp_path / f"{name}.json"
            process.append(
                [runs / "run0", *extra, f"--json={json_file}", f"--data-dir={data}", *common]
            )
    both = [runs / "run0", tmp_path / "none", f"--json={tmp_path / 'bad.json'}", *common]
    calls[0].append([*both, f"--data-dir={data}"])
    calls[1].append([*both, f"--data-dir={damaged}"])
    first, second = validate_in_two_processes(calls, tmp_path)
    for name, extra in options.items():
        _, (alone,) = run(data, runs / "run0", *extra, tmp_path=tmp_path)
        (pair,) = json.loads((tmp_path / f"{name}.json").read_text())
        assert pair.pop("batch_size") == 4, "the second process's memory suffices for two images"
        assert alone.pop("batch_size") == 8
        assert pair == alone, name
    assert first.count("not enough memory for 8 images a step: trying 4") == 4
    assert "error: " + str(runs / "run0") + ": process 1 of the run says: " in first
    assert f"{files[14].name} cannot be decoded" in first
    assert f"error: {tmp_path / 'none'}: " in first
    assert not (tmp_path / "bad.json").exists()
    for log in (first, second):
        assert "statuses [0, 0, 0, 1]" in log
    assert "top-1" not in second
