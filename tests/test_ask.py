"""tools/ask.py: its plan of runs, its table, and that it trains nothing twice."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest

from mambaout_jax.errors import UserError

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def ask(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.chdir(TOOLS.parent)
    spec = importlib.util.spec_from_file_location("ask", TOOLS / "ask.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(ask, *arguments):
    return ask.plan(*ask.parse_arguments(list(arguments)))


def test_the_plan_has_every_combination_and_one_recipe(ask):
    runs = plan(
        ask, "--mixers=conv,conv+conv+conv+conv_ssm", "--seeds=2", "--resolutions=32,64",
        "--budget=20 epochs", "--config.optimizer.weight_decay=0.1",
    )  # fmt: skip
    assert len(runs) == 8
    assert [run["seed"] for run in runs] == [0] * 4 + [1] * 4
    assert {run["size"] for run in runs} == {32, 64}
    own = ("model.token_mixer", "data.image_size", "seed")
    shared = [{k: v for k, v in run["keys"].items() if k not in own} for run in runs]
    assert shared == shared[:1] * 8
    assert shared[0]["schedule.duration"] == "20 epochs"
    assert shared[0]["schedule.warmup"] == "2 epochs"
    assert shared[0]["optimizer.weight_decay"] == "0.1"
    assert runs[1]["keys"]["model.token_mixer"] == "conv,conv,conv,conv_ssm"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--budget=20", "--budget: '20' is not a duration"),
        ("--resolutions=big", "--resolutions has 'big': expected pixels"),
        ("--seeds=0", "--seeds is 0: expected at least 1"),
        ("--jobs=0", "--jobs is 0: expected at least 1"),
        ("--config.model.mixer=conv", "unknown config key 'model.mixer'"),
        ("--config.seed=3", "--config.seed differs between the runs: use --seeds"),
        ("--mixer", "unknown argument"),
        ("--data=/nowhere", "no classes in /nowhere: expected /nowhere/train/CLASS/IMAGE"),
    ],
)
def test_bad_arguments(ask, argument, message):
    with pytest.raises(UserError, match=message):
        plan(ask, argument)


def fake_main(tops, calls):
    """main.py, of runs that end with these top-1; None: the run is saved and stopped."""

    def run(command, *, stderr, **_):
        calls.append(command)
        (folder,) = (Path(arg[10:]) for arg in command if arg.startswith("--workdir="))
        top1 = tops[len(calls) - 1]
        stderr.write("step 1: 5 images/s\nstep 2: 1,200 images/s\n")
        if top1 is None:
            return subprocess.CompletedProcess(command, 75)
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"step,top1\n1,10.0\n2,{top1}\n")
        return subprocess.CompletedProcess(command, 0)

    return run


def test_the_table_of_a_run_that_was_stopped_and_continued(ask, tmp_path, monkeypatch, capsys):
    calls = []
    arguments = ["--mixers=conv,none", "--seeds=2", "--budget=1 epochs", f"--output={tmp_path}"]
    monkeypatch.setattr(ask.subprocess, "run", fake_main([90, 80, None, 92, 84], calls))
    assert ask.main(arguments) == 75
    assert ask.main(arguments) == 0
    assert len(calls) == 5
    assert calls[2] == calls[3]
    lines = capsys.readouterr().out.splitlines()
    conv, none = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[-2:])
    assert conv[:4] == ["conv", "32", "2", "91.00 ± 1.00"]
    assert none[:4] == ["none", "32", "2", "82.00 ± 2.00"]
    assert conv[6:] == ["1,200", "4", "288", "no"]
    assert int(conv[5].replace(",", "")) > int(none[5].replace(",", "")) > 0
    for name in ("accuracy_over_macs.png", "accuracy_over_tokens.png"):
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(UserError, match="with other keys: choose another --output"):
        ask.main([*arguments, "--budget=2 epochs"])


def test_vits_beside_them(ask, tmp_path, monkeypatch, capsys):
    calls = []
    arguments = ["--mixers=", "--attention=full,causal", f"--output={tmp_path}"]
    monkeypatch.setattr(ask.subprocess, "run", fake_main([90, 80], calls))
    assert ask.main([*arguments, "--seeds=1"]) == 0
    assert "--config.model.attention=causal" in calls[1]
    assert "--config.model.name=vit_tiny_patch16_224" in calls[1]
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["| ViT-full", "| ViT-causal"]
    assert rows[0][7:] == ["4", "1,152", "no |"]
    assert (tmp_path / "full_against_causal.png").stat().st_size > 1000


def test_a_bad_combination_ends_before_it_trains(ask, tmp_path):
    with pytest.raises(UserError, match="unknown token_mixer 'attention'"):
        ask.main(["--mixers=attention", f"--output={tmp_path}"])


def test_one_run_has_no_standard_error(ask):
    report = sys.modules["ask_report"]
    mean, error = report.mean_and_error([90.0])
    assert (mean, math.isnan(error)) == (90.0, True)
