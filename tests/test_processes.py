"""Several real processes on one machine: the same losses, and each held-out picture once."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
COMMAND = (
    "main.py",
    "--config=configs/quickstart.py",
    "--config.model.depthwise=xla",
    "--config.data.train_split=train[:64]",
    "--config.data.eval_split=validation[:30]",
    "--config.batch_size=16",
    "--config.eval.batch_size=16",
    "--config.schedule.duration=2 epochs",
    "--config.schedule.warmup=1 epochs",
    "--config.log.every=1 steps",
)


def run(workdir, processes, *keys):
    """Runs the command in that many processes, of one device each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(processes):
        cluster = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
        }
        environment = os.environ | {"XLA_FLAGS": ""} | (cluster if processes > 1 else {})
        command = [sys.executable, *COMMAND, f"--workdir={workdir}", *keys]
        log = workdir.parent / f"{index}.log"
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file)
        started.append((process, log))
    for process, log in started:
        assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    return [log.read_text() for _, log in started]


def table(workdir):
    with (workdir / "metrics.csv").open() as file:
        return [[float(value) for value in row.values()] for row in csv.DictReader(file)]


def test_two_processes_equal_one(tmp_path):
    run(tmp_path / "one", 1)
    first, second = run(tmp_path / "two", 2)
    expected = table(tmp_path / "one")
    np.testing.assert_allclose(table(tmp_path / "two"), expected, rtol=1e-5)
    assert "epoch 2/2" in first
    assert "epoch" not in second
    run(tmp_path / "two", 2, "--mode=eval")
    report = json.loads((tmp_path / "two" / "eval.json").read_text())
    assert report["examples"] == 30
    best = max(expected, key=lambda row: (row[5], row[0]))
    np.testing.assert_allclose([report["loss"], report["top1"]], best[4:6], rtol=1e-5)
